"""A network with all that is needed to use it, and how it labels images."""

import dataclasses
import functools
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from PIL import Image

from vimd_jax.data.images import ValueRange, as_rgb, decode_image, find_images, read_image
from vimd_jax.data.preparation import NetworkView, prepare
from vimd_jax.errors import DatasetError
from vimd_jax.models.network import Network, square

# An image in any form that can be labelled; a path may also be that of a folder.
Picture = str | Path | bytes | BinaryIO | Image.Image | np.ndarray | jax.Array

_process: int | None = None  # that uses JAX, which does not work in its forks


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A network with all that is needed to use it. It can be pickled.

    Attributes:
      model: the Flax module.
      variables: as `model.init` returns them, NumPy arrays.
      class_names: in the order of the logits; empty for a super-resolution network or one without a head.
      low_resolution: side, or (height, width), in pixels of the images that it restores first; 0 if it reads images as
        they are.
      crop: share of the short side of an image that it was evaluated on.
      provenance: where it comes from, JSON values.
      value_range: the values of grey images of more than 8 bits that become black and white, see `read_image`.
    """

    model: Network
    variables: dict[str, Any]
    class_names: tuple[str, ...] = ()
    low_resolution: int | tuple[int, int] = 0
    crop: float = 1.0
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    value_range: ValueRange = ()

    def __post_init__(self):
        check_process()

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # not what is compiled

    @property
    def image_size(self) -> int | tuple[int, int] | None:
        """Side, or (height, width), in pixels of the images that are classified; None for an SR network."""
        return self.model.image_size

    @property
    def view(self) -> NetworkView:
        """The view of an image that it reads."""
        low = square(self.low_resolution) if self.low_resolution else None
        return NetworkView(square(self.image_size), self.crop, low)

    def predict(
        self, images: Picture | Iterable[Picture], *, downsample: bool = False, batch_size: int = 32
    ) -> np.ndarray:
        """Class probabilities. Memory is needed for one batch at a time, however many images there are.

        Args:
          images: one image or several: paths (of a folder the images in the order of `find_images`), encoded files as
            bytes or open files, Pillow images, arrays (height, width, 3) or (batch, height, width, 3). Arrays of uint8
            are pixels like those of a file; floats are what the network reads, of its size and in [0, 1].
          downsample: also take images of another size than a student reads, by resizing and cropping them.
          batch_size: most images at a time. Batches are padded to a power of two: each size is compiled once.

        Returns:
          (images, classes) float32.

        Raises:
          ValueError, FileNotFoundError, DatasetError: no classifier, no image, or one that cannot be read.
          RuntimeError: this process was forked from one that used JAX.
        """
        if not self.class_names:
            raise ValueError(
                "This network has no classes, as a super-resolution network or one without a head: load a classifier."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size}, expected a whole number above 0")
        pictures = (self.prepare(image, downsample, f"images[{i}]") for i, image in enumerate(_each(images)))
        batches = iter(lambda: list(itertools.islice(pictures, batch_size)), [])
        results = [self.probabilities(np.stack(batch)) for batch in batches]
        if not results:
            raise ValueError("There are no images to label.")
        return np.concatenate(results)

    def warm_up(self, sizes: Iterable[int] = (1, 2, 4, 8, 16, 32)) -> None:
        """Compiles the network for batches of these sizes, so that a server answers its first requests at once."""
        height, width = self.view.low_resolution or self.view.size
        for size in sizes:
            self.probabilities(np.zeros((size, height, width, 3), np.float32))

    def prepare(self, image: Picture, downsample: bool = False, name: str = "image") -> np.ndarray:
        """An image as the network reads it, (height, width, 3) float32 in [0, 1]; see `predict`.

        Raises:
          DatasetError: it cannot be read, or has another size than a student reads and `downsample` is off.
          ValueError: an array that the network does not read.
        """
        if hasattr(image, "dtype") and image.dtype != np.uint8:
            return self._checked(np.asarray(image), name)
        image, name = _decoded(image, name, self.value_range)
        if self.low_resolution and not downsample and not self.view.is_ready(image):
            rows, columns = self.view.low_resolution
            raise DatasetError(
                f"{name}: {image.width}x{image.height} pixels, but this network reads {columns}x{rows}; add "
                "--downsample (downsample=True) to resize and crop it"
            )
        return prepare(image, self.view).astype(np.float32) / 255

    def _checked(self, image: np.ndarray, name: str) -> np.ndarray:
        size = self.view.low_resolution or self.view.size
        if image.shape != (*size, 3):
            expected = f"expected ({size[0]}, {size[1]}, 3), as the network reads it"
            raise ValueError(f"{name}: an array of shape {image.shape}, {expected}; uint8 pixels may have any size")
        image = image.astype(np.float32)
        low, high, slack = image.min(), image.max(), 1e-3
        if not (-slack <= low and high <= 1 + slack):
            remedy = "undo the normalisation" if low < 0 else "divide by 255" if high > 1 else "they are not finite"
            raise ValueError(f"{name}: values from {low:.4g} to {high:.4g}, expected 0 to 1: {remedy}")
        return image

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Class probabilities (batch, classes) of prepared images; padded to a power of two, see `predict`."""
        check_process()
        padding = (1 << (len(images) - 1).bit_length()) - len(images)
        padded = np.pad(images, [(0, padding), (0, 0), (0, 0), (0, 0)])
        result = np.asarray(self._classify(padded))[: len(images)]
        if not np.all(np.isfinite(result)):
            raise ValueError(
                "The outputs of the network are not finite: the weights or the images contain invalid values."
            )
        return result

    @functools.cached_property
    def _classify(self) -> Callable[[np.ndarray], jax.Array]:
        classify = jax.jit(lambda variables, images: jax.nn.softmax(self.model.apply(variables, images)))
        return functools.partial(classify, jax.device_put(self.variables))


def check_process() -> None:
    """Raises RuntimeError in a fork of the process that loaded the first network, in which JAX would wait for ever."""
    global _process
    if _process is None:
        _process = os.getpid()
    if os.getpid() != _process:
        raise RuntimeError(
            f"This process was forked from process {_process}, which had loaded a network, and JAX does not work in a "
            "fork: load the network in each worker (gunicorn: without --preload), or start workers with spawn."
        )


def _each(images: Any) -> Iterator[Picture]:
    """The images one by one, with folders opened."""
    dimensions = getattr(images, "ndim", None)
    if isinstance(images, str | Path):
        yield from find_images([Path(images).expanduser()])
    elif isinstance(images, bytes | Image.Image) or hasattr(images, "read") or dimensions == 3:
        yield images
    elif isinstance(images, Iterable) and dimensions in (None, 4):
        for image in images if dimensions is None else np.asarray(images):
            yield from _each(image)
    else:
        what = f"an array of shape {images.shape}" if dimensions is not None else f"a {type(images).__name__}"
        raise ValueError(
            f"images: {what} is not an image: give paths, bytes, open files, Pillow images or arrays "
            "(height, width, 3) or (batch, height, width, 3)"
        )


def _decoded(image: Picture, name: str, value_range: ValueRange) -> tuple[Image.Image, str]:
    """An image and how messages call it."""
    if isinstance(image, str | Path):
        return read_image(image, value_range=value_range), str(image)
    if isinstance(image, Image.Image):
        return as_rgb(image, name, value_range), name
    if hasattr(image, "dtype"):
        if image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            raise ValueError(f"{name}: an array of shape {image.shape}, expected (height, width, 3)")
        return Image.fromarray(np.asarray(image)), name
    file = io.BytesIO(image if isinstance(image, bytes) else image.read())
    return decode_image(file, name, value_range=value_range), name
