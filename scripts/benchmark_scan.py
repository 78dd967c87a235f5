"""Times every implementation of the selective scan on the shapes of real models, side by side.

    python scripts/benchmark_scan.py [--shapes vim_tiny_stride8 ...] [--batch 1 8] [--implementations native ...]
                                     [--dtype float32] [--repeats 9] [--json FILE]

Each line gives, for the forward pass and for forward and backward together: the median time; the speed-up over the
slowest implementation of the same problem; the floor as a share of the time; and the memory used beyond inputs and
outputs, by XLA's estimate, as a fraction of all states in float32. Implementations run alternately, so that a busy
machine slows all of them equally, each after a warm-up. `--large` instead checks the fastest implementation on arrays
of more than 2 GB each.

The floor is the larger of two times, at rates measured first: to move each input and output once (twice the inputs for
a backward pass), as fast as a plain program changes as many bytes in place, possibly in a cache; and to compute one
exponential per state (two with a backward pass), with the device's exp2 or with nine multiply-adds, whichever is
faster.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from kernels import selective_scan
from kernels.scan.api import IMPLEMENTATIONS
from kernels.scan.inputs import ScanInputs
from kernels.scan.shapes import BATCH_SIZES, SHAPES, Shape


def main() -> None:
    parser, names = argparse.ArgumentParser(description=__doc__.splitlines()[0]), IMPLEMENTATIONS.names
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--batch", nargs="+", type=positive, default=list(BATCH_SIZES))
    parser.add_argument("--implementations", nargs="+", default=list(names), choices=names)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--json", type=Path, help="also write everything here")
    parser.add_argument("--large", action="store_true", help="check arrays of 2 GB instead; takes 14 GB of memory")
    arguments = parser.parse_args()
    if arguments.large:
        check_large()
        return

    exponentials = measure_exponentials()
    print(f"{jax.devices()[0].device_kind}, {exponentials / 1e9:.1f} G exp/s")
    implementations = available(arguments.implementations)
    if not implementations:
        parser.exit(1, "error: none of these implementations can run here\n")
    print(f"{'':<41}{'forward':^32}{'forward and backward':^32}")
    columns = "".join(f"{title:>8}" for title in ("ms", "faster", "floor", "memory"))
    print(f"{'shape':<25}{'batch':>5} {'':<10}{columns}{columns}")
    rows = []
    for name in arguments.shapes:
        for batch in arguments.batch:
            dtype = jnp.dtype(arguments.dtype)
            rates = {"bytes": measure_bytes(SHAPES[name], batch, dtype), "exponentials": exponentials}
            for row in measure(SHAPES[name], batch, dtype, implementations, arguments.repeats, rates):
                print(f"{name:<25}{batch:>5} {format_row(row)}", flush=True)
                rows.append({"shape": name, "batch": batch, "dtype": arguments.dtype, "rates": rates, **row})
    if arguments.json:
        device = jax.devices()[0].device_kind
        arguments.json.write_text(json.dumps({"device": device, "rows": rows}, indent=1))


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def available(names: list[str]) -> list[str]:
    """The implementations that can run here; prints for each other one why it cannot."""
    inputs = ScanInputs(**make_inputs(Shape(1, 1, 1), 1, jnp.float32))
    reasons = {name: IMPLEMENTATIONS.why_unavailable(name, inputs) for name in names}
    for name, reason in reasons.items():
        if reason:
            print(f"{name}: {reason}")
    return [name for name in names if reasons[name] is None]


def measure(shape: Shape, batch: int, dtype, implementations: list[str], repeats: int, rates: dict) -> list[dict]:
    """One row per implementation: milliseconds, ratio, share of the floor and memory of both passes."""
    inputs = make_inputs(shape, batch, dtype)
    weights = jnp.ones_like(inputs["u"])
    passes = {"forward": forward, "both": forward_and_backward}
    compiled = {
        (name, kind): jax.jit(function, static_argnums=2).lower(inputs, weights, name).compile()
        for name in implementations
        for kind, function in passes.items()
    }
    times = {key: [] for key in compiled}
    for _ in range(repeats):
        for key, program in compiled.items():
            settled = time.perf_counter() + 0.1
            while time.perf_counter() < settled:  # the first calls after another program allocate memory
                jax.block_until_ready(program(inputs, weights))
            began = time.perf_counter()
            jax.block_until_ready(program(inputs, weights))
            times[key].append(1e3 * (time.perf_counter() - began))
    milliseconds = {key: statistics.median(values) for key, values in times.items()}
    states = batch * shape.length * shape.channels * shape.state
    rows = []
    for name in implementations:
        row = {"implementation": name}
        for kind, passes_over_inputs in (("forward", 1), ("both", 2)):
            spent = milliseconds[name, kind]
            memory = compiled[name, kind].memory_analysis().temp_size_in_bytes
            moved = passes_over_inputs * size_of(inputs) + (weights.nbytes if kind == "forward" else 2 * weights.nbytes)
            moved += size_of(inputs) if kind == "both" else 0
            floor = 1e3 * max(moved / rates["bytes"], passes_over_inputs * states / rates["exponentials"])
            row[kind] = {
                "milliseconds": spent,
                "fastest": min(times[name, kind]),
                "faster": max(milliseconds[other, kind] for other in implementations) / spent,
                "floor": floor / spent,
                "memory": memory,
                "memory_fraction": memory / (4 * states),
            }
        rows.append(row)
    return rows


def forward(inputs: dict, weights: jax.Array, implementation: str) -> jax.Array:
    """Returns y; ignores `weights`."""
    return selective_scan(**inputs, delta_softplus=True, implementation=implementation)


def forward_and_backward(inputs: dict, weights: jax.Array, implementation: str) -> tuple[jax.Array, dict]:
    """Returns y and the gradients of <weights, y>."""
    y, pullback = jax.vjp(lambda x: forward(x, weights, implementation), inputs)
    return y, pullback(weights)[0]


def check_large() -> None:
    """Runs a batch whose arrays exceed 2 GB and compares its last sequence with the same sequence alone."""
    shape, batch = SHAPES["vim_base_stride8"], 480
    inputs = make_inputs(shape._replace(length=1), 1, jnp.float32)
    inputs |= {name: jnp.zeros((batch, shape.length, shape.state)) + inputs[name][0] for name in "BC"}
    long = jnp.zeros((batch, shape.length, shape.channels)) + jnp.linspace(0.1, 1.0, batch)[:, None, None]

    @jax.jit
    def results(long, matrices):
        def y(u, delta, matrices):
            parameters = {name: inputs[name] for name in ("A", "D", "delta_bias")}
            return selective_scan(u=u, delta=delta, **matrices, **parameters, delta_softplus=True)

        value, pullback = jax.vjp(y, long, long, matrices)
        return value, pullback(value)

    matrices = {name: inputs[name] for name in "BC"}
    last = results(long[-1:], jax.tree.map(lambda x: x[-1:], matrices))
    whole = results(long, matrices)
    for x, expected in zip(jax.tree.leaves(whole), jax.tree.leaves(last)):
        assert jnp.allclose(x[-1:], expected, rtol=1e-5, atol=1e-5 * jnp.abs(expected).max())
    name = IMPLEMENTATIONS.choose(ScanInputs(**inputs | matrices, u=long))
    print(f"{name}: {long.nbytes / 1e9:.1f} GB for each long array, forward and backward passes are correct")


def make_inputs(shape: Shape, batch: int, dtype) -> dict[str, jax.Array]:
    """Random inputs with the step sizes and decays of an initialised Mamba layer."""
    keys = jax.random.split(jax.random.key(0), 5)
    long, matrix = (batch, shape.length, shape.channels), (batch, shape.length, shape.groups, shape.state)
    return {
        "u": jax.random.normal(keys[0], long, dtype),
        "delta": jax.random.normal(keys[1], long, dtype),
        "A": -jnp.tile(jnp.arange(1.0, shape.state + 1), (shape.channels, 1)),
        "B": jax.random.normal(keys[2], matrix, dtype),
        "C": jax.random.normal(keys[3], matrix, dtype),
        "D": jnp.ones(shape.channels),
        "z": jax.random.normal(keys[4], long, dtype),
        "delta_bias": jnp.linspace(-6.9, -2.2, shape.channels),
    }


def measure_bytes(shape: Shape, batch: int, dtype) -> float:
    """Bytes per second that a plain JAX program reads and writes in place, for as many as u, delta, z and y have."""
    x = jnp.ones((2, batch, shape.length, shape.channels), dtype)
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        x = jax.block_until_ready(add_one(x))
        seconds.append(time.perf_counter() - began)
    return 2 * x.nbytes / min(seconds)


def measure_exponentials() -> float:
    """Exponentials per second of the fastest plain JAX program."""
    small, count = jnp.linspace(-1.0, 0.0, 1 << 18), 100
    repeated = jax.jit(lambda x: jax.lax.fori_loop(0, count, lambda i, y: jnp.exp2(y), x))
    exponentials = count * small.size / best_time(repeated, small)
    square = jnp.ones((2048, 2048))
    multiply_adds = 2048**3 / best_time(jax.jit(functools.partial(jnp.matmul, precision="highest")), square, square)
    return max(exponentials, multiply_adds / 9)


def best_time(function, *arguments) -> float:
    """Seconds of the fastest of six calls."""
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def size_of(inputs: dict) -> int:
    """Bytes of all arrays."""
    return sum(x.nbytes for x in inputs.values())


def format_row(row: dict) -> str:
    """The columns after shape and batch."""
    cells = [f"{row['implementation']:<11}"]
    for kind in ("forward", "both"):
        x = row[kind]
        cells.append(f"{x['milliseconds']:>8.2f}{x['faster']:>7.1f}x{x['floor']:>8.0%}{x['memory_fraction']:>8.3f}")
    return "".join(cells)


if __name__ == "__main__":
    main()
