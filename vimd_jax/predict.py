"""Labels pictures: `python -m vimd_jax.predict --checkpoint DIR IMAGE_OR_FOLDER...`.

DIR is the workdir of a training run or a converted checkpoint; a PyTorch file works too, with --model. A student reads
pictures of its own low resolution as they are, and larger ones with --downsample; a classifier of high-resolution
pictures takes every size (short side resized, centre cropped).
"""

import csv
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from flax import linen as nn

from vimd_jax.command import readable_errors
from vimd_jax.data import DatasetError, eval_view, low_resolution_view, read_image
from vimd_jax.models import create_model
from vimd_jax.training import checkpoints, networks, workdirs
from weight_convert import load_converted, load_pretrained

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A workdir, a converted checkpoint, or a PyTorch file with --model."
)
_MODEL = flags.DEFINE_string("model", None, "Name of the network in a PyTorch file, as in vim_tiny_stride8.")
_CLASSES = flags.DEFINE_string(
    "classes", None, "Text file of class names, one a line, for a checkpoint that brings none."
)
_TOP = flags.DEFINE_integer("top", 5, "How many labels a picture gets.", lower_bound=1)
_FORMAT = flags.DEFINE_enum("format", "table", ["table", "json", "csv"], "How they are written to standard output.")
_DOWNSAMPLE = flags.DEFINE_bool("downsample", False, "Down-sample pictures that are larger than a student reads.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Pictures at a time.", lower_bound=1)

_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained network, its class names, and the sizes of picture it reads (low: 0 for a network without SR)."""

    network: nn.Module
    variables: dict
    class_names: tuple[str, ...]
    high: int
    low: int

    def prepare(self, path: Path, downsample: bool) -> np.ndarray:
        """The picture as the network reads it, (size, size, 3) float32 in [0, 1].

        Raises:
          DatasetError: the file cannot be read, or has another size and `downsample` is off.
        """
        image = read_image(path)
        if self.low and image.size != (self.low, self.low):
            if not downsample:
                raise DatasetError(
                    f"{path}: {image.width}x{image.height} pixels, but this network reads {self.low}x{self.low}: "
                    "add --downsample to resize and crop it."
                )
            image = low_resolution_view(eval_view(image, self.high), self.low)
        elif not self.low:
            image = eval_view(image, self.high)
        return np.asarray(image, np.float32) / 255


def load_classifier(checkpoint: Path, model: str | None = None, classes: Path | None = None) -> Classifier:
    """Loads a classifier from a workdir, a converted checkpoint or (with `model`, its name) a PyTorch file.

    Raises:
      FileNotFoundError, ValueError: nothing is there, or it is no classifier, or the class names do not fit it.
    """
    if workdirs.is_workdir(checkpoint):
        config, class_names = workdirs.read_config(checkpoint), workdirs.read_class_names(checkpoint)
        if config.stage == "sr":
            raise ValueError(f"{checkpoint} holds an SR network, which labels nothing: name a teacher or a student.")
        network, (_, variables) = networks.build_network(config, len(class_names)), checkpoints.load_best(checkpoint)
        low = config.dataset.low_resolution if config.stage == "student" else 0
        return Classifier(network, variables, tuple(class_names), config.dataset.high_resolution, low)
    if model:
        network = create_model(model)
        variables = load_pretrained(checkpoint, network)
    else:
        network, variables, _ = load_converted(checkpoint)
    names = classes.read_text().splitlines() if classes else [f"class {i}" for i in range(network.num_classes)]
    if len(names) != network.num_classes:
        raise ValueError(f"{classes} names {len(names)} classes, but {checkpoint} has {network.num_classes}.")
    return Classifier(network, variables, tuple(names), network.image_size, 0)


def find_pictures(paths: list[Path]) -> list[Path]:
    """The named files, and the pictures in the named folders and below, sorted.

    Raises:
      FileNotFoundError: a path is not there, or a folder holds no picture.
    """
    found = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in _ENDINGS) if path.is_dir() else [path]
        if not path.exists() or not inside:
            raise FileNotFoundError(
                f"{path}: {'no picture in this folder' if path.exists() else 'no such file or folder'}."
            )
        found += inside
    return found


def predict(
    classifier: Classifier, paths: list[Path], batch_size: int, downsample: bool
) -> Iterator[tuple[Path, np.ndarray]]:
    """Yields every picture that can be read with its class probabilities (classes,); the others are named on stderr."""
    probabilities = jax.jit(lambda images: jax.nn.softmax(classifier.network.apply(classifier.variables, images)))
    for first in range(0, len(paths), batch_size):
        readable = []
        for path in paths[first : first + batch_size]:
            try:
                readable.append((path, classifier.prepare(path, downsample)))
            except DatasetError as error:
                print(f"error: {error}", file=sys.stderr)
        if readable:
            images = np.stack([image for _, image in readable])
            padding = [(0, batch_size - len(readable)), (0, 0), (0, 0), (0, 0)]  # one shape, one compilation
            yield from zip([path for path, _ in readable], np.asarray(probabilities(np.pad(images, padding))))


def write(labels: list[dict], form: str) -> None:
    """Writes predictions ({"file", "labels": [{"class", "probability"}]}) to standard output."""
    if form == "json":
        print(json.dumps(labels, indent=2))
    elif form == "csv":
        writer = csv.writer(sys.stdout)
        writer.writerow(["file", "rank", "class", "probability"])
        for picture in labels:
            for rank, label in enumerate(picture["labels"], 1):
                writer.writerow([picture["file"], rank, label["class"], f"{label['probability']:.6f}"])
    else:
        for picture in labels:
            print(picture["file"])
            for label in picture["labels"]:
                print(f"  {100 * label['probability']:6.2f} %  {label['class']}")


def main(arguments: list[str]) -> None:
    """Labels the pictures named on the command line; exit status 1 if one of them could not be read."""
    with readable_errors():
        if len(arguments) < 2:
            raise ValueError("Name at least one picture or folder after the options.")
        paths = find_pictures([Path(argument) for argument in arguments[1:]])
        classes = Path(_CLASSES.value) if _CLASSES.value else None
        classifier = load_classifier(Path(_CHECKPOINT.value), _MODEL.value, classes)
        labels = []
        for path, probabilities in predict(classifier, paths, min(_BATCH_SIZE.value, len(paths)), _DOWNSAMPLE.value):
            best = np.argsort(-probabilities)[: _TOP.value]
            named = [{"class": classifier.class_names[i], "probability": float(probabilities[i])} for i in best]
            labels.append({"file": str(path), "labels": named})
        write(labels, _FORMAT.value)
        if len(labels) < len(paths):
            raise DatasetError(f"{len(paths) - len(labels)} of {len(paths)} pictures were not labelled; named above.")


if __name__ == "__main__":
    flags.mark_flag_as_required("checkpoint")
    app.run(main)
