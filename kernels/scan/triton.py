"""Selective scan on NVIDIA GPUs in Triton's own language, through `jax_triton`; see `kernels.scan.triton_kernels`.

It runs if it is named, or if Pallas' Triton backend is gone; nothing of Triton is imported before that. Versions that
work together, as far as is known without a GPU:

    JAX 0.10     jax-triton 0.3.1, triton 3.6 or newer
    JAX 0.11     jax-triton 0.4, triton 3.7 or newer
    JAX 0.12     none: jax-triton 0.4.1 fails with a TypeError in its rule for dead code

jax-triton also needs a JAX with CUDA: without one it cannot be imported (0.3.1) or cannot lower (0.4).
"""

import functools
import importlib.util
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from kernels.scan.differentiation import differentiable
from kernels.scan.inputs import ScanInputs, ScanOptions, vary_like
from kernels.scan.order import gathered

WINDOW = 8  # steps from one saved state to the next
BLOCK = 32  # channels of a program, one for each thread


def why_unavailable(platform: str, inputs: ScanInputs) -> str | None:
    """Returns one line that explains why the kernels cannot run, None if they can."""
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f'it needs the package {" and ".join(missing)}: pip install "vimd-jax[triton]"'
    if platform != "gpu":
        return f"it needs a GPU, and JAX runs on {platform} here"
    if jax.__version_info__ >= (0, 12):
        return f"jax-triton 0.4.1 does not work with JAX {jax.__version__}: use JAX 0.10 with 0.3.1, JAX 0.11 with 0.4"
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        return f"jax_triton cannot be imported: {str(error).splitlines()[0]}"
    if inputs.u.size * 4 >= 2**31:
        return f"u has shape {inputs.u.shape}, but may have no more than 2²⁹ elements: cut it into parts"
    return None


def run(name: str, arguments: list, outputs: list, grid: tuple, warps: int, constants: dict) -> list:
    """Calls a kernel of `kernels.scan.triton_kernels` from JAX; `outputs` are shapes."""
    import jax_triton

    from kernels.scan import triton_kernels

    options = dict(grid=grid, num_warps=warps, num_stages=1)
    # Triton no longer fuses multiplications and additions unless told to; jax-triton 0.3 still tells it to.
    if "backend_options" in inspect.signature(jax_triton.triton_call).parameters:
        options |= dict(out_type=outputs, backend_options=dict(enable_fp_fusion=True))
    else:
        options |= dict(out_shape=outputs)
    results = jax_triton.triton_call(*arguments, kernel=getattr(triton_kernels, name), **options, **constants)
    return [vary_like(x, arguments[0]) for x in results]


def forward(inputs: ScanInputs, options: ScanOptions, save_states: bool, run) -> tuple:
    """Computes y, the last state and, if asked, the state before every `WINDOW` steps."""
    batch, length, channels = inputs.u.shape
    saved = (batch, -(-length // WINDOW), inputs.state, channels) if save_states else (1, 1, 1, 1)
    outputs = [_like(inputs.u), _float32(batch, inputs.state, channels), _float32(*saved)]
    arrays = [inputs.u if x is None else x for x in _transpose_states(inputs)[:-1]]
    constants = _constants(inputs, options) | dict(SAVE=save_states)
    y, last_state, states = run("forward", arrays, outputs, _grid(inputs), BLOCK // 32, constants)
    return y, last_state.swapaxes(1, 2), states if save_states else None


def backward(inputs: ScanInputs, states, dy, d_last_state, options: ScanOptions, run) -> ScanInputs:
    """Computes the gradients of the inputs."""
    batch, length, channels = inputs.u.shape
    absent = {name for name, x in inputs._asdict().items() if x is None}
    constant, vector = _float32(batch, inputs.state, channels), _float32(batch, channels)
    varying = _float32(batch, inputs.groups, _grid(inputs)[0], length, inputs.state)
    outputs = ScanInputs(
        u=_like(inputs.u),
        delta=_like(inputs.u),
        A=constant,
        B=constant if inputs.B.ndim == 2 else varying,
        C=constant if inputs.C.ndim == 2 else varying,
        D=vector,
        z=_like(inputs.u),
        delta_bias=vector,
        initial_state=constant,
    )
    outputs = [_float32(1) if name in absent else x for name, x in outputs._asdict().items()][:-1]
    arrays = [inputs.u if x is None else x for x in _transpose_states(inputs)[:-2]]
    arrays += [states, dy, d_last_state.swapaxes(1, 2)]
    partial = ScanInputs(*run("backward", arrays, outputs, _grid(inputs), BLOCK // 32, _constants(inputs, options)))

    def total(name, x):
        if name in absent:
            return None
        if name in ("u", "delta", "z", "initial_state"):
            return x
        return x.sum(2).swapaxes(1, 2) if x.ndim == 5 else x.sum(0)

    return _transpose_states(ScanInputs(**{name: total(name, x) for name, x in partial._asdict().items()}))


scan = gathered(differentiable(functools.partial(forward, run=run), functools.partial(backward, run=run), saved="b..c"))


def _transpose_states(inputs: ScanInputs) -> ScanInputs:
    """Swaps the last two axes, (channels, state), of the arrays that end in them; applied twice it changes nothing."""
    names = ["A", *(name for name in "BC" if getattr(inputs, name).ndim == 2)]
    names += [] if inputs.initial_state is None else ["initial_state"]
    return inputs._replace(**{name: getattr(inputs, name).swapaxes(-1, -2) for name in names})


def _grid(inputs: ScanInputs) -> tuple[int, int, int]:
    """Returns the numbers of programs: blocks of a group's channels, groups, batch."""
    return -(-inputs.channels // inputs.groups // BLOCK), inputs.groups, inputs.batch


def _constants(inputs: ScanInputs, options: ScanOptions) -> dict[str, Any]:
    """Returns the kernels' compile-time constants."""
    return dict(
        LENGTH=inputs.length,
        CHANNELS=inputs.channels // inputs.groups,
        GROUPS=inputs.groups,
        STATE=inputs.state,
        N=1 << (inputs.state - 1).bit_length(),
        BLOCK=BLOCK,
        WINDOW=WINDOW,
        CONSTANT_B=inputs.B.ndim == 2,
        CONSTANT_C=inputs.C.ndim == 2,
        HAS_D=inputs.D is not None,
        HAS_Z=inputs.z is not None,
        HAS_BIAS=inputs.delta_bias is not None,
        HAS_INITIAL=inputs.initial_state is not None,
        SOFTPLUS=options.delta_softplus,
        REVERSE=options.reverse,
    )


def _like(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
