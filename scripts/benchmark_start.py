"""Times the start of a student: import, load and first prediction, each time in a new process.

    python scripts/benchmark_start.py

The first process compiles, into a cache of its own; the others find its programs. Times are seconds on the clock, and
the last column, of use on a busy machine, seconds of a core. With `--network`, another classifier than the student.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from vimd_jax.checkpoints.format import save_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.models import create_model
from vimd_jax.models.network import input_images

PROCESS = """
import sys, time
began = time.perf_counter()
from vimd_jax import load_model
imported = time.perf_counter()
network = load_model(sys.argv[1])
loaded = time.perf_counter()
network.warm_up([1])
done = time.perf_counter()
times = imported - began, loaded - imported, done - loaded, done - began, time.process_time()
print(*(f"{seconds:6.2f}" for seconds in times))
"""


def main() -> None:
    """Prints a line for each process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="srvm_tiny", help="default: srvm_tiny, the student")
    parser.add_argument("--processes", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save(arguments.network, Path(folder, "network"))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        environment["XDG_CACHE_HOME"] = folder
        subprocess.run([sys.executable, "-m", "kernels.build"], env=environment, check=True, stdout=subprocess.DEVNULL)
        print("import   load  first  total  seconds of a core")
        for _ in range(arguments.processes):
            subprocess.run([sys.executable, "-c", PROCESS, f"{folder}/network"], env=environment, check=True)


def save(name: str, folder: Path) -> None:
    """Writes the network with random weights."""
    model = create_model(name)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros(input_images(model).shape, np.float32))
    classes = tuple(f"class {i}" for i in range(model.num_classes))
    low = model.input_size if name == "srvm_tiny" else 0
    save_model(folder, TrainedModel(model, jax.tree.map(np.asarray, variables), classes, low))


if __name__ == "__main__":
    main()
