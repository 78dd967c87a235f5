"""Labels pictures: `python -m vimd_jax.predict --checkpoint DIR IMAGE_OR_FOLDER...`.

DIR is the workdir of a training run or a converted checkpoint; a PyTorch file works too, with --model. A student reads
pictures of its own low resolution as they are, and larger ones with --downsample; a classifier of high-resolution
pictures takes every size (short side resized, centre cropped).
"""

import argparse
import csv
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from vimd_jax.command import readable_errors, show_log
from vimd_jax.data import DatasetError, eval_view, low_resolution_view, read_image
from vimd_jax.data.sources import EXTENSIONS
from vimd_jax.models.srresnet import SRResNet
from vimd_jax.models.srvm import SRVM
from vimd_jax.training import networks, workdirs
from weight_convert import load_converted, load_torch_checkpoint
from weight_convert.mapping import fill, nested
from weight_convert.options import create_model_for, parse_option


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained network, its class names, and the pictures it reads.

    Attributes:
      high: side of the picture that is classified, in pixels.
      low: side of the picture that the SR network enlarges; 0 without one.
      crop: share of a picture's short side that is looked at.
    """

    network: nn.Module
    variables: dict
    class_names: tuple[str, ...]
    high: int
    low: int
    crop: float = 1.0

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
            image = low_resolution_view(eval_view(image, self.high, self.crop), self.low)
        elif not self.low:
            image = eval_view(image, self.high, self.crop)
        return np.asarray(image, np.float32) / 255


def load_classifier(
    checkpoint: Path, model: str | None = None, classes: Path | None = None, options: dict[str, Any] | None = None
) -> Classifier:
    """Loads a classifier from a workdir, a converted checkpoint, or (with `model`, its name, and `options`, fields of
    that network) from a PyTorch file.

    Raises:
      FileNotFoundError, ValueError: nothing is there, or it is no classifier, or the class names do not fit it.
    """
    if (model or options) and not checkpoint.is_file():
        raise ValueError(f"{checkpoint} is no PyTorch file and knows its network: leave out --model and --option.")
    if workdirs.is_workdir(checkpoint):
        config, class_names = workdirs.read_config(checkpoint), workdirs.read_class_names(checkpoint)
        if config.stage == "sr":
            raise ValueError(f"{checkpoint} holds an SR network, which labels nothing: name a teacher or a student.")
        network, variables = networks.load_run(checkpoint)
        low = config.dataset.low_resolution if config.stage == "student" else 0
        data = config.dataset
        return Classifier(network, variables, tuple(class_names), data.high_resolution, low, data.eval_crop)
    if checkpoint.is_file():
        if not model:
            raise ValueError(f"{checkpoint} does not say of which network it is: name it with --model.")
        state_dict = load_torch_checkpoint(checkpoint)
        network, _ = create_model_for(state_dict, model, options or {})
        variables = nested(fill(state_dict, network, source=str(checkpoint)))
    else:
        network, variables, _ = load_converted(checkpoint)
    if isinstance(network, SRResNet):
        raise ValueError(f"{checkpoint} holds an SR network, which labels nothing: name a classifier.")
    vim = getattr(network, "classifier", network)
    height, width = (vim.image_size, vim.image_size) if isinstance(vim.image_size, int) else vim.image_size
    if height != width:
        raise ValueError(f"{checkpoint} reads {width}x{height} pixels, but pictures are cut to squares only.")
    low = height // network.sr.scale if isinstance(network, SRVM) else 0
    names = classes.read_text().splitlines() if classes else [f"class {i}" for i in range(vim.num_classes)]
    if len(names) != vim.num_classes:
        raise ValueError(f"{classes} names {len(names)} classes, but {checkpoint} has {vim.num_classes}.")
    return Classifier(network, variables, tuple(names), height, low)


def find_pictures(paths: list[Path]) -> list[Path]:
    """The named files, and the pictures in the named folders and below, sorted.

    Raises:
      FileNotFoundError: a path is not there, or a folder holds no picture.
    """
    found = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS) if path.is_dir() else [path]
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


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0 and up to 1")
    return share


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vimd_jax.predict", description="Labels pictures.")
    parser.add_argument("pictures", nargs="+", type=Path, help="files and folders")
    parser.add_argument("--checkpoint", required=True, type=Path, help="workdir, converted checkpoint, or PyTorch file")
    parser.add_argument("--model", help="name of the network in a PyTorch file, as in vim_tiny_stride8")
    parser.add_argument(
        "--option",
        action="append",
        type=parse_option,
        default=[],
        metavar="NAME=VALUE",
        help="of that network, as in input_normalization=True",
    )
    parser.add_argument("--classes", type=Path, help="text file of class names, for a checkpoint that brings none")
    parser.add_argument("--crop", type=_share, help="share of the short side to look at (default: as trained, or 1)")
    parser.add_argument("--top", type=int, default=5, help="labels for each picture (default 5)")
    parser.add_argument("--format", choices=["table", "json", "csv"], default="table", help="of standard output")
    parser.add_argument("--downsample", action="store_true", help="resize pictures of other sizes than a student reads")
    parser.add_argument("--batch_size", type=int, default=32, help="pictures at a time (default 32)")
    return parser.parse_args()


def main() -> None:
    """Labels the pictures named on the command line; exit status 1 if one of them could not be read."""
    arguments = parse_arguments()
    show_log()
    with readable_errors():
        paths = find_pictures(arguments.pictures)
        classifier = load_classifier(arguments.checkpoint, arguments.model, arguments.classes, dict(arguments.option))
        if arguments.crop:
            classifier = dataclasses.replace(classifier, crop=arguments.crop)
        labels = []
        for path, probabilities in predict(
            classifier, paths, min(arguments.batch_size, len(paths)), arguments.downsample
        ):
            best = np.argsort(-probabilities)[: arguments.top]
            named = [{"class": classifier.class_names[i], "probability": float(probabilities[i])} for i in best]
            labels.append({"file": str(path), "labels": named})
        write(labels, arguments.format)
        if len(labels) < len(paths):
            raise DatasetError(f"{len(paths) - len(labels)} of {len(paths)} pictures were not labelled; named above.")


if __name__ == "__main__":
    main()
