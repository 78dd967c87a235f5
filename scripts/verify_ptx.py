"""Runs the GPU kernels of the selective scan on a CPU, as Triton compiles them to PTX, and compares with float64.

    python scripts/verify_ptx.py [WORD ...] [--architectures 80 90] [--window 4] [--noise SEED]

Runs the cases whose names have all these words, or all cases. A line for each has the largest error of a result or
gradient: the difference, beyond rounding to bfloat16 or float16, over the largest value. What else the machine of
`ptx/` finds follows: races, accesses out of bounds, reads of what nobody wrote, outputs that are written in part. The
exit status is 1 if anything was found or an error is above 1e-5. This needs the package `triton`, and time: compiling a
case takes minutes of one core, running it tens of seconds. What was compiled is kept. With a shorter window, of 4 steps
instead of 12, Pallas' kernels differ in nothing but the number of steps that are written out, and compile ten times
faster.
"""

import argparse
import dataclasses
import importlib.util
import re
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from ptx.compiler import Kernel, compile_kernel, pallas_kernels, triton_kernel
from ptx.machine import Machine
from ptx.memory import Array
from ptx.parser import parse

from kernels.scan import pallas, triton
from kernels.scan.inputs import ScanInputs, ScanOptions

TOLERANCE = 1e-5
SHOWN = 4  # findings of a kernel


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of a scan and its gradient."""

    name: str
    implementation: str = "pallas"
    batch: int = 2
    length: int = 25
    channels: int = 40
    state: int = 8
    groups: int = 1
    dtype: str = "float32"
    reverse: bool = False
    softplus: bool = True
    without: tuple[str, ...] = ()
    constant: str = ""  # those of B and C that are constant in time
    chunked: bool = False  # lets the plan cut time into chunks, as it does with small batches
    inference: bool = False  # runs the forward kernel that saves no states too
    scale: float = 1.0  # of delta


NOTHING = ("D", "z", "delta_bias", "initial_state")
BF16 = dict(dtype="bfloat16")
GROUPS = dict(batch=3, length=61, channels=3 * 20, state=5, groups=3, reverse=True)
CASES = [
    Case("plain", length=65, channels=64, state=16),
    Case("reverse bfloat16", length=65, channels=64, state=16, reverse=True, **BF16),
    Case("chunked", batch=1, length=65, state=16, chunked=True, inference=True),
    Case("chunked reverse bfloat16", length=65, state=16, chunked=True, reverse=True, **BF16),
    Case("several programs bfloat16", length=61, channels=128, state=16, **BF16),
    Case("one step", length=1, state=16, inference=True),
    Case("seven steps, reverse", length=7, state=16, reverse=True),
    Case("37 channels", batch=1, length=65, channels=37, state=16),
    Case("37 channels bfloat16", batch=1, length=65, channels=37, state=16, **BF16),
    Case("whole windows bfloat16", length=24, channels=64, state=16, without=("z",), **BF16),
    Case("float16", state=16, dtype="float16"),
    Case("730 steps bfloat16", batch=1, length=730, channels=64, state=16, **BF16),
    Case("730 steps bfloat16, chunked", batch=1, length=730, channels=64, state=16, chunked=True, **BF16),
    Case("197 steps bfloat16, chunked", batch=1, length=197, channels=64, state=16, chunked=True, **BF16),
    Case("groups, state 5, reverse", **GROUPS),
    Case("groups, state 4", length=29, channels=3 * 20, state=4, groups=3),
    Case("state 1", channels=96, state=1),
    Case("state 8"),
    Case("state 32", length=17, channels=24, state=32),
    Case("constant B", constant="B"),
    Case("constant C", constant="C"),
    Case("constant B and C, chunked", length=49, constant="BC", chunked=True),
    Case("nothing optional", without=NOTHING, softplus=False),
    Case("large steps", channels=32, scale=30.0),
    *(
        dataclasses.replace(case, name=f"triton: {case.name}", implementation="triton")
        for case in (
            Case("plain", length=65, channels=64, state=16),
            Case("one step", length=1, state=16, inference=True),
            Case("37 channels reverse bfloat16", length=65, channels=37, state=16, reverse=True, **BF16),
            Case("float16", state=16, dtype="float16"),
            Case("groups, state 5, reverse", **GROUPS),
            Case("constant B", constant="B"),
            Case("constant C", constant="C"),
            Case("constant B and C", constant="BC"),
            Case("nothing optional", without=NOTHING, softplus=False),
            Case("730 steps bfloat16", batch=1, length=730, channels=64, state=16, **BF16),
        )
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="of cases' names")
    parser.add_argument("--architectures", nargs="+", type=int, default=[80, 90], choices=[80, 90])
    parser.add_argument("--window", type=int, default=pallas.WINDOW, choices=[4, 12], help="of Pallas' kernels")
    parser.add_argument("--noise", type=int, metavar="SEED", help="seed of errors of approximate instructions")
    arguments = parser.parse_args()
    cases = [case for case in CASES if set(arguments.words) <= set(re.findall(r"\w+", case.name))]
    if not cases:
        parser.exit(1, f"error: no case has the words {' '.join(arguments.words)} in its name\n")
    if importlib.util.find_spec("triton") is None:
        parser.exit(1, "error: Triton's compiler is needed: pip install triton\n")
    with mock.patch.multiple(pallas, WINDOW=arguments.window, CHUNK=2 * arguments.window):
        right = [check(case, Machines(x, arguments.noise)) for case in cases for x in arguments.architectures]
    parser.exit(not all(right))


def check(case: Case, machines: "Machines") -> bool:
    """Runs a case, prints what came of it and tells whether it is right."""
    start = time.perf_counter()
    try:
        errors = run(case, machines)
        worst = max(errors, key=errors.get)
        right = errors[worst] <= TOLERANCE and not machines.findings()
        line = f"{'right' if right else 'WRONG'}, error {errors[worst]:.1e} ({worst})"
    except Exception as error:  # the other cases still run
        right, line = False, f"FAILED, {type(error).__name__}: {error}"
    print(f"sm_{machines.architecture} | {case.name} | {line} | {time.perf_counter() - start:.0f} s", flush=True)
    for finding in machines.findings():
        print(f"    {finding}", flush=True)
    return right


class Machines:
    """Executes kernels where the scan would launch them, and keeps the reports."""

    def __init__(self, architecture: int, noise: int | None = None):
        self.architecture, self.noise, self.reports = architecture, noise, []

    def findings(self) -> list[str]:
        """The first few of each kernel."""
        return [f"{name}: {finding}" for name, report in self.reports for finding in report.findings[:SHOWN]]

    def launch(self, kernel: Kernel, arguments: list, outputs: list) -> list[np.ndarray]:
        """Runs all programs of a kernel; `outputs` are shapes, and what is not written there stays NaN."""
        compiled = compile_kernel(kernel, self.architecture)
        results = [np.full(x.shape, np.nan, x.dtype) for x in outputs]
        arrays = [Array(np.asarray(x), name=f"input {i}") for i, x in enumerate(arguments)]
        arrays += [Array(x, True, f"output {i}") for i, x in enumerate(results)]
        machine = Machine(parse(compiled.ptx), kernel.grid, kernel.threads, compiled.shared, noise=self.noise)
        self.reports.append((kernel.name, machine.report))
        machine.run(arrays)
        return results

    def call(self, original, plan, kernel, options, arguments, in_specs, outputs) -> Any:
        """Stands in for `kernels.scan.pallas.Plan.call`."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        (found,) = pallas_kernels(lambda *x: original(plan, kernel, options, list(x), in_specs, outputs), *shapes)
        leaves, (shapes, tree) = jax.tree.leaves(arguments), jax.tree.flatten(outputs)
        return jax.tree.unflatten(tree, self.launch(found, leaves, shapes))

    def run(self, name, arguments, outputs, grid, warps, constants) -> list[np.ndarray]:
        """Stands in for `kernels.scan.triton.run`."""
        return self.launch(triton_kernel(name, arguments, outputs, grid, warps, constants), arguments, outputs)


def run(case: Case, machines: Machines) -> dict[str, float]:
    """The errors of a case's results and gradients."""
    inputs, dy, d_last_state = make_inputs(case)
    options = ScanOptions(case.softplus, case.reverse)
    expected = exact(inputs, options, dy, d_last_state)
    inputs = ScanInputs(*(None if x is None else jnp.asarray(x) for x in inputs))
    if case.implementation == "pallas":

        def call(*arguments, original=pallas.Plan.call):
            return machines.call(original, *arguments)

        processors = pallas.PROCESSORS if case.chunked else 0
        with mock.patch.object(pallas, "PROCESSORS", processors), mock.patch.object(pallas.Plan, "call", call):
            inputs = pallas.pad(inputs, options)
            results = [
                pallas.forward(inputs, options, save_states=save) for save in (True, False)[: 1 + case.inference]
            ]
            gradients = pallas.backward(
                inputs, results[0]["states"], jnp.asarray(dy), jnp.asarray(d_last_state), options
            )
        results = [(x["y"], x["last_state"]) for x in results]
    else:
        found = [triton.forward(inputs, options, save, machines.run) for save in (True, False)[: 1 + case.inference]]
        results = [x[:2] for x in found]
        gradients = triton.backward(
            inputs, found[0][2], jnp.asarray(dy), jnp.asarray(d_last_state), options, machines.run
        )
    actual = dict(y=results[0][0], last_state=results[0][1])
    actual |= {f"{name} of inference": x for name, x in zip(("y", "last_state"), sum(results[1:], ()))}
    actual |= {f"d_{name}": x for name, x in gradients._asdict().items()}
    return {name: error(x, expected[name.removesuffix(" of inference")]) for name, x in actual.items() if x is not None}


def make_inputs(case: Case) -> tuple[ScanInputs, np.ndarray, np.ndarray]:
    """Random inputs, and gradients of both results."""
    random = np.random.default_rng(len(case.name))
    long, matrix = (case.batch, case.length, case.channels), (case.batch, case.length, case.groups, case.state)
    state, constant = (case.batch, case.channels, case.state), (case.channels, case.state)
    shapes = dict(u=long, delta=long, A=constant, B=matrix, C=matrix, D=constant[:1], z=long, delta_bias=constant[:1])
    shapes |= dict(initial_state=state) | dict.fromkeys(case.constant, constant)
    arrays = {n: random.normal(size=x).astype(np.float32) for n, x in shapes.items() if n not in case.without}
    arrays["A"] = -np.exp(0.7 * arrays["A"])
    arrays["delta"] *= case.scale
    if not case.softplus:
        arrays["delta"] = np.abs(arrays["delta"]) * 0.2
    if "delta_bias" in arrays:
        arrays["delta_bias"] -= 2
    dtype = np.dtype(getattr(ml_dtypes, case.dtype, case.dtype))
    arrays |= {name: arrays[name].astype(dtype) for name in ("u", "delta", "z") if name in arrays}
    dy, d_last_state = (random.normal(size=x).astype(np.float32) for x in (long, state))
    return ScanInputs(**arrays), dy.astype(dtype), d_last_state


def exact(inputs: ScanInputs, options: ScanOptions, dy, d_last_state) -> dict[str, np.ndarray]:
    """Results and gradients in float64, by differentiation of the plain recurrence."""

    def scan(inputs):
        u, delta, A, B, C, D, z, delta_bias, h = inputs[:9]
        delta = delta if delta_bias is None else delta + delta_bias
        delta = jax.nn.softplus(delta) if options.delta_softplus else delta
        B, C = (x[None, None] if x.ndim == 2 else jnp.repeat(x, u.shape[2] // x.shape[2], 2) for x in (B, C))
        B, C = (jnp.broadcast_to(x, (*u.shape, A.shape[1])) for x in (B, C))

        def step(h, now):
            u, delta, B, C = now
            h = jnp.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B
            return h, (h * C).sum(-1)

        h = jnp.zeros((u.shape[0], *A.shape)) if h is None else h
        h, y = jax.lax.scan(step, h, [x.swapaxes(0, 1) for x in (u, delta, B, C)], reverse=options.reverse)
        y = y.swapaxes(0, 1) + (0 if D is None else D * u)
        return y if z is None else y * jax.nn.silu(z), h

    with jax.enable_x64(True):
        inputs, dy, d_last_state = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (inputs, dy, d_last_state))
        (y, last_state), pull_back = jax.vjp(scan, inputs)
        (gradients,) = pull_back((dy, d_last_state))
    named = dict(y=y, last_state=last_state) | {f"d_{name}": x for name, x in gradients._asdict().items()}
    return {name: np.asarray(x) for name, x in named.items() if x is not None}


def error(actual, expected: np.ndarray) -> float:
    """The largest difference over the largest value; infinite if one is not finite."""
    actual = np.asarray(actual)
    difference = np.abs(actual.astype(np.float64) - expected)
    if actual.dtype.itemsize == 2:  # half a unit in the last place is rounding
        kind = ml_dtypes.finfo(actual.dtype)
        exponent = np.floor(np.log2(np.maximum(np.abs(expected), float(kind.tiny))))
        difference = np.maximum(difference - float(kind.eps) / 2 * 2.0**exponent, 0)
    largest = difference.max() / np.abs(expected).max()
    return float(largest) if np.isfinite(largest) else float("inf")


if __name__ == "__main__":
    main()
