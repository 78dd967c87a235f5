"""Images per second that the input pipeline delivers, by kind of data and number of worker processes.

    python scripts/benchmark_input.py [--seconds 5] [--workers 0 1 2] [--json FILE]

The settings are those of the experiments: the ViMD datasets (500x375 JPEGs, 224 and 56 pixel views, batches of 16) and
the quickstart (synthetic birds, 64 and 16 pixel views, batches of 32, after the first epoch, in which they are drawn).
A training step waits for its images only if it takes less than batch_size / rate seconds.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vimd_jax.data.pipeline import train_batches
from vimd_jax.data.sources import load_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="measuring time per row, after a warm-up (default 5)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of worker processes")
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder))
        settings = {
            "folder of JPEGs, 224/56 px": (dataset_config(name="folder", directory=folder), 16),
            "synthetic birds, 64/16 px": (dataset_config(name="synthetic", high=64, low=16), 32),
        }
        print(f"{os.cpu_count()} CPU cores\n{'data':<28}{'workers':>8}{'images/s':>12}{'ms/batch':>10}{'start s':>9}")
        for name, (config, batch_size) in settings.items():
            for workers in arguments.workers:
                config.num_workers = workers
                rate, start = measure(config, batch_size, arguments.seconds)
                print(f"{name:<28}{workers:>8}{rate:>12.0f}{1000 * batch_size / rate:>10.1f}{start:>9.2f}", flush=True)
                rows.append({"data": name, "workers": workers, "images_per_second": rate, "start_seconds": start})
    if arguments.json:
        arguments.json.write_text(json.dumps({"cpu_cores": os.cpu_count(), "rows": rows}, indent=1))


def measure(config: ConfigDict, batch_size: int, seconds: float) -> tuple[float, float]:
    """Images per second when batches are taken as fast as they come, and the seconds until the first batch."""
    source = load_source(config, "train")
    began = time.perf_counter()
    batches = train_batches(source, config, batch_size=batch_size, seed=0)
    next(batches)
    start = time.perf_counter() - began
    for _ in range(len(source) // batch_size):
        next(batches)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        count += len(next(batches)["label"])
    rate = count / (time.perf_counter() - began)
    batches.close()
    return rate, start


def dataset_config(name: str, directory: str = "", high: int = 224, low: int = 56) -> ConfigDict:
    """The fields of `config.dataset` that the pipeline reads."""
    return ConfigDict(
        {
            "name": name,
            "directory": directory,
            "num_classes": 0,
            "high_resolution": high,
            "low_resolution": low,
            "validation_fraction": 0.0,
            "crop_scale": (0.08, 1.0),
            "flip": True,
            "repeats": 1,
            "on_error": "stop",
            "num_workers": 0,
            "synthetic_classes": 8,
            "synthetic_train_size": 500,
            "synthetic_test_size": 10,
        }
    )


def write_photographs(folder: Path, classes: int = 4, each: int = 50) -> None:
    """JPEGs of noise at several scales, with about as much detail, and thus decoding cost, as photographs."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(classes):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(each if split == "train" else 1):
                pixels = sum(np.asarray(noise(side, rng)) for side in (2, 12, 70))
                Image.fromarray(pixels).save(folder / split / str(label) / f"{i}.jpg", quality=90)


def noise(side: int, rng: np.random.Generator) -> Image.Image:
    """A grid of random colours, `side` cells high, as a 500x375 image."""
    return Image.fromarray(rng.integers(0, 70, (side * 3, side * 4, 3), np.uint8)).resize((500, 375))


if __name__ == "__main__":
    main()
