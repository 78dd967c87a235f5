"""Compares exported programs with this library: time, memory, start-up, size, and the error of rounded weights.

    python scripts/benchmark_export.py --checkpoint workdir/student [--images 500]
    python scripts/benchmark_export.py --model srvm_tiny
    python scripts/benchmark_export.py --turns workdir/student exported/student.onnx

With --checkpoint, a run's workdir, the images are the test images of its config, and the table includes top-1. With
--model, the network has 200 classes, random weights and random images, and only times are meaningful. Every row runs in
its own process, which imports only what it needs. "start" is the time to load the program and get the first answer,
with compilation, "ms" the least for one image after that, "cpu ms" the same as processor time of all threads, for a
machine that others use too, "memory" the peak of the process, "off" the largest difference of a probability from the
first row. With --turns, a network and its exported program take turns in one process, for the ratio of their times on a
machine that others use too. `taskset -c 0` before the command measures one thread. Needs Linux.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

OURS = ("native", "sequential")
FORMATS = ("stablehlo", "onnx")
WEIGHTS = ("float32", "bfloat16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="workdir of a classifier or student")
    source.add_argument("--model", help="architecture, with random weights")
    source.add_argument("--row", nargs=4, help=argparse.SUPPRESS)  # in its own process: kind, file, images, answers
    source.add_argument("--turns", nargs=2, metavar=("NETWORK", "PROGRAM"), help="workdir, and .onnx or .stablehlo")
    parser.add_argument("--images", type=int, default=500, help="number of test images for top-1 (default 500)")
    parser.add_argument("--weights", nargs="*", default=WEIGHTS, choices=WEIGHTS)
    parser.add_argument("--repeats", type=int, default=10, help="timed runs on one image (default 10)")
    parser.add_argument("--json", type=Path, help="also write everything here")
    options = parser.parse_args()
    if options.row:
        measure(*options.row, options.repeats)
        return
    if options.turns:
        take_turns(*options.turns, options.repeats)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = benchmark(options, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def benchmark(options: argparse.Namespace, folder: Path) -> list[dict]:
    """Prints and returns the rows of the table."""
    from vimd_jax import export
    from vimd_jax.checkpoints.format import read_model, save_model

    trained = read_model(options.checkpoint) if options.checkpoint else random_network(options.model)
    if options.checkpoint:
        images, targets = test_images(options.checkpoint, trained, options.images)
    else:
        images, targets = random_images(trained, 4), None
    save_model(folder / "network", trained)
    np.save(folder / "images.npy", images)
    size = sum(path.stat().st_size for path in (folder / "network").iterdir())
    rows = [(kind, "float32", folder / "network", size) for kind in OURS]
    for kind in FORMATS:
        for weights in options.weights:
            file = folder / f"{weights}.{kind}"
            file.write_bytes({"stablehlo": export.to_stablehlo, "onnx": export.to_onnx}[kind](trained, weights))
            rows.append((kind, weights, file, file.stat().st_size))
    heads = zip(("ms", "cpu ms", "start s", "memory MB", "size MB", "off", "top-1"), (8, 8, 9, 11, 9, 10, 8))
    print(f"{'':<12}{'weights':<10}" + "".join(f"{head:>{width}}" for head, width in heads))
    table, first = [], None
    for kind, weights, file, size in rows:
        row = {"program": kind, "weights": weights, "size_mb": size / 1e6}
        arguments = ["--row", kind, file, folder / "images.npy", folder / "answers.npy", "--repeats", options.repeats]
        command = [sys.executable, __file__, *map(str, arguments)]
        row |= json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        answers = np.load(folder / "answers.npy")
        first = answers if first is None else first
        row["off"] = float(np.abs(answers - first).max())
        if targets is not None:
            row["top1"] = 100 * float(np.mean(answers.argmax(1) == targets))
        print(
            f"{kind:<12}{weights:<10}{row['ms']:>8.1f}{row['cpu_ms']:>8.1f}{row['start_s']:>9.2f}{row['memory_mb']:>11.0f}"
            f"{row['size_mb']:>9.1f}{row['off']:>10.1e}{row.get('top1', float('nan')):>8.1f}",
            flush=True,
        )
        table.append(row)
    return table


def measure(kind: str, file: str, images: str, answers: str, repeats: int) -> None:
    """Runs one program, prints the measurements as JSON, and writes the answers."""
    pictures = np.load(images)
    began = time.perf_counter()
    program = {"stablehlo": load_stablehlo, "onnx": load_onnx}.get(kind, load_ours)(file, kind)
    program(pictures[:1])
    start, seconds, cpu = time.perf_counter() - began, [], []
    for _ in range(repeats):
        began, worked = time.perf_counter(), time.process_time()
        program(pictures[:1])
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - worked)
    np.save(answers, np.concatenate([program(pictures[i : i + 1]) for i in range(len(pictures))]))
    times = {"ms": 1e3 * min(seconds), "cpu_ms": 1e3 * min(cpu), "start_s": start}
    print(json.dumps(times | {"memory_mb": peak_memory()}))


def take_turns(network: str, file: str, repeats: int) -> None:
    """Prints the least times of a network here and of its exported program for one image, and their ratio."""
    from vimd_jax import load_model

    image = random_images(load_model(network), 1)
    exported = load_onnx if file.endswith(".onnx") else load_stablehlo
    programs = load_ours(network, "native"), exported(file, "")
    answers = [program(image) for program in programs]
    wall, cpu = np.zeros((2, 2, repeats))
    for i in range(repeats):
        for k, program in enumerate(programs):
            began, worked = time.perf_counter(), time.process_time()
            program(image)
            wall[k, i], cpu[k, i] = time.perf_counter() - began, time.process_time() - worked
    for name, seconds in (("ms", wall), ("cpu ms", cpu)):
        ours, theirs = 1e3 * seconds.min(axis=1)
        print(f"{name:<8}here {ours:.1f}, exported {theirs:.1f}: {theirs / ours:.2f} times")
    threads, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"off {np.abs(answers[0] - answers[1]).max():.1e}, {threads} threads, load {load:.1f}")


def peak_memory() -> float:
    """Peak memory of this process in MB, from Linux; `getrusage` would include the program that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def load_ours(folder: str, scan: str) -> Callable[[np.ndarray], np.ndarray]:
    import kernels
    from vimd_jax import load_model

    trained = load_model(folder)

    def program(images):
        with kernels.use(scan=scan):
            return trained.probabilities(images)

    return program


def load_stablehlo(file: str, _: str) -> Callable[[np.ndarray], np.ndarray]:
    import jax
    from jax import export

    program = jax.jit(export.deserialize(bytearray(Path(file).read_bytes())).call)
    return lambda images: np.asarray(program(images))


def load_onnx(file: str, _: str) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Threads that wait in a loop would count as work, and take the cores from others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = len(os.sched_getaffinity(0))  # as JAX counts them
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def test_images(workdir: Path, trained, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Test images of a run, spread over its test set, as its network reads them, and their classes."""
    from ml_collections import ConfigDict

    from vimd_jax.data.sources import load_source

    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    source = load_source(config.dataset, "test", seed=config.seed)
    chosen = np.linspace(0, len(source) - 1, min(most, len(source))).astype(int)
    records = [source.read(int(i)) for i in chosen]
    images = np.stack([trained.prepare(record.image, downsample=True) for record in records])
    return images, np.array([record.target for record in records])


def random_network(name: str) -> Any:
    """A network of 200 classes with the weights that training starts from."""
    import jax
    import jax.numpy as jnp

    from vimd_jax.checkpoints.trained_model import TrainedModel
    from vimd_jax.models import create_model
    from vimd_jax.models.network import input_images

    model = create_model(name, num_classes=200)
    images = input_images(model)
    variables = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0), jnp.zeros(images.shape)))
    low = model.input_size[0] if model.input_size[0] != model.image_size else 0
    return TrainedModel(model, variables, tuple(map(str, range(200))), low)


def random_images(trained, count: int) -> np.ndarray:
    height, width = trained.view.low_resolution or trained.view.size
    return np.random.default_rng(0).random((count, height, width, 3), np.float32)


if __name__ == "__main__":
    main()
