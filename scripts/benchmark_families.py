"""Measures inference of every classifier against Vim-tiny, and against the time predicted from its operations.

    python scripts/benchmark_families.py [PATTERN …] [--repeats 7]

The input is one image of the network's own size, the output a Markdown table. The two networks of a line run
alternately, so that a busy machine slows both equally. "predicted" is Vim-tiny's time multiplied by the ratio of
operations (see model_table.py): the last column is the slowdown against a network that performs its operations as fast
as Vim-tiny. Weights are random.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from benchmark_scan import positive
from model_table import count_operations, listed

from vimd_jax.models import create_model
from vimd_jax.models.network import input_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", default=["*"], metavar="PATTERN", help="names, such as 'vim_*'")
    parser.add_argument("--repeats", type=positive, default=7)
    arguments = parser.parse_args()
    print("| network | operations, 10⁹ | ms | times Vim-tiny | times predicted |\n|---|---:|---:|---:|---:|")
    standard, standard_operations = compiled("vim_tiny")
    for name in listed(arguments.patterns):
        program, operations = compiled(name)
        seconds = [(timed(program), timed(standard)) for _ in range(arguments.repeats + 1)][1:]
        own, others = (statistics.median(column) for column in zip(*seconds))
        predicted = others * operations / standard_operations
        print(
            f"| `{name}` | {operations / 1e9:.2f} | {1e3 * own:.0f} | {own / others:.1f} | {own / predicted:.2f} |",
            flush=True,
        )


def compiled(name: str) -> tuple[Callable[[], jax.Array], int]:
    """A network's compiled inference on one image, and its number of operations."""
    model = create_model(name)
    images = jnp.full(input_images(model).shape, 0.5)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    program = jax.jit(model.apply).lower(variables, images).compile()
    return lambda: program(variables, images), count_operations(model).total


def timed(program: Callable[[], jax.Array]) -> float:
    """Seconds of one run."""
    began = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
