"""Every implementation of the selective scan: recorded vectors, a float64 loop, what must always hold, bad input."""

import functools
import logging

import golden
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from kernels import build, selective_scan
from kernels.scan import native, pallas, reference
from kernels.scan.api import IMPLEMENTATIONS
from kernels.scan.inputs import ScanInputs, ScanOptions
from kernels.scan.shapes import SHAPES

needs_compiler = pytest.mark.skipif(not build.compiler(), reason="no C++ compiler")
NATIVE = pytest.param("native", marks=needs_compiler)
EXACT = [NATIVE, "sequential"]  # the same operations in the same order each time
ALL = [*EXACT, "plain", "associative"]
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


def make_inputs(
    batch=2,
    length=33,
    channels=20,
    state=16,
    groups=1,
    constant=(),
    absent=(),
    dtype=jnp.float32,
    signed_delta=False,
    seed=0,
) -> dict[str, jax.Array]:
    """Random arguments: `constant` of B, C are constant in time, `absent` optional arrays are left out.

    Without softplus, delta has to be positive for the recurrence not to grow without bound.
    """
    generator = np.random.default_rng(seed)

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(generator.standard_normal(shape, np.float32).astype(dtype))

    def matrix(name):
        shape = (channels, state) if name in constant else (batch, length, groups, state)
        x = normal(*shape, dtype=jnp.float32 if name in constant else dtype)
        return x[:, :, 0] if x.ndim == 4 and groups == 1 else x

    inputs = {
        "u": normal(batch, length, channels, dtype=dtype),
        "delta": normal(batch, length, channels, dtype=dtype),
        "A": jnp.asarray(-np.exp(generator.standard_normal((channels, state), np.float32))),
        "B": matrix("B"),
        "C": matrix("C"),
        "D": normal(channels),
        "z": normal(batch, length, channels, dtype=dtype),
        "delta_bias": normal(channels),
        "initial_state": normal(batch, channels, state),
    }
    if not signed_delta:
        inputs |= {name: jnp.asarray(abs(np.asarray(inputs[name]))) for name in ("delta", "delta_bias")}
    return {name: x for name, x in inputs.items() if name not in absent}


def run(inputs, implementation, compiled=True, **flags):
    """(y, last state)."""
    function = functools.partial(selective_scan, return_last_state=True, implementation=implementation, **flags)
    return (jit(lambda x: function(**x)) if compiled else lambda x: function(**x))(inputs)


def run_with_gradients(inputs, weights, implementation, **flags):
    """((y, last state), gradients of <weights[0], y> + <weights[1], last state>)."""

    def loss(inputs):
        y, last_state = run(inputs, implementation, compiled=False, **flags)
        return jnp.vdot(y.astype(jnp.float32), weights[0]) + jnp.vdot(last_state, weights[1]), (y, last_state)

    (_, results), grads = jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    return results, grads


def exact(inputs, **flags):
    """(y, last state) of the float64 loop."""
    return reference.scan(ScanInputs(**inputs), ScanOptions(**flags))


def make_weights(inputs) -> tuple[np.ndarray, np.ndarray]:
    """What multiplies y and the last state in a loss."""
    generator = np.random.default_rng(99)
    u, A = inputs["u"], inputs["A"]
    return generator.standard_normal(u.shape, np.float32), generator.standard_normal((len(u), *A.shape), np.float32)


# ---------------------------------------------------------------------------------------------------------- the truth


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("case", golden.cases("c01_scan_*"))
def test_recorded_results_and_gradients(case, implementation, reverse):
    inputs, results, expected = golden.scan_case(case)
    if implementation != "native" and reverse and len(inputs["u"][0]) > 7:
        pytest.skip("compiles for long and differs from the shorter cases in nothing")

    def flip(x):
        return jnp.flip(x, 1) if reverse and x.ndim > 2 else x

    def loss(inputs):
        y, last_state = run(
            {name: flip(x) for name, x in inputs.items()},
            implementation,
            compiled=False,
            delta_softplus=golden.meta(case)["constructor"]["delta_softplus"],
            reverse=reverse,
        )
        y = flip(y)
        return (y * results["dy"]).sum(), (y, last_state)

    (_, (y, last_state)), actual = jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    assert golden.relative_error(y, results["y"]) < 1e-5
    assert golden.relative_error(last_state, results["last_state"]) < 1e-5
    assert actual.keys() == expected.keys()
    for name in expected:
        assert golden.relative_error(actual[name], expected[name]) < 2e-5, name


def check_against_float64(implementation, inputs, tolerance, **flags):
    """Results against the float64 loop, and the gradients along one random direction against its central difference."""
    weights = make_weights(inputs)
    (y, last_state), grads = run_with_gradients(inputs, weights, implementation, **flags)
    expected_y, expected_state = exact(inputs, **flags)
    assert y.dtype == inputs["u"].dtype and last_state.dtype == jnp.float32
    assert golden.relative_error(y, expected_y) < tolerance
    assert golden.relative_error(last_state, expected_state) < 1e-5
    assert all(grads[name].dtype == inputs[name].dtype and grads[name].shape == inputs[name].shape for name in inputs)
    generator = np.random.default_rng(0)
    directions = {name: generator.standard_normal(x.shape) for name, x in inputs.items()}
    check_slope(inputs, directions, grads, weights, tolerance, **flags)


def check_slope(inputs, directions, grads, weights, tolerance, **flags):
    def value(step):
        moved = {name: np.asarray(inputs[name], np.float64) + step * directions[name] for name in directions}
        y, last_state = exact(inputs | moved, **flags)
        return np.vdot(weights[0], y) + np.vdot(weights[1], last_state)

    parts = [np.asarray(grads[name], np.float64) * directions[name] for name in directions]
    slope = sum(part.sum() for part in parts)
    size = np.sqrt(sum((part**2).sum() for part in parts))
    assert abs(slope - (value(1e-5) - value(-1e-5)) / 2e-5) < tolerance * size


@st.composite
def problems(draw):
    """Arguments of `make_inputs` and flags of `selective_scan`."""
    channels = draw(st.sampled_from([1, 3, 96, 384]))
    softplus = draw(st.booleans())
    sizes = dict(
        batch=draw(st.integers(1, 2)),
        length=draw(st.sampled_from([1, 7, 64, 196, 197, 255, 730, 1025] if channels < 96 else [1, 7, 64, 197])),
        channels=channels,
        state=draw(st.sampled_from([1, 4, 8, 16, 20])),
        groups=draw(st.sampled_from([groups for groups in (1, 3, 4) if channels % groups == 0])),
        constant=draw(st.sampled_from([(), (), ("B",), ("C",), ("B", "C")])),
        absent=draw(st.lists(st.sampled_from(["D", "z", "delta_bias", "initial_state"]), unique=True)),
        dtype=draw(st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16])),
        signed_delta=softplus,
        seed=draw(st.integers(0, 9)),
    )
    return sizes, dict(delta_softplus=softplus, reverse=draw(st.booleans()))


def check_problem(implementation, problem):
    sizes, flags = problem
    tolerance = 2e-5 if sizes["dtype"] == jnp.float32 else 1e-2
    check_against_float64(implementation, make_inputs(**sizes), tolerance, **flags)


@needs_compiler
@hypothesis.settings(deadline=None, derandomize=True, max_examples=20)
@hypothesis.given(problems())
def test_native_at_any_size(problem):
    check_problem("native", problem)


@hypothesis.settings(deadline=None, derandomize=True, max_examples=4)
@hypothesis.given(problems())
def test_sequential_at_any_size(problem):
    check_problem("sequential", problem)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("options", [{"groups": 5}, {"constant": ("B",)}, {"constant": ("B", "C")}], ids=str)
def test_each_gradient(implementation, options):
    """One argument at a time, so that no error hides behind a larger gradient."""
    inputs = make_inputs(length=19, channels=10, state=5, **options)
    weights = make_weights(inputs)
    _, grads = run_with_gradients(inputs, weights, implementation, reverse=True)
    generator = np.random.default_rng(1)
    for name in inputs:
        check_slope(inputs, {name: generator.standard_normal(inputs[name].shape)}, grads, weights, 2e-5, reverse=True)


def test_reference_agrees_with_the_recorded_vectors():
    for case in golden.cases("c01_scan_L65*"):
        inputs, results, _ = golden.scan_case(case)
        y, last_state = exact(inputs, delta_softplus=True)
        assert golden.relative_error(y, results["y"]) < 3e-6
        assert golden.relative_error(last_state, results["last_state"]) < 3e-6


# ---------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("implementation", ALL)
def test_reverse_is_flip_scan_flip(implementation):
    inputs = make_inputs(length=37)
    flipped = {name: jnp.flip(x, 1) if name in ("u", "delta", "B", "C", "z") else x for name, x in inputs.items()}
    y, last_state = run(inputs, implementation, reverse=True, delta_softplus=True)
    expected, expected_state = run(flipped, implementation, delta_softplus=True)
    np.testing.assert_allclose(y, jnp.flip(expected, 1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(last_state, expected_state, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", EXACT)
def test_a_sequence_in_two_pieces(implementation, reverse):
    inputs = make_inputs(length=70)
    whole, whole_state = run(inputs, implementation, reverse=reverse)
    pieces, state = [], inputs["initial_state"]
    for piece in (slice(41, None), slice(0, 41)) if reverse else (slice(0, 41), slice(41, None)):
        part = {name: x[:, piece] if name in ("u", "delta", "B", "C", "z") else x for name, x in inputs.items()}
        y, state = run(part | {"initial_state": state}, implementation, reverse=reverse)
        pieces.append(y)
    y = jnp.concatenate(pieces[::-1] if reverse else pieces, 1)
    np.testing.assert_allclose(y, whole, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(state, whole_state, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ALL)
def test_zero_delta_keeps_the_state(implementation):
    inputs = make_inputs(absent=("z", "delta_bias", "D"))
    inputs["delta"] = jnp.zeros_like(inputs["delta"])
    y, last_state = run(inputs, implementation)
    np.testing.assert_array_equal(last_state, inputs["initial_state"])
    expected = jnp.einsum("btn,bcn->btc", inputs["C"], inputs["initial_state"], precision="highest")
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ALL)
def test_large_exponents_forget_and_stay_finite(implementation):
    inputs = make_inputs(absent=("delta_bias",))
    inputs["A"] = inputs["A"] - 1e6
    inputs["delta"] = jnp.abs(inputs["delta"]) * 1e4 + 1
    y, last_state = run(inputs, implementation)
    expected = inputs["delta"][:, -1, :, None] * inputs["B"][:, -1, None] * inputs["u"][:, -1, :, None]
    np.testing.assert_allclose(last_state, expected, rtol=1e-6)
    assert jnp.isfinite(y).all()
    _, grads = run_with_gradients(inputs, make_weights(inputs), implementation)
    assert all(jnp.isfinite(x).all() for x in grads.values())


@pytest.mark.parametrize("implementation", ALL)
def test_nan_stays_in_its_sequence(implementation):
    inputs = make_inputs(batch=3)
    y, last_state = run(inputs, implementation)
    bad_y, bad_state = run(inputs | {"u": inputs["u"].at[1, 5, 3].set(jnp.nan)}, implementation)
    for sequence in (0, 2):
        np.testing.assert_array_equal(bad_y[sequence], y[sequence])
        np.testing.assert_array_equal(bad_state[sequence], last_state[sequence])
    assert jnp.isnan(bad_y[1, 5:, 3]).all() and jnp.isnan(bad_state[1, 3]).all()
    np.testing.assert_array_equal(bad_y[1, :5], y[1, :5])
    for name in ("delta", "z", "B", "C"):
        bad_y, _ = run(inputs | {name: inputs[name].at[1, 5, 3].set(jnp.nan)}, implementation)
        assert jnp.isnan(bad_y[1, 5]).any() and not jnp.isnan(bad_y[0]).any(), name


@pytest.mark.parametrize("implementation", EXACT)
def test_two_runs_agree_to_the_bit(implementation):
    inputs = make_inputs(batch=3, length=100, channels=130)
    weights = make_weights(inputs)
    first, second = (run_with_gradients(inputs, weights, implementation, delta_softplus=True) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("implementation", EXACT)
def test_transformations(implementation):
    """vmap over any argument, its gradient, remat and pmap give what a loop gives."""
    inputs = make_inputs(length=9, channels=6, state=4, absent=("initial_state",))
    axes = {"u": 0, "A": 0, "B": None, "z": 1}
    batched = {
        name: x if axes.get(name) is None else jnp.stack([x, x * 0.5, x * 2], axes[name]) for name, x in inputs.items()
    }

    def pick(i):
        return {name: x if axes.get(name) is None else jnp.take(x, i, axes[name]) for name, x in batched.items()}

    def loss(inputs):
        return jnp.sum(run(inputs, implementation, compiled=False, delta_softplus=True)[0] ** 2)

    gradient = jax.jit(jax.grad(loss))
    in_axes = ({name: axes.get(name) for name in inputs},)
    actual = jax.jit(jax.vmap(jax.grad(loss), in_axes=in_axes))(batched)
    remat = jax.jit(jax.grad(jax.checkpoint(loss)))(inputs)
    mapped = jax.pmap(jax.grad(loss))(jax.tree.map(lambda x: x[None], inputs))
    total = jax.jit(jax.grad(lambda x: jax.vmap(loss, in_axes=in_axes)(x).sum()))(batched)
    alone = [gradient(pick(i)) for i in range(3)]
    plain = gradient(inputs)
    for name in inputs:
        for i in range(3):
            np.testing.assert_allclose(actual[name][i], alone[i][name], rtol=1e-5, atol=1e-5)
        stacked = jnp.stack([x[name] for x in alone], axes.get(name) or 0)
        expected = stacked if axes.get(name) is not None else stacked.sum(0)
        np.testing.assert_allclose(total[name], expected, rtol=1e-5, atol=2e-5)
        np.testing.assert_array_equal(remat[name], plain[name])
        np.testing.assert_array_equal(mapped[name][0], plain[name])


ORDERS = {
    "forward": lambda f, x: jax.jvp(f, (x,), (x,)),
    "forward, compiled": lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x),
    "forward, mapped": lambda f, x: jax.jacfwd(f)(x),
    "forward over reverse": lambda f, x: jax.hessian(f)(x),
    "reverse over reverse": lambda f, x: jax.grad(lambda x: jax.grad(f)(x).sum())(x),
    "in a loop": lambda f, x: jax.jvp(lambda x: jax.lax.scan(lambda c, _: (c + f(x), None), 0.0, None, 2), (x,), (x,)),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("implementation", EXACT)
def test_other_derivatives_name_the_implementation_that_has_them(implementation, order):
    inputs = make_inputs(length=3, channels=2, state=2)

    def loss(u):
        return (selective_scan(**inputs | {"u": u}, implementation=implementation) ** 2).sum()

    with pytest.raises(TypeError, match="once, in reverse mode.*associative") as error:
        jax.block_until_ready(ORDERS[order](loss, inputs["u"]))
    assert "\n" not in str(error.value)


def test_second_derivatives_of_associative():
    inputs = make_inputs(batch=1, length=5, channels=2, state=2)
    u, direction = inputs["u"], jax.random.normal(jax.random.key(0), (1, 5, 2))

    def loss(u):
        return (selective_scan(**inputs | {"u": u}, implementation="associative") ** 2).sum()

    tangent, curvature = jit(lambda u: [jax.jvp(f, (u,), (direction,))[1] for f in (loss, jax.grad(loss))])(u)
    slope = jit(jax.grad(loss))
    numeric = (slope(u + 0.01 * direction) - slope(u - 0.01 * direction)) / 0.02  # exact: the loss is quadratic in u
    np.testing.assert_allclose(curvature, numeric, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(tangent, jnp.vdot(slope(u), direction), rtol=1e-4)


@pytest.mark.parametrize("implementation", EXACT)
def test_mixed_and_wide_dtypes(implementation):
    inputs = make_inputs()
    y, _ = run(inputs, implementation)
    wide = {name: np.asarray(x, np.float64) for name, x in inputs.items()}
    with jax.enable_x64(True):
        y64, state = run(wide, implementation)
    assert y64.dtype == jnp.float64 and state.dtype == jnp.float32
    np.testing.assert_array_equal(y64, y)

    mixed = inputs | {"u": inputs["u"].astype(jnp.bfloat16)}
    y16, _ = run(mixed, implementation)
    assert y16.dtype == jnp.bfloat16
    y, _ = run(mixed | {"u": mixed["u"].astype(jnp.float32)}, implementation)
    np.testing.assert_array_equal(y16, y.astype(jnp.bfloat16))


def temporaries(implementation, shape, batch, dtype=jnp.float32) -> float:
    """Memory of forward and backward beyond inputs and outputs, as a fraction of all states in float32."""
    states = batch * shape.length * shape.channels * shape.state * 4
    return step_memory(implementation, shape, batch, dtype).temp_size_in_bytes / states


def step_memory(implementation, shape, batch, dtype=jnp.float32):
    """XLA's analysis of a program that computes y and the gradients of all inputs."""
    size = batch, shape.length, shape.channels
    long, matrix = (
        jax.ShapeDtypeStruct(size, dtype),
        jax.ShapeDtypeStruct((*size[:2], shape.groups, shape.state), dtype),
    )
    vector = jax.ShapeDtypeStruct((shape.channels,), jnp.float32)
    A = jax.ShapeDtypeStruct((shape.channels, shape.state), jnp.float32)
    inputs = dict(u=long, delta=long, A=A, B=matrix, C=matrix, D=vector, z=long, delta_bias=vector)

    def step(inputs, weights):
        function = functools.partial(selective_scan, delta_softplus=True, implementation=implementation)
        y, pullback = jax.vjp(lambda x: function(**x), inputs)
        return y, pullback(weights)

    return jax.jit(step).lower(inputs, long).compile().memory_analysis()


@needs_compiler
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("vim")])
def test_memory_of_native(name, batch):
    assert temporaries("native", SHAPES[name], batch) < 1 / 8


@pytest.mark.parametrize(
    ("name", "batch", "dtype"),
    [
        ("vim_tiny", 1, jnp.float32),
        ("vim_tiny", 1, jnp.bfloat16),
        ("vim_base", 16, jnp.float32),
        ("vim_tiny_stride8", 1, jnp.float16),
        ("vim_tiny_stride8", 64, jnp.float32),
    ],
)
def test_memory_of_sequential(name, batch, dtype):
    assert temporaries("sequential", SHAPES[name], batch, dtype) < 0.4


def test_memory_of_associative():
    memory = step_memory("associative", SHAPES["vim_tiny_stride8"], 8)
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert memory.temp_size_in_bytes < 1.5 * arrays


# ------------------------------------------------------------------------------------------------ choice and bad input


def test_without_a_compiler_the_choice_falls_on_sequential(monkeypatch, caplog):
    inputs = ScanInputs(**make_inputs())
    monkeypatch.setattr(native, "why_unavailable", lambda platform, inputs: "no C++ compiler")
    with caplog.at_level(logging.WARNING):
        assert IMPLEMENTATIONS.choose(inputs) == IMPLEMENTATIONS.choose(inputs) == "sequential"
    assert [record.message for record in caplog.records] == [
        "selective scan runs as 'sequential'; 'native' cannot run: no C++ compiler"
    ]
    with pytest.raises(ValueError, match="implementation: 'native' cannot run here: no C\\+\\+ compiler"):
        run(make_inputs(), "native")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_implementations_say_where_they_run(platform):
    inputs = ScanInputs(**make_inputs())
    reason = None if platform == "gpu" else f"it needs a GPU, and JAX runs on {platform} here"
    assert pallas.why_unavailable(platform, inputs) == reason
    if platform != "cpu":
        assert native.why_unavailable(platform, inputs) == f"it is for CPUs, and JAX runs on {platform} here"


def test_an_axis_that_pallas_cannot_count_is_named():
    inputs = ScanInputs(**make_inputs())._replace(u=jax.ShapeDtypeStruct((1, 2**31, 20), jnp.bfloat16))
    assert "u has shape (1, 2147483648, 20)" in pallas.why_unavailable("gpu", inputs)


BAD = {
    "u: it is None": dict(u=None),
    "B: it is None": dict(B=None),
    "u: shape is (20, 3)": dict(u=jnp.ones((20, 3))),
    "u: shape is (2, 0, 20)": dict(u=jnp.ones((2, 0, 20))),
    "delta: shape is (2, 32, 20), expected (2, 33, 20)": dict(delta=jnp.ones((2, 32, 20))),
    "A: shape is (21, 16), expected (20, state) for u of shape (2, 33, 20)": dict(A=-jnp.ones((21, 16))),
    "A: dtype is complex64": dict(A=jnp.ones((20, 16), jnp.complex64)),
    "B: shape is (2, 33, 15)": dict(B=jnp.ones((2, 33, 15))),
    "B: shape is (2, 33, 3, 16)": dict(B=jnp.ones((2, 33, 3, 16))),
    "C: shape is (20, 15)": dict(C=jnp.ones((20, 15))),
    "C: shape is (16,)": dict(C=jnp.ones((16,))),
    "D: shape is (1,), expected (20,)": dict(D=jnp.ones((1,))),
    "z: shape is (1, 33, 20), expected (2, 33, 20)": dict(z=jnp.ones((1, 33, 20))),
    "z: dtype is int32": dict(z=jnp.ones((2, 33, 20), jnp.int32)),
    "delta_bias: shape is (16,)": dict(delta_bias=jnp.ones((16,))),
    "initial_state: shape is (2, 16, 20), expected (2, 20, 16)": dict(initial_state=jnp.ones((2, 16, 20))),
    "implementation: unknown 'cuda'": dict(implementation="cuda"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError) as error:
        selective_scan(**make_inputs() | BAD[message])
    text = str(error.value)
    assert text.startswith(message) and "\n" not in text


@pytest.mark.parametrize("implementation", ALL)
def test_gradients_of_repeated_groups_are_rounded_once(implementation):
    """B has one group, C as many as there are channels; in 16 bits their parts must not be rounded before the sum."""
    inputs = make_inputs(batch=1, length=5, channels=64, state=4, groups=64, dtype=jnp.bfloat16)
    inputs["B"] = inputs["B"][:, :, 0]
    exact = {name: x.astype(jnp.float32) for name, x in inputs.items()}
    weights = make_weights(inputs)
    _, grads = run_with_gradients(inputs, weights, implementation)
    _, expected = run_with_gradients(exact, weights, implementation)
    np.testing.assert_allclose(np.float32(grads["B"]), expected["B"], rtol=2**-8, atol=2e-2)


@pytest.mark.parametrize("implementation", ALL)
def test_softplus_has_its_slope_where_it_becomes_the_identity(implementation):
    inputs = make_inputs(batch=1, length=1, channels=1, state=1, absent=("z", "D", "delta_bias", "initial_state"))
    slopes = []
    for delta in (20.0, 19.999):
        _, grads = run_with_gradients(
            inputs | {"delta": jnp.full((1, 1, 1), delta), "A": jnp.full((1, 1), -1.0)},
            make_weights(inputs),
            implementation,
            delta_softplus=True,
        )
        slopes.append(grads["delta"].item())
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-3)


def test_groups_of_b_and_c_may_differ():
    inputs = make_inputs(channels=12, groups=4)
    inputs["C"] = inputs["C"][:, :, 0]
    y, _ = run(inputs, "associative")
    assert golden.relative_error(y, exact(inputs)[0]) < 1e-5
