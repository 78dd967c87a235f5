"""Label maps of images, as `vimd_jax.predict` writes them for a segmenter."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.data.geometry import BICUBIC, BILINEAR, fitted_size, rounded_sizes
from vimd_jax.data.images import read_image
from vimd_jax.drawing import blended, palette, with_palette
from vimd_jax.errors import DatasetError, printable
from vimd_jax.models.resize import resize_bilinear

MOST_SIZES = 16  # that the network is compiled for; of more, sides are rounded to a power of two


def write_label_maps(
    trained: TrainedModel,
    paths: Sequence[Path],
    output: Path,
    colours: np.ndarray | None = None,
    downsample: bool = False,
) -> Iterator[dict[str, Any]]:
    """Writes NAME.png, the label map with a palette, and NAME_overlay.jpg for every image that can be read.

    The image is fitted into the size that the network was evaluated at, and the map has the image's own size; that of a
    student, which restores the image first, has the size of the restored image.

    Args:
      trained: a segmenter, or a student that segments.
      paths: the images, whose names must differ; unreadable ones are named on stderr.
      output: the folder to write into.
      colours: (classes, 3) uint8; None: those of the training data, or any.
      downsample: resize images to the low resolution that a student reads; the map then has the image's own size.

    Yields:
      {"file", "label_map", "overlay", "labels": [{"class", "share"}]}, the largest share first.

    Raises:
      ValueError: two images have one name.
    """
    stems = [path.stem for path in paths]
    if twice := [stem for i, stem in enumerate(stems) if stem in stems[:i]]:
        raise ValueError(f"two images are called {twice[0]}: their label maps would have one name, label them apart")
    output.mkdir(parents=True, exist_ok=True)
    colours, limits = _colours(trained) if colours is None else colours, _limits(trained)
    segment, sizes, scale = jax.jit(trained.model.segment), set(), trained.model.scale
    for path in paths:
        try:
            image = read_image(path)
            size = image.size if downsample else (scale * image.width, scale * image.height)  # of the map
            fitted = fitted_size(size, limits)
            if size != image.size and fitted[0] < size[0]:
                raise DatasetError(
                    f"{path}: {image.width}x{image.height} pixels, but this network reads up to "
                    f"{fitted[0] // scale}x{fitted[1] // scale}; add --downsample to resize it"
                )
        except DatasetError as error:
            print(f"error: {printable(error, None)}", file=sys.stderr)
            continue
        sizes.add(fitted)
        columns, rows = dict(zip(sizes, rounded_sizes(list(sizes), MOST_SIZES, scale)))[fitted]
        seen = image.resize((columns, rows), BILINEAR) if size == image.size else image
        seen = seen.resize((columns // scale, rows // scale), BICUBIC)
        scores = segment(trained.variables, np.asarray(seen, np.float32)[None] / 255)
        labels = np.asarray(np.argmax(resize_bilinear(scores, size[::-1])[0], -1))
        yield _written(path, image.resize(size, BICUBIC), labels, trained.class_names, colours, output)


def _written(
    path: Path, image: Image.Image, labels: np.ndarray, names: Sequence[str], colours: np.ndarray, output: Path
) -> dict[str, Any]:
    label_map, overlay = output / f"{path.stem}.png", output / f"{path.stem}_overlay.jpg"
    with_palette(labels, colours).save(label_map)
    blended(image, labels, colours).save(overlay, quality=90)
    shares = np.bincount(labels.ravel(), minlength=len(names)) / labels.size
    found = [{"class": names[i], "share": float(shares[i])} for i in np.argsort(-shares, kind="stable") if shares[i]]
    return {"file": str(path), "label_map": str(label_map), "overlay": str(overlay), "labels": found}


def _limits(trained: TrainedModel) -> tuple[int, int]:
    """The size that images were fitted into while training; a checkpoint may come from a stranger."""
    limits = trained.provenance.get("size_limits")
    fits = isinstance(limits, list) and len(limits) == 2 and all(type(x) is int and 0 <= x <= 2**14 for x in limits)
    return tuple(limits) if fits else (0, 0)


def _colours(trained: TrainedModel) -> np.ndarray:
    """The colours of the training data, if the checkpoint names them."""
    text = trained.provenance.get("colours")
    classes = len(trained.class_names)
    try:
        return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(classes, 3)
    except (TypeError, ValueError):
        return palette(classes)
