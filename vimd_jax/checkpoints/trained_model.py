"""A network with all that is needed to use it, and how it labels images."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from vimd_jax.data.geometry import central_view, low_resolution_view
from vimd_jax.data.images import find_images, read_image
from vimd_jax.errors import DatasetError
from vimd_jax.models.network import square


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A network with all that is needed to use it.

    Attributes:
      model: the Flax module.
      variables: as `model.init` returns them, NumPy arrays.
      class_names: in the order of the logits; empty for a super-resolution network.
      low_resolution: side in pixels of the images that it restores first; 0 if it reads images as they are.
      crop: share of the short side of an image that it was evaluated on.
      provenance: where it comes from, JSON values.
    """

    model: nn.Module
    variables: dict[str, Any]
    class_names: tuple[str, ...] = ()
    low_resolution: int = 0
    crop: float = 1.0
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def image_size(self) -> int | tuple[int, int] | None:
        """Side, or (height, width), in pixels of the images that are classified; None for an SR network."""
        return self.model.image_size

    def predict(
        self,
        images: jax.Array | np.ndarray | str | Path | Sequence[str | Path],
        *,
        downsample: bool = False,
        batch_size: int = 32,
    ) -> np.ndarray:
        """Class probabilities.

        Args:
          images: (batch, height, width, 3) in [0, 1], as the network reads them; or a file, a folder, or several of
            these, whose images are then in the order of `find_images`.
          downsample: also take files of another size than a student reads, by resizing and cropping them.
          batch_size: images at a time.

        Returns:
          (images, classes) float32.

        Raises:
          ValueError, FileNotFoundError, DatasetError: no classifier, no image, or one that cannot be read.
        """
        if not self.class_names:
            raise ValueError("This is a super-resolution network, which has no classes: load a classifier.")
        if isinstance(images, str | Path) or (isinstance(images, Sequence) and not hasattr(images, "shape")):
            paths = find_images([Path(p) for p in ([images] if isinstance(images, str | Path) else images)])
            images = np.array([self.prepare(path, downsample) for path in paths])
        if len(images) == 0:
            raise ValueError("There are no images to label.")
        size = min(batch_size, len(images))
        return np.concatenate([self.probabilities(images[i : i + size], size) for i in range(0, len(images), size)])

    def prepare(self, path: Path, downsample: bool = False) -> np.ndarray:
        """The image of a file as the network reads it, (height, width, 3) float32 in [0, 1].

        Raises:
          DatasetError: the file cannot be read, or has another size than a student reads and `downsample` is off.
        """
        image, low = read_image(path), self.low_resolution
        if not low or image.size != (low, low):
            if low and not downsample:
                raise DatasetError(
                    f"{path}: {image.width}x{image.height} pixels, but this network reads {low}x{low}; "
                    "add --downsample (downsample=True) to resize and crop it"
                )
            height, width = square(self.image_size)
            if height != width:
                raise DatasetError(f"{path}: this network reads {width}x{height} pixels, but files are cut to squares")
            image = central_view(image.size, height, self.crop).apply(image)
            image = low_resolution_view(image, low) if low else image
        return np.asarray(image, np.float32) / 255

    def probabilities(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        """Class probabilities of at most `batch_size` arrays; fewer are padded, so that one size is compiled."""
        padded = np.pad(images, [(0, batch_size - len(images)), (0, 0), (0, 0), (0, 0)])
        result = np.asarray(self._classify(padded))[: len(images)]
        if not np.all(np.isfinite(result)):
            raise ValueError("The outputs of the network are not finite: its weights are ruined, or the images are.")
        return result

    @functools.cached_property
    def _classify(self) -> Callable[[np.ndarray], jax.Array]:
        classify = jax.jit(lambda variables, images: jax.nn.softmax(self.model.apply(variables, images)))
        return functools.partial(classify, jax.device_put(self.variables))
