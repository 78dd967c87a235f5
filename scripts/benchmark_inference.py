"""Measures inference of named networks on images of 224 pixels, so that two commits can be compared.

    python scripts/compare_commits.py ../before -- "$PWD/scripts/benchmark_inference.py" vmamba_tiny v2m_tiny --batch 8

Given with its whole path, this file runs in both checkouts, whatever the other one has. A time is the shortest of all
repeats. Weights are random.
"""

import argparse
import json
import time
from pathlib import Path

import jax

from vimd_jax.models import create_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+", metavar="NAME", help="such as vim_tiny")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="file for the times")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.networks:
        seconds = shortest(name, arguments.batch, arguments.repeats)
        rows.append(dict(network=name, batch=arguments.batch, seconds=seconds))
        print(f"{name}, batch {arguments.batch}: {1e3 * seconds:.1f} ms", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(dict(rows=rows)))


def shortest(name: str, batch: int, repeats: int) -> float:
    """Seconds of the fastest of several runs on random images."""
    model = create_model(name)
    images = jax.random.uniform(jax.random.key(0), (batch, 224, 224, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    program = jax.jit(model.apply).lower(variables, images).compile()
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(program(variables, images))
        times.append(time.perf_counter() - began)
    return min(times[1:])


if __name__ == "__main__":
    main()
