"""Measures time and memory to convert a file of Vim-base's size with its optimizer state (1.6 GB), generated first.

python scripts/benchmark_convert.py [--folder DIR]
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch_writer  # noqa: E402

from vimd_jax.models import create_model  # noqa: E402
from weight_convert.mapping import plan  # noqa: E402


def write_file(path: Path) -> None:
    """Writes what training of Vim-base saves: weights, their average, and two moments of each."""
    random = np.random.default_rng(0)
    model = {entry.source: random.random(entry.shape, np.float32) for entry in plan(create_model("vim_base"))}
    moments = {
        i: {"step": i, "exp_avg": tensor.view(), "exp_avg_sq": tensor.view()} for i, tensor in enumerate(model.values())
    }
    average = {name: tensor.view() for name, tensor in model.items()}
    args = argparse.Namespace(model="vim_base", lr=1e-3)
    content = {"model": model, "optimizer": {"state": moments}, "model_ema": average, "scaler": "none", "args": args}
    torch_writer.save(path, content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", help="where to write the file and its conversion; default: a temporary folder")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        file, output = Path(folder) / "vim_base.pth", Path(folder) / "converted"
        write_file(file)
        command = [sys.executable, "-m", "weight_convert.convert", "--model", "vim_base", "--checkpoint", str(file)]
        start = time.perf_counter()
        subprocess.run([*command, "--output", str(output)], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        print(f"file {file.stat().st_size / 1e9:.2f} GB, written {written / 1e9:.2f} GB")
        print(f"converted in {seconds:.1f} s, peak memory {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
