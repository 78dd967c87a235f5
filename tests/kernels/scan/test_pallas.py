"""The Pallas kernels: results (in interpret mode where there is no GPU), memory, lowering for CUDA without a GPU."""

import functools
import math

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels import selective_scan
from kernels.choice import current_platform
from kernels.scan import pallas, reference
from kernels.scan.inputs import ScanInputs, ScanOptions, canonical

NAMES = ScanInputs._fields[:-1]  # without an order
INTERPRET = current_platform() != "gpu"
QUICK = dict(xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True) if INTERPRET else {}
SMALL = dict(batch=2, length=9, channels=3, state=2)


@pytest.fixture
def short_windows(monkeypatch):
    """The same kernels in fewer operations, which XLA compiles in less time; short sequences span several windows."""
    monkeypatch.setattr(pallas, "WINDOW", 2)


def specs(batch, length, channels, state, groups=1, without=(), constant=(), dtype=jnp.float32) -> dict:
    """Shapes and dtypes by name; None for the inputs in `without`, B and C in `constant` do not depend on time."""
    shapes = {
        **dict.fromkeys(["u", "delta", "z"], (batch, length, channels)),
        **dict.fromkeys(["B", "C"], (batch, length, groups, state)),
        **dict.fromkeys(["A", *constant], (channels, state)),
        **dict.fromkeys(["D", "delta_bias"], (channels,)),
        "initial_state": (batch, channels, state),
    }
    dtypes = dict.fromkeys(NAMES, jnp.float32) | dict.fromkeys(["u", "delta", "z", "B", "C"], dtype)
    return {name: None if name in without else jax.ShapeDtypeStruct(shapes[name], dtypes[name]) for name in NAMES}


def random_inputs(seed=0, **sizes) -> dict:
    """Arrays for `specs(**sizes)`: A negative, step sizes never, so that states do not overflow."""
    rng = np.random.default_rng(seed)
    sign = dict(A=lambda x: -np.exp(x), delta=np.abs, delta_bias=np.abs)
    draws = {name: (spec, rng.normal(size=spec.shape)) for name, spec in specs(**sizes).items() if spec is not None}
    arrays = {name: sign.get(name, np.asarray)(x).astype(spec.dtype) for name, (spec, x) in draws.items()}
    return dict.fromkeys(NAMES) | arrays


def scan(inputs: dict, *, interpret=INTERPRET, delta_softplus=True, reverse=False):
    return pallas.scan(canonical(ScanInputs(**inputs)), ScanOptions(delta_softplus, reverse, interpret))


def with_gradients(inputs: dict, cotangents, **flags):
    """(y, last state), gradients by name."""
    results, pull_back = jax.vjp(functools.partial(scan, **flags), inputs)
    return results, pull_back(cotangents)[0]


jitted = jax.jit(with_gradients, static_argnames=("delta_softplus", "reverse"), compiler_options=QUICK)


def recorded(case: str) -> tuple[dict, dict]:
    """Inputs in the kernels' layout, and what else was recorded."""
    arrays = {}
    for name, x in golden.tensors(case).items():
        if x.ndim == 4:  # (batch, groups, state, length)
            x = np.moveaxis(x, 3, 1)
        elif x.ndim == 3 and name != "last_state":  # (batch, channels or state, length)
            x = np.swapaxes(x, 1, 2)
            x = x[:, :, None] if name.removeprefix("grad_") in ("B", "C") else x
        arrays[name] = x
    return {name: arrays.pop(name, None) for name in NAMES}, arrays


def check_recorded(case: str):
    inputs, expected = recorded(case)
    cotangents = expected.pop("dy"), np.zeros_like(expected["last_state"])
    softplus = golden.meta(case)["constructor"]["delta_softplus"]
    (y, last_state), gradients = jitted(inputs, cotangents, delta_softplus=softplus)
    actual = dict(y=y, last_state=last_state) | {f"grad_{name}": gradients[name] for name in NAMES}
    for name, value in expected.items():
        assert golden.relative_error(actual[name], value) < 1e-5, name


@pytest.mark.parametrize("case", golden.cases("c01_scan_*"))
def test_recorded_results_and_gradients(case, short_windows):
    check_recorded(case)


def test_recorded_results_and_gradients_in_full_windows():
    check_recorded("c01_scan_L7_noD_noz")


@st.composite
def problems(draw):
    groups = draw(st.sampled_from([1, 2]))
    sizes = dict(
        batch=draw(st.integers(1, 2)),
        length=draw(st.integers(1, 11)),
        channels=groups * draw(st.integers(1, 5)),
        state=draw(st.integers(1, 5)),
        groups=groups,
        without=draw(st.sets(st.sampled_from(["D", "z", "delta_bias", "initial_state"]))),
        constant=draw(st.sets(st.sampled_from(["B", "C"]))),
        dtype=draw(st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])),
    )
    return sizes, dict(delta_softplus=draw(st.booleans()), reverse=draw(st.booleans()))


@settings(max_examples=3, deadline=None, derandomize=True)
@given(problem=problems())
def test_results_and_gradients_against_the_loop(problem):
    sizes, flags = problem
    with pytest.MonkeyPatch.context() as monkeypatch:
        short_windows.__wrapped__(monkeypatch)
        check_against_loop(sizes, flags)


def check_against_loop(sizes: dict, flags: dict):
    inputs = random_inputs(**sizes)
    exact = {name: np.asarray(x, np.float64) for name, x in inputs.items() if x is not None}
    rng = np.random.default_rng(1)
    expected = reference.scan(ScanInputs(**exact), ScanOptions(**flags))
    dtypes = sizes["dtype"], jnp.float32
    cotangents = [rng.normal(size=x.shape).astype(dtype) for x, dtype in zip(expected, dtypes)]
    results, gradients = jitted(inputs, tuple(cotangents), **flags)
    tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2, jnp.float16: 2e-3}[sizes["dtype"]]
    for actual, x, dtype in zip(results, expected, dtypes):
        assert actual.dtype == dtype
        assert golden.relative_error(actual, x) < tolerance
    for name, x in exact.items():  # the slope along a random direction, by central differences in float64
        direction, step = rng.normal(size=x.shape), 1e-5
        moved = [ScanInputs(**exact | {name: x + end * step * direction}) for end in (1, -1)]
        ends = [reference.scan(inputs, ScanOptions(**flags)) for inputs in moved]
        slope = sum((np.asarray(c, float) * (a - b)).sum() for c, a, b in zip(cotangents, *ends)) / (2 * step)
        products = np.asarray(gradients[name], np.float64) * direction
        assert gradients[name].dtype == inputs[name].dtype
        assert abs(products.sum() - slope) <= tolerance * np.abs(products).sum(), name


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_reverse_is_the_scan_of_the_flipped_sequence(short_windows):
    inputs, cotangents = random_inputs(**SMALL), random_cotangents()
    backward = jitted(inputs, cotangents, reverse=True)

    def flip(tree):
        return jax.tree.map(lambda x: jnp.flip(x, 1) if x.ndim > 2 and x.shape[1] == SMALL["length"] else x, tree)

    for actual, expected in zip(leaves(backward), leaves(flip(jitted(flip(inputs), flip(cotangents))))):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def random_cotangents() -> tuple:
    rng = np.random.default_rng(1)
    results = jax.eval_shape(scan, specs(**SMALL))
    return tuple(rng.normal(size=x.shape).astype(x.dtype) for x in results)


def test_two_runs_agree_to_the_bit(short_windows):
    inputs, cotangents = random_inputs(**SMALL), random_cotangents()
    first, second = (leaves(jitted(inputs, cotangents)) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second))


def test_a_sequence_in_two_parts(short_windows):
    run = jax.jit(scan, compiler_options=QUICK)
    parts = [random_inputs(seed=seed, **SMALL) for seed in (0, 1)]
    whole = parts[0] | {
        name: np.concatenate([part[name] for part in parts], 1) for name in ("u", "delta", "B", "C", "z")
    }
    y, last_state = run(whole)
    y_first, state = run(parts[0])
    y_second, state = run(
        parts[0] | {n: parts[1][n] for n in ("u", "delta", "B", "C", "z")} | dict(initial_state=state)
    )
    np.testing.assert_allclose(np.concatenate([y_first, y_second], 1), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, last_state, rtol=1e-5, atol=1e-6)


def test_steps_of_size_zero_keep_the_state(short_windows):
    inputs = random_inputs(**SMALL)
    inputs |= dict(delta=np.full_like(inputs["delta"], -1000.0))  # softplus of which is 0
    (_, last_state), gradients = jitted(inputs, random_cotangents())
    np.testing.assert_array_equal(last_state, inputs["initial_state"])
    assert not gradients["A"].any() and not gradients["B"].any()


def test_large_decay_stays_finite(short_windows):
    inputs = random_inputs(**SMALL)
    inputs |= dict(delta=1e4 * inputs["delta"], A=1e4 * inputs["A"])
    assert all(np.isfinite(x).all() for x in leaves(jitted(inputs, random_cotangents())))


def test_nan_stays_in_its_sequence(short_windows):
    inputs, cotangents = random_inputs(**SMALL), random_cotangents()
    clean = jitted(inputs, cotangents)
    inputs["u"][1, 4, 2] = np.nan
    (y, last_state), gradients = jitted(inputs, cotangents)
    assert np.isnan(y[1, 4:, 2]).all() and not np.isnan(y[1, :4]).any() and not np.isnan(y[1, :, :2]).any()
    assert np.isnan(last_state[1, 2]).all()
    for actual, expected in [(y, clean[0][0]), *((gradients[n], clean[1][n]) for n in ("u", "delta", "B", "C", "z"))]:
        np.testing.assert_array_equal(actual[0], expected[0])


def test_under_pmap_vmap_remat_and_grad(short_windows):
    inputs = [random_inputs(seed=seed, **SMALL) for seed in (0, 1)]

    def loss(inputs):
        return sum((x**2).sum() for x in jax.checkpoint(scan)(inputs))

    stacked = {name: np.stack([x[name] for x in inputs])[None] for name in NAMES}  # (devices, mapped, …)
    gradients = jax.pmap(jax.vmap(jax.grad(loss)), devices=jax.devices()[:1])(stacked)
    for i, x in enumerate(inputs):
        y, last_state = jitted(x, random_cotangents())[0]
        expected = jitted(x, (2 * y, 2 * last_state))[1]
        for name in NAMES:
            np.testing.assert_allclose(gradients[name][0, i], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


VIM_TINY = dict(batch=64, length=730, channels=384, state=16)
ODD = dict(batch=2, length=197, channels=96, state=20, groups=3, constant=["C"], dtype=jnp.float16)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [VIM_TINY, VIM_TINY | dict(dtype=jnp.bfloat16), ODD | dict(without=["D", "z", "delta_bias", "initial_state"])],
    ids=["float32", "bfloat16", "odd"],
)
def test_lowers_for_cuda_without_a_gpu(sizes, reverse):
    inputs = {name: x for name, x in specs(**sizes).items() if x is not None}

    def run(inputs, cotangents):
        options = dict(delta_softplus=True, reverse=reverse, return_last_state=True, implementation="pallas")
        results, pullback = jax.vjp(lambda inputs: selective_scan(**inputs, **options), inputs)
        return results, pullback(cotangents)

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        cotangents = jax.eval_shape(scan, specs(**sizes))
        lowered = jax.jit(run).trace(inputs, cotangents).lower(lowering_platforms=("cuda",))
    kernels = 2 if sizes["batch"] == 64 else 4  # forward and backward; before each, if needed, one for chunks of time
    assert lowered.as_text().count("xla.gpu.triton") == kernels


@pytest.mark.parametrize("plan", [pallas.forward_plan, pallas.backward_plan])
def test_every_processor_has_work(plan):
    for batch in (1, 8, 64):
        sizes = plan(ScanInputs(**specs(**VIM_TINY | dict(batch=batch))))
        assert batch * sizes.groups * sizes.blocks * sizes.chunks >= 132
        assert 0 <= sizes.chunks * sizes.chunk - sizes.windows < sizes.chunk


@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_of_time_give_what_the_whole_gives(short_windows, monkeypatch, reverse):
    inputs, cotangents = random_inputs(**SMALL), random_cotangents()
    monkeypatch.setattr(pallas, "PROCESSORS", 0)  # programs enough: no chunks
    whole = jax.jit(with_gradients, static_argnames="reverse", compiler_options=QUICK)(
        inputs, cotangents, reverse=reverse
    )
    monkeypatch.setattr(pallas, "PROCESSORS", 132)
    monkeypatch.setattr(pallas, "CHUNK", 2 * pallas.WINDOW)
    assert pallas.forward_plan(canonical(ScanInputs(**inputs))).chunks == 3
    parts = jax.jit(with_gradients, static_argnames="reverse", compiler_options=QUICK)(
        inputs, cotangents, reverse=reverse
    )
    for actual, expected in zip(leaves(parts), leaves(whole)):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_softplus_and_sigmoid_are_accurate():
    program = pallas.Program.__new__(pallas.Program)
    program.options = ScanOptions(interpret=True)
    x = np.linspace(-80, 80, 20001, dtype=np.float32)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(program.softplus(x), np.logaddexp(exact, 0), rtol=5e-6)
    sigmoid = 1 / (1 + np.exp(-exact))
    np.testing.assert_allclose(program.sigmoid(x), sigmoid, rtol=5e-6)
    for number in (1, 2, 3):
        gates = program.gates([pallas.Tile(x, x, x, z) for z in (x, x[::-1], 0.5 * x)[:number]])
        expected = [exact * sigmoid, (exact * sigmoid)[::-1], exact / 2 / (1 + np.exp(-exact / 2))][:number]
        np.testing.assert_allclose(gates, expected, rtol=5e-6, atol=2e-17)


@pytest.mark.parametrize("channels", [384, 768, 1536])
@pytest.mark.parametrize("length", [197, 730, 6085])
def test_memory_beyond_inputs_and_outputs(length, channels):
    """Counts what the kernels read and write beside the program's inputs and results; XLA fuses the rest with these."""
    inputs = specs(**VIM_TINY | dict(length=length, channels=channels, dtype=jnp.bfloat16))
    program = jax.make_jaxpr(with_gradients)(inputs, jax.eval_shape(scan, inputs)).jaxpr
    forward, backward = passes_in(program)
    states = forward.outvars[2]

    def beside(jaxpr) -> int:
        """What is in memory while this pass runs, the saved states included."""
        (kernel,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "pallas_call")
        arrays = {*kernel.invars, *kernel.outvars} - {*jaxpr.invars, *jaxpr.constvars, *jaxpr.outvars} | {states}
        return sum(math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in arrays)

    total = max(map(beside, (forward, backward)))
    assert 0 < total < math.prod([VIM_TINY["batch"], length, channels, VIM_TINY["state"]]) * 4 / 8


def passes_in(jaxpr):
    """The programs, within another, that run a kernel."""
    if any(equation.primitive.name == "pallas_call" for equation in jaxpr.eqns):
        yield jaxpr
    for equation in jaxpr.eqns:
        for name in {"call", "call_jaxpr"} & equation.params.keys():
            yield from passes_in(equation.params[name].jaxpr)
