"""Labels images: `python -m vimd_jax.predict --checkpoint DIR IMAGE_OR_FOLDER...`.

DIR is the workdir of a training run or a converted checkpoint; a PyTorch file works too, with --model. A student reads
images of its own low resolution as they are, and others with --downsample; a classifier of high-resolution images takes
every size (short side resized, centre cropped). --explain FOLDER also draws where each answer comes from. A segmenter
takes every size too, and a student that segments all small ones; they write label maps into --output and the shares of
the classes to standard output.
"""

import argparse
import csv
import dataclasses
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from vimd_jax import explain
from vimd_jax.arguments import parse_option, parse_path
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.data.classes import read_classes
from vimd_jax.data.images import find_images, narrow_range
from vimd_jax.errors import DatasetError, printable
from vimd_jax.files import read_regular
from vimd_jax.load import load_model
from vimd_jax.log import extra, readable_errors, show_log
from vimd_jax.segment import write_label_maps

_MOST_BYTES = 4 * 2**20  # of a file of class names


def label(
    classifier: TrainedModel, paths: list[Path], batch_size: int, downsample: bool
) -> Iterator[tuple[Path, np.ndarray]]:
    """Yields every image that can be read with its class probabilities (classes,); the others are named on stderr."""
    for first in range(0, len(paths), batch_size):
        readable = []
        for path in paths[first : first + batch_size]:
            try:
                readable.append((path, classifier.prepare(path, downsample)))
            except DatasetError as error:
                print(f"error: {printable(error, None)}", file=sys.stderr)
        if readable:
            images = np.stack([image for _, image in readable])
            yield from zip([path for path, _ in readable], classifier.probabilities(images))
        if sys.stderr.isatty() and not sys.stdout.isatty():
            done = min(first + batch_size, len(paths))
            print(f"{done:,} of {len(paths):,} images", end="\r" if done < len(paths) else "\n", file=sys.stderr)


def explained(
    classifier: TrainedModel, labelled: Iterable[tuple[Path, np.ndarray]], folder: Path, downsample: bool
) -> Iterator[tuple[Path, np.ndarray]]:
    """Yields what `label` does, and draws for each image where its first label comes from: FOLDER/0001_<name>.png, …"""
    for number, (path, probabilities) in enumerate(labelled, 1):
        picture = folder / f"{number:04d}_{path.stem[:50]}.png"
        with extra(str(picture)):
            image = classifier.prepare(path, downsample)
            values = explain.evidence(classifier.probabilities, image, int(np.argmax(probabilities)))
            explain.draw(image, values).save(picture)
        yield path, probabilities


def named(classifier: TrainedModel, path: Path, probabilities: np.ndarray, top: int) -> dict:
    """The most probable labels of an image: {"file", "labels": [{"class", "probability"}]}."""
    best = np.argsort(-probabilities)[:top]
    labels = [{"class": classifier.class_names[i], "probability": float(probabilities[i])} for i in best]
    return {"file": str(path), "labels": labels}


def write(images: Iterable[dict], form: str, measure: str = "probability") -> int:
    """Writes images as they come to standard output, and returns their number.

    They are those of `named`, or with the measure "share" those of `write_label_maps`.

    Names are escaped where they could act on a terminal or are not UTF-8; in JSON they can be read back exactly.
    """
    count = 0
    if form == "json":
        for count, image in enumerate(images, 1):
            print("[" if count == 1 else ",", json.dumps(image, indent=2), sep="\n", end="", flush=True)
        print("\n]" if count else "[]")
    elif form == "csv":
        writer = csv.writer(sys.stdout)
        writer.writerow(["file", "rank", "class", measure])
        for image in images:
            count += 1
            for rank, label in enumerate(image["labels"], 1):
                name = printable(label["class"], None)
                writer.writerow([printable(image["file"], None), rank, name, f"{label[measure]:.6f}"])
            sys.stdout.flush()
    else:
        for image in images:
            count += 1
            print(printable(image["file"], None))
            for label in image["labels"]:
                print(f"  {100 * label[measure]:6.2f} %  {printable(label['class'], None)}", flush=True)
    return count


def class_names(path: Path) -> list[str]:
    """The class names in a text file, one a line."""
    try:
        return read_regular(path.expanduser(), _MOST_BYTES).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"--classes {path}: not a text file in UTF-8") from None


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")
    return share


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vimd_jax.predict", description="Labels images.")
    parser.add_argument("images", nargs="+", type=parse_path, help="files and folders")
    parser.add_argument("--checkpoint", required=True, help="workdir, converted checkpoint, PyTorch file, or its name")
    parser.add_argument("--model", help="architecture of a PyTorch file, for example vim_tiny_stride8")
    parser.add_argument(
        "--option",
        action="append",
        type=parse_option,
        default=[],
        metavar="NAME=VALUE",
        help="of that architecture, for example input_normalization=True",
    )
    parser.add_argument("--classes", type=parse_path, help="text file of class names, for a checkpoint that has none")
    parser.add_argument("--crop", type=_share, help="share of the short side to look at (default: as trained, or 1)")
    parser.add_argument(
        "--output", type=parse_path, metavar="DIR", help="of a segmenter: folder for label maps and overlays"
    )
    parser.add_argument("--top", type=_positive, default=5, help="labels for each image (default 5)")
    parser.add_argument("--format", choices=["table", "json", "csv"], default="table", help="of standard output")
    parser.add_argument("--downsample", action="store_true", help="resize images of other sizes than a student reads")
    parser.add_argument(
        "--explain",
        type=parse_path,
        metavar="FOLDER",
        help="draw there which parts of each image its first label comes from",
    )
    parser.add_argument("--batch_size", type=_positive, default=32, help="images at a time (default 32)")
    return parser.parse_args()


def main() -> None:
    """Labels the images named on the command line; exit status 1 if one of them could not be read."""
    arguments = parse_arguments()
    show_log()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal lacks
    with readable_errors():
        paths = find_images(arguments.images)
        names = class_names(arguments.classes) if arguments.classes else None
        classifier = load_model(
            arguments.checkpoint, arguments.model, options=dict(arguments.option), class_names=names
        )
        if not classifier.class_names:
            raise ValueError(
                f"{arguments.checkpoint} holds a network without classes, which labels nothing: name a classifier."
            )
        if classifier.model.dense:
            if arguments.explain:
                raise ValueError(f"--explain: {arguments.checkpoint} holds a segmenter, but only labels are explained")
            if not arguments.output:
                raise ValueError(
                    f"{arguments.checkpoint} holds a segmenter: name a folder for label maps (--output DIR)"
                )
            colours = None
            if arguments.classes:
                names, colours = read_classes(arguments.classes)
                classifier = dataclasses.replace(classifier, class_names=names)
            images = write_label_maps(classifier, paths, arguments.output, colours, arguments.downsample)
            count = write(images, arguments.format, "share")
        else:
            count = write(labels_of(classifier, paths, arguments), arguments.format)
        if count < len(paths):
            raise DatasetError(f"{len(paths) - count} of {len(paths)} images were not labelled; named above.")


def labels_of(classifier: TrainedModel, paths: list[Path], arguments: argparse.Namespace) -> Iterator[dict]:
    """The labels of every image, see `named`; with --explain, what they rest on is drawn too."""
    if arguments.crop:
        classifier = dataclasses.replace(classifier, crop=arguments.crop)
    if not classifier.value_range and (text := narrow_range(paths[:: max(1, len(paths) // 8)])):
        print(f"warning: {text}", file=sys.stderr)
    labelled = label(classifier, paths, arguments.batch_size, arguments.downsample)
    if arguments.explain:
        arguments.explain.mkdir(parents=True, exist_ok=True)
        labelled = explained(classifier, labelled, arguments.explain, arguments.downsample)
    return (named(classifier, *image, arguments.top) for image in labelled)


if __name__ == "__main__":
    main()
