"""Measures the input pipeline: each step on one core, and images per second by number of worker processes.

    python scripts/benchmark_input.py [--directory DIR] [--size 500 375] [--rounds 5] [--workers 0 1 2]
                                      [--gpu_images_per_second 1000] [--array_record]

The first table processes images one by one: Pillow decoding alone, the views of a batch, and augmentation. "of
decoding" is the speed relative to decoding alone. "cores" is the number of cores that keep a GPU busy at the given
training speed. The second table compares the pipeline, delivering batches of 224-pixel views, with the same number of
processes that only decode with Pillow, and with the same number that decode, crop, resize and flip with Pillow. With
--array_record, a third one compares reading the files of the folder, in random order and without decoding, with reading
them from an ArrayRecord file.

Rows are measured alternately, `--rounds` times, and the median is reported, so that ratios are reliable on a shared
machine. DIR holds train/<class>/*.jpg; without it, JPEGs are generated from noise, with about as much detail as
photographs.
"""

import argparse
import io
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from ml_collections import ConfigDict
from PIL import Image, features

from vimd_jax.config import default_config
from vimd_jax.data import array_record
from vimd_jax.data.augment import augment
from vimd_jax.data.geometry import draw_view, low_resolution_view
from vimd_jax.data.images import decode_image, find_images
from vimd_jax.data.pipeline import Drawing, train_batches
from vimd_jax.data.sources import load_source

CROP = ConfigDict({"high_resolution": 224, "crop_scale": (0.08, 1.0), "flip": True})
BATCH_SIZE = 32
PARALLEL_IMAGES = 640  # in a measurement of several processes
PREPARED = 16  # batches, more than a pipeline prepares ahead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="train/<class>/*.jpg (default: images of noise)")
    parser.add_argument("--images", type=int, default=200, help="number of images for the first table (default 200)")
    parser.add_argument("--rounds", type=int, default=5, help="how often every row is measured (default 5)")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2], help="numbers of worker processes")
    parser.add_argument("--gpu_images_per_second", type=float, default=1000, help="speed of training (default 1000)")
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), help="width and height of the images of noise")
    parser.add_argument("--array_record", action="store_true", help="also compare with packed images")
    parser.add_argument("--json", type=Path, help="also write the tables here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.directory is None:
            write_photographs(Path(folder), tuple(arguments.size))
        directory = arguments.directory or Path(folder)
        print(
            f"{os.cpu_count()} CPU cores, Pillow {version('pillow')}, "
            f"libjpeg-turbo {features.version('libjpeg_turbo')}, Grain {version('grain')}, NumPy {version('numpy')}"
        )
        tables = {
            "steps": time_steps(directory, arguments.images, arguments.rounds, arguments.gpu_images_per_second),
            "pipeline": time_pipeline(directory, arguments.rounds, arguments.workers),
        }
        if arguments.array_record:
            tables["array_record"] = time_packed(directory, Path(folder) / "packed", arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(tables, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# One image at a time


def time_steps(directory: Path, count: int, rounds: int, gpu_rate: float) -> list[dict]:
    """Prints and returns the images per second of one core, by steps of the pipeline."""
    paths = find_images([directory / "train"])
    chosen = np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int)
    files = [paths[i].read_bytes() for i in chosen]
    rand_augment = augmentation(rand_augment="rand-m9-mstd0.5-inc1")
    erasing = augmentation(rand_augment="rand-m9-mstd0.5-inc1", erasing_probability=0.25)
    three_augment = augmentation(three_augment=True, color_jitter=0.3)
    rows = {
        "Pillow decoding alone": pillow_decode,
        "upright RGB": lambda file, _: decode_image(io.BytesIO(file), "image"),
        "crop to 224 px, flip": view,
        "the same, reduced decoding": lambda file, i: view(file, i, reduced=True),
        "crop, flip, view of 56 px": lambda file, i: view(file, i, low=56),
        "crop, flip, RandAugment": lambda file, i: view(file, i, rand_augment),
        "crop, flip, RandAugment, erasing": lambda file, i: view(file, i, erasing),
        "crop, flip, 3-Augment, colour jitter": lambda file, i: view(file, i, three_augment),
    }
    seconds = in_turn({name: lambda step=step: one_by_one(step, files) for name, step in rows.items()}, rounds)
    width, height = np.mean([Image.open(io.BytesIO(file)).size for file in files], axis=0)
    kilobytes = np.mean([len(file) for file in files]) / 1000
    print(f"\n{len(files)} JPEGs of {width:.0f}x{height:.0f} pixels, {kilobytes:.0f} kB")
    print(f"{'one core':<38}{'images/s':>10}{'of decoding':>13}{f'cores for {gpu_rate:.0f}/s':>18}")
    table = []
    for name, taken in seconds.items():
        rate, share = len(files) / taken, seconds["Pillow decoding alone"] / taken
        print(f"{name:<38}{rate:>10.0f}{share:>12.0%}{gpu_rate / rate:>18.1f}")
        table.append({"step": name, "images_per_second": rate, "of_decoding": share, "cores": gpu_rate / rate})
    return table


def pillow_decode(file: bytes, _: int = 0) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


def augmentation(**changes: object) -> ConfigDict:
    """The default `config.dataset.augment` with these changes."""
    config = default_config("classifier").dataset.augment
    config.update(changes)
    return config


def view(
    file: bytes, i: int, augmentations: ConfigDict | None = None, reduced: bool = False, low: int = 0
) -> list[np.ndarray]:
    """The training views of an encoded image, as the pipeline makes them; the low-resolution one only if `low` > 0."""
    drawing = Drawing(CROP, (0, 1, i))
    image = decode_image(io.BytesIO(file), "image", drawing.reduction if reduced else None)
    high = (drawing.view or drawing.draw(image.size)).apply(image)
    high = augment(high, augmentations, drawing.rng) if augmentations else high
    return [np.asarray(high), *([np.asarray(low_resolution_view(high, low))] if low else [])]


def one_by_one(step: Callable, files: list[bytes]) -> float:
    began = time.perf_counter()
    for i, file in enumerate(files):
        step(file, i)
    return time.perf_counter() - began


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline


def time_pipeline(directory: Path, rounds: int, worker_counts: list[int]) -> list[dict]:
    """Prints and returns the images per second of the pipeline, and its speed relative to that of Pillow alone."""
    config = default_config("classifier").dataset
    config.update({"directory": str(directory), "validation_fraction": 0.0})
    source = load_source(config, "train")
    paths = [source.name(i) for i in range(len(source))]
    print(f"\n{'pipeline':<38}{'images/s':>10}{'of decoding':>13}{'of the same by Pillow':>23}")
    table = []
    for workers in worker_counts:
        processes = max(1, workers)
        with multiprocessing.get_context("spawn").Pool(processes) as pool, Pipeline(source, config, workers) as take:
            seconds = in_turn(
                {
                    "decoding": lambda: by_pool(pool, processes, decode_paths, paths),  # noqa: B023
                    "same": lambda: by_pool(pool, processes, view_paths, paths),  # noqa: B023
                    "pipeline": take,
                },
                rounds,
            )
        row = {"workers": workers, "images_per_second": PARALLEL_IMAGES / seconds["pipeline"]}
        row |= {f"of_{name}": seconds[name] / seconds["pipeline"] for name in ("decoding", "same")}
        name = f"{workers} worker process{'' if workers == 1 else 'es'}"
        print(
            f"{name:<38}{row['images_per_second']:>10.0f}{row['of_decoding']:>12.0%}{row['of_same']:>23.0%}", flush=True
        )
        table.append(row)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Packed images


def time_packed(directory: Path, packed: Path, rounds: int) -> dict[str, float]:
    """Prints and returns how many files a second are read in random order, of a folder and of an ArrayRecord file."""
    packed.mkdir()
    paths = find_images([directory / "train"])
    array_record.write(
        packed / "train.array_record", ((path.name, path.parent.name, path.read_bytes()) for path in paths)
    )
    records = ArrayRecordDataSource(str(packed / "train.array_record"))
    order = np.random.default_rng(0).integers(0, len(paths), PARALLEL_IMAGES)

    def files() -> None:
        for i in order:
            paths[i].read_bytes()

    def packed_files() -> None:
        for i in order:
            records[i]

    seconds = in_turn({"files": lambda: seconds_of(files), "records": lambda: seconds_of(packed_files)}, rounds)
    print(f"\n{f'{len(paths)} image files':<38}{'read a second':>14}")
    rates = {name: PARALLEL_IMAGES / taken for name, taken in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:<38}{rate:>14.0f}")
    return rates


def seconds_of(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# ---------------------------------------------------------------------------------------------------------------------
# What the measurements share


class Pipeline:
    """A running pipeline; a call consumes `PARALLEL_IMAGES` images and returns the seconds."""

    def __init__(self, source: object, config: ConfigDict, workers: int):
        config = config.copy_and_resolve_references()
        config.num_workers = workers
        self._batches: Iterator = train_batches(source, config, batch_size=BATCH_SIZE, seed=0, views=("high",))

    def __enter__(self) -> Callable[[], float]:
        self()
        return self

    def __call__(self) -> float:
        for _ in range(PREPARED):  # those prepared while other rows were measured
            next(self._batches)
        began = time.perf_counter()
        for _ in range(PARALLEL_IMAGES // BATCH_SIZE):
            next(self._batches)
        return time.perf_counter() - began

    def __exit__(self, *_: object) -> None:
        self._batches.close()


def by_pool(pool: multiprocessing.pool.Pool, processes: int, work: Callable, paths: list[str]) -> float:
    """Seconds that a pool of processes takes for `PARALLEL_IMAGES` images."""
    chosen = [paths[i % len(paths)] for i in np.random.default_rng(0).permutation(PARALLEL_IMAGES)]
    shares = [chosen[i::processes] for i in range(processes)]
    began = time.perf_counter()
    pool.map(work, shares, chunksize=1)
    return time.perf_counter() - began


def decode_paths(paths: list[str]) -> None:
    for path in paths:
        with open(path, "rb") as file:
            Image.open(file).load()


def view_paths(paths: list[str]) -> None:
    """Decodes, crops, resizes and flips with Pillow alone, with the crops of training."""
    for i, path in enumerate(paths):
        with open(path, "rb") as file:
            image = Image.open(file)
            image.load()
        rng = np.random.default_rng(i)
        np.asarray(draw_view(image.size, 224, rng, crop_scale=(0.08, 1.0), flip=True).apply(image))


def in_turn(rows: dict[Callable[[], float]], rounds: int) -> dict[float]:
    """Calls every row once per round, after a warm-up round, and returns the median result of each."""
    results = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, row in rows.items():
            seconds = row()
            if number:
                results[name].append(seconds)
    return {name: float(np.median(values)) for name, values in results.items()}


def write_photographs(folder: Path, size: tuple[int, int], classes: int = 4, each: int = 50) -> None:
    """Writes JPEGs of noise at several scales, with about the detail, and so the decoding cost, of photographs."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(classes):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(each if split == "train" else 1):
                pixels = sum(np.asarray(noise(side, size, rng)) for side in (2, 12, 70))
                Image.fromarray(pixels).save(folder / split / str(label) / f"{i}.jpg", quality=90)


def noise(side: int, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A grid of random colours, `side` cells high, as an image of this size."""
    return Image.fromarray(rng.integers(0, 70, (side * 3, side * 4, 3), np.uint8)).resize(size)


if __name__ == "__main__":
    main()
