"""The Triton kernels without a GPU: results in Triton's interpreter, machine code ahead of time, the reason why not."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import selective_scan
from kernels.scan import reference, triton
from kernels.scan.inputs import ScanInputs, ScanOptions, canonical

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ROOT = Path(__file__).parents[3]


class Memory:
    """A NumPy array with as much of a tensor's interface as Triton's interpreter uses."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = str(array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "Memory":
        return self

    def cpu(self) -> "Memory":
        return self

    def new_empty(self, *_, **__) -> "Memory":
        return Memory(self.array)

    def set_(self, *_) -> None:
        """It shares the array already."""

    storage_offset = size = stride = copy_ = set_


def interpret(name, arguments, outputs, grid, warps, constants) -> list[np.ndarray]:
    """Runs a kernel as `kernels.scan.triton.run` does, in Triton's interpreter."""
    from kernels.scan import triton_kernels

    # NaN where a kernel should have written; a copy, because the interpreter takes addresses.
    results = [np.full(x.shape, np.nan, x.dtype) for x in outputs]
    arguments = [np.array(x, order="C") for x in arguments]
    getattr(triton_kernels, name)[grid](*map(Memory, arguments + results), **constants)
    return results


def in_interpreter(test: str):
    """Runs a function of this module in a process whose Triton interprets: that is decided when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_triton; test_triton.{test}()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def problem(seed=0, batch=2, length=11, channels=6, state=3, groups=2, constant=(), without=()) -> tuple:
    """Inputs, and gradients of both results."""
    rng = np.random.default_rng(seed)
    long, matrix = (batch, length, channels), (batch, length, groups, state)
    shapes = dict.fromkeys(("u", "delta", "z"), long) | dict.fromkeys(("B", "C"), matrix)
    shapes |= dict.fromkeys(("A", *constant), (channels, state)) | dict(D=(channels,), delta_bias=(channels,))
    shapes |= dict(initial_state=(batch, channels, state))
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items() if name not in without}
    inputs = ScanInputs(**arrays | dict(A=-np.exp(arrays["A"])))
    return (
        inputs,
        rng.normal(size=long).astype(np.float32),
        rng.normal(size=(batch, channels, state)).astype(np.float32),
    )


def check_results_and_gradients():
    """Against float64, and gradients against the sequential implementation's."""
    for number, (constant, without, reverse) in enumerate(
        [((), (), False), ((), ("D", "z", "initial_state"), True), (("B",), ("delta_bias",), False), (("C",), (), True)]
    ):
        inputs, dy, d_last_state = problem(number, constant=constant, without=without)
        options = ScanOptions(delta_softplus=number != 1, reverse=reverse)
        if number == 1:
            inputs = inputs._replace(delta=np.abs(inputs.delta), delta_bias=np.abs(inputs.delta_bias))
        y, last_state, states = triton.forward(inputs, options, True, interpret)
        exact = ScanInputs(*(None if x is None else np.asarray(x, np.float64) for x in inputs))
        for actual, expected in zip((y, last_state), reference.scan(exact, options)):
            assert golden.relative_error(actual, expected) < 1e-5
        gradients = triton.backward(inputs, states, dy, d_last_state, options, interpret)

        def results(inputs, options=options):
            from kernels.scan import sequential

            return sequential.scan(canonical(inputs), options)

        expected = jax.vjp(results, ScanInputs(*(None if x is None else jnp.asarray(x) for x in inputs)))[1]
        for name, x in expected((jnp.asarray(dy), jnp.asarray(d_last_state)))[0]._asdict().items():
            actual = getattr(gradients, name)
            assert (x is None) == (actual is None), name
            assert x is None or golden.relative_error(actual, x) < 1e-5, (number, name)


@needs_triton
def test_results_and_gradients_in_the_interpreter():
    in_interpreter("check_results_and_gradients")


def compile_for(architecture, name, arguments, outputs, warps, constants):
    """Compiles a kernel ahead of time where `kernels.scan.triton.run` would run it."""
    import triton as compiler
    from triton.backends.compiler import GPUTarget

    from kernels.scan import triton_kernels

    kernel = getattr(triton_kernels, name)
    kinds = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
    arrays = [kinds[str(x.dtype)] for x in (*arguments, *outputs)]
    signature = dict(zip(kernel.arg_names, arrays)) | dict.fromkeys(constants, "constexpr")
    source = compiler.compiler.ASTSource(kernel, signature, constants)
    options = dict(num_warps=warps, num_stages=1, enable_fp_fusion=True)
    compiled = compiler.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert compiled.asm["cubin"]


@needs_triton
@pytest.mark.parametrize(("architecture", "constant"), [(80, ""), (90, ""), (90, "B"), (90, "C"), (90, "BC")])
def test_compiles_ahead_of_time(architecture, constant, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shapes = dict(
        u=(2, 730, 384), delta=(2, 730, 384), A=(384, 16), B=(2, 730, 1, 16), C=(2, 730, 1, 16), z=(2, 730, 384)
    ) | dict.fromkeys(constant, (384, 16))
    inputs = {
        name: jax.ShapeDtypeStruct(x, jnp.bfloat16 if name in ("u", "delta", "z") else jnp.float32)
        for name, x in shapes.items()
    }

    def run(name, arguments, outputs, grid, warps, constants):
        compile_for(architecture, name, arguments, outputs, warps, constants)
        return [jnp.zeros(x.shape, x.dtype) for x in outputs]

    def both(inputs):
        y, last_state, states = triton.forward(inputs, ScanOptions(True), True, run)
        return triton.backward(inputs, states, y, last_state, ScanOptions(True), run)

    jax.eval_shape(both, ScanInputs(**inputs))


def test_says_why_it_cannot_run_here():
    inputs = {n: x for n, x in problem(groups=1)[0]._asdict().items() if x is not None}
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="implementation: 'triton' cannot run here: it needs"):
        selective_scan(**inputs, implementation="triton")


def test_nothing_of_triton_is_imported_unless_asked_for():
    code = "import sys, kernels.scan.triton; sys.exit(any(m in sys.modules for m in ('triton', 'jax_triton')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=100).returncode == 0
