"""The benchmark of the scan measures what it says."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp

from kernels.scan.shapes import Shape

_spec = importlib.util.spec_from_file_location(
    "benchmark_scan", Path(__file__).parents[2] / "scripts/benchmark_scan.py"
)
benchmark_scan = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark_scan)


def test_a_row_for_every_implementation():
    rates = {"bytes": 1e9, "exponentials": 1e9}
    names = ["sequential", "associative"]
    rows = benchmark_scan.measure(Shape(40, 8, 4, groups=2), 2, jnp.float32, names, repeats=1, rates=rates)
    assert [row["implementation"] for row in rows] == names
    states, long = 2 * 40 * 8 * 4, 2 * 40 * 8 * 4  # numbers; bytes of a (batch, length, channels) array
    for kind, exponentials in (("forward", states), ("both", 2 * states)):
        assert min(row[kind]["faster"] for row in rows) == 1
        for row in rows:
            # at these rates the bytes take longer: u, delta, z, y and half as much for each of B and C, A, D and a bias
            inputs = 3 * long + 2 * long + 4 * (8 * 4 + 8 + 8)
            moved = inputs + long if kind == "forward" else 3 * inputs + 2 * long
            assert abs(row[kind]["floor"] * row[kind]["milliseconds"] - 1e3 * max(moved, exponentials) / 1e9) < 1e-9
            assert row[kind]["memory_fraction"] == row[kind]["memory"] / (4 * states)
        assert rows[1][kind]["memory_fraction"] > 1 > rows[0]["forward"]["memory_fraction"]
    assert len(benchmark_scan.format_row(rows[0])) == 11 + 2 * 4 * 8
