"""From downloaded archives to a folder for training: `python -m vimd_jax.data.prepare NAME ARCHIVE... DIRECTORY`.

    python -m vimd_jax.data.prepare cub CUB_200_2011.tgz data/cub
    python -m vimd_jax.data.prepare pets images.tar.gz annotations.tar.gz data/pets

A classification dataset becomes `train/<class>/`, `test/<class>/` and, where there is an official validation split,
`val/<class>/`; a segmentation dataset `images/<split>/` and `annotations/<split>/`, the label maps as they are. Splits
are the official ones, and every image is accounted for: DIRECTORY appears when it is whole, in one step, or not at all.
Until then the files are in DIRECTORY.partial; stopped, the same command goes on from there. With --pack, the images of
a split of a classification dataset become one ArrayRecord file (config.dataset.name=array_record).
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vimd_jax.arguments import parse_path
from vimd_jax.data import array_record
from vimd_jax.data.archives import Archive
from vimd_jax.data.layouts import LAYOUTS, Item, Layout, Staged
from vimd_jax.errors import DatasetError
from vimd_jax.files import replace_file
from vimd_jax.log import readable_errors


def prepare(
    layout: Layout, archives: Sequence[Path], directory: Path, *, join_validation: bool = False, pack: bool = False
) -> dict:
    """Makes a dataset's folder from its official archives.

    Args:
        layout: the dataset, one of `LAYOUTS`.
        archives: the downloaded files, in any order.
        directory: the folder to make; it may exist if it is empty.
        join_validation: put the official validation images into the training set, as much published work does.
        pack: write an ArrayRecord file a split instead of folders.

    Returns:
        The number of images of each split.

    Raises:
        DatasetError: an archive is damaged, missing or of another dataset, or `directory` is not empty; nothing is
            left behind.
        OSError: a file cannot be read or written; what was done so far stays in `directory`.partial for another try.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise DatasetError(f"{directory} is not an empty folder; name another one, or remove it")
    if pack and not layout.num_classes:
        raise DatasetError(f"{layout.title} has label maps, which are not packed (--pack)")
    partial = directory.with_name(f"{directory.name}.partial")
    # Another try may have been for something else.
    work = partial / (layout.title + ", joined" * join_validation + ", packed" * pack)
    plan = work / "plan.json"
    try:
        if not plan.exists():
            for archive in sorted(archives, key=lambda path: path.stat().st_size):  # damage to small ones shows early
                _stage(layout, archive, work)
            items = _checked(layout, Staged(work / "staged", layout.archives), join_validation)
            replace_file(plan, json.dumps(items).encode())
        items = [Item(*item) for item in json.loads(plan.read_bytes())]
        (_pack if pack else _arrange)(items, work)
    except DatasetError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.replace(work / "whole", directory)
    shutil.rmtree(partial, ignore_errors=True)
    return dict(Counter(item.split for item in items if not item.target.startswith("annotations/")))


def _stage(layout: Layout, path: Path, work: Path) -> None:
    """Copies the files that are needed out of an archive, except those that an earlier try has copied."""
    state = path.stat()
    finished = work / f"{path.name}.{state.st_size}.{state.st_mtime_ns}.finished"
    if finished.exists():
        return
    staged, archive, found = work / "staged", Archive(path), 0

    def wanted(name: str, size: int) -> bool:
        nonlocal found
        target = layout.staged_name(name)
        found += target is not None
        return target is not None and not ((staged / target).is_file() and (staged / target).stat().st_size == size)

    with _progress(archive) as show:
        for name, content in archive.read(wanted):
            target = staged / layout.staged_name(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(target, content)
            show(found)
    if not found:
        raise DatasetError(f"{path}: nothing in it belongs to {layout.title}; needed are {layout.archives}")
    replace_file(finished, b"")


def _checked(layout: Layout, staged: Staged, join_validation: bool) -> list[Item]:
    """The files of the prepared dataset; raises DatasetError unless they are all there and as many as published."""
    try:
        items = list(layout.plan(staged))
    except DatasetError:
        raise
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DatasetError(f"the lists of {layout.title} are not as expected ({error}); download them again") from None
    if missing := [item.source for item in items if item.source not in staged.names]:
        raise DatasetError(
            f"{len(missing)} of {len(items)} files of {layout.title} are not in the archives, first {missing[0]!r}; "
            f"needed, whole, are {layout.archives}"
        )
    if len({item.source for item in items}) < len(items):
        raise DatasetError(f"the lists of {layout.title} name an image twice; download them again")
    for split, size in layout.sizes.items():
        of_split = [item for item in items if item.split == split]
        count = len(of_split) if layout.num_classes else len(of_split) // 2
        classes = len({item.target.split("/")[1] for item in of_split}) if layout.num_classes else 0
        if (count, classes) != (size, layout.num_classes):
            raise DatasetError(
                f"the archives hold {count} {split} images of {classes} classes, but {layout.title} has {size} of "
                f"{layout.num_classes}; they are incomplete or of another dataset"
            )
    if not join_validation:
        return items
    if not {"val", "test"} <= layout.sizes.keys():
        raise DatasetError(f"{layout.title} has no validation split beside its test split (--join_validation)")
    return [_in_training(item) if item.split == "val" else item for item in items]


def _in_training(item: Item) -> Item:
    parts = item.target.split("/")
    parts[parts.index("val")] = "train"
    return Item("train", item.source, "/".join(parts))


def _arrange(items: Sequence[Item], work: Path) -> None:
    """Moves the staged files to their places, except those that an earlier try has moved."""
    for item in items:
        source, target = work / "staged" / item.source, work / "whole" / item.target
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.exists():
            os.replace(source, target)
        if not target.stat().st_size:
            raise _empty(item)


def _pack(items: Sequence[Item], work: Path) -> None:
    """Writes the staged files into one ArrayRecord file a split, in the order of their folders."""
    whole = work / "whole"
    whole.mkdir(exist_ok=True)

    def images(split: str) -> Iterator[tuple[str, str, bytes]]:
        chosen = [(item.target.split("/")[1:], item) for item in items if item.target.split("/")[0] == split]
        for (label, file), item in sorted(chosen):
            content = (work / "staged" / item.source).read_bytes()
            if not content:
                raise _empty(item)
            yield f"{label}/{file}", label, content

    for split in {item.target.split("/")[0] for item in items}:
        array_record.write(whole / f"{split}{array_record.SUFFIX}", images(split))


def _empty(item: Item) -> DatasetError:
    return DatasetError(f"{item.source} is empty; download the archives again")


@contextlib.contextmanager
def _progress(archive: Archive) -> Iterator[Callable[[int], None]]:
    """Yields a function that shows how far an archive has been read, on a terminal and at most five times a second."""
    last = 0.0

    def show(count: int) -> None:
        nonlocal last
        if sys.stderr.isatty() and time.monotonic() > last + 0.2:
            last = time.monotonic()
            print(
                f"\r{archive.path.name}  {archive.progress:4.0%}  {count:,} files ", end="", file=sys.stderr, flush=True
            )

    try:
        yield show
    finally:
        if last:
            print(file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vimd_jax.data.prepare",
        description="Makes the folder of a dataset from its official archives.",
        epilog="needed are:\n" + "\n".join(f"  {name:9} {layout.archives}" for name, layout in LAYOUTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=LAYOUTS, metavar="NAME", help=f"one of {', '.join(LAYOUTS)}")
    parser.add_argument(
        "archives", nargs="+", type=parse_path, metavar="ARCHIVE", help="the downloaded files, in any order"
    )
    parser.add_argument("directory", type=parse_path, metavar="DIRECTORY", help="the folder to make")
    parser.add_argument(
        "--join_validation",
        action="store_true",
        help="put the official validation images into train/, as much published work on flowers and aircraft does",
    )
    parser.add_argument(
        "--pack",
        action="store_true",
        help="write one ArrayRecord file a split instead of folders, for large sets on slow drives",
    )
    return parser.parse_args()


def main() -> None:
    """Prepares the dataset named on the command line."""
    arguments = parse_arguments()
    layout = LAYOUTS[arguments.name]
    with readable_errors():
        try:
            options = {"join_validation": arguments.join_validation, "pack": arguments.pack}
            sizes = prepare(layout, arguments.archives, arguments.directory, **options)
        except KeyboardInterrupt:
            print("\nstopped; the same command continues", file=sys.stderr)
            sys.exit(130)
        counts = ", ".join(f"{count:,} {split}" for split, count in sizes.items())
        print(f"{arguments.directory}: {layout.title}, {counts} images")


if __name__ == "__main__":
    main()
