"""Scans that follow an order of traversal, by implementations that do so themselves and by those that gather."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import build, selective_scan
from kernels.scan import reference
from kernels.scan.inputs import ScanInputs, ScanOptions

needs_compiler = pytest.mark.skipif(not build.compiler(), reason="no C++ compiler")
NATIVE = pytest.param("native", marks=needs_compiler)

BATCH, GROUPS, CHANNELS, STATE, POSITIONS = 2, 3, 10, 5, 37


def make_order(padding: int) -> np.ndarray:
    """(GROUPS, POSITIONS + padding), a random order in each group, with steps without position among the others."""
    steps = np.concatenate([np.arange(POSITIONS), np.full(padding, -1)])
    generator = np.random.default_rng(0)
    return np.stack([generator.permutation(steps) for _ in range(GROUPS)]).astype(np.int32)


def make_inputs(shared: str | bool, constant: str, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random arguments with all that is optional; `shared`: all groups read the same u and z, or "z" alone."""
    generator = np.random.default_rng(1)

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(generator.standard_normal(shape, np.float32), dtype)

    channels = GROUPS * CHANNELS
    matrix = BATCH, POSITIONS, GROUPS, STATE
    return dict(
        u=normal(BATCH, POSITIONS, CHANNELS if shared is True else channels, dtype=dtype),
        delta=normal(BATCH, POSITIONS, channels, dtype=dtype),
        A=-jnp.exp(normal(channels, STATE)),
        B=normal(*matrix, dtype=dtype),
        C=normal(channels, STATE) if constant == "C" else normal(*matrix, dtype=dtype),
        D=normal(channels),
        z=normal(BATCH, POSITIONS, CHANNELS if shared else channels, dtype=dtype),
        delta_bias=normal(channels),
        initial_state=normal(BATCH, channels, STATE),
    )


def exact(inputs: dict, order: np.ndarray, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
    """(y, last state) by the float64 loop, of arrays that NumPy permutes."""

    def sequences(x):
        x = np.asarray(x, np.float64)
        parts = x if x.ndim == 4 else x.reshape(*x.shape[:2], -1, CHANNELS)
        parts = np.pad(
            np.broadcast_to(parts, (*parts.shape[:2], GROUPS, parts.shape[3])), ((0, 0), (0, 1), (0, 0), (0, 0))
        )
        parts = np.stack([parts[:, steps, group] for group, steps in enumerate(order)], axis=2)
        return parts if x.ndim == 4 else parts.reshape(*parts.shape[:2], -1)

    varying = {name: sequences(x) for name, x in inputs.items() if name in ("u", "delta", "z", "B", "C") and x.ndim > 2}
    y, last_state = reference.scan(ScanInputs(**inputs | varying), ScanOptions(True, reverse))
    y = y.reshape(*y.shape[:2], GROUPS, CHANNELS)
    result = np.zeros((BATCH, POSITIONS, GROUPS, CHANNELS))
    for group, steps in enumerate(order):
        result[:, steps[steps >= 0], group] = y[:, steps >= 0, group]
    return result.reshape(BATCH, POSITIONS, -1), last_state


@pytest.mark.parametrize("implementation", [NATIVE, "sequential", "plain", "associative"])
@pytest.mark.parametrize(
    ("padding", "shared", "constant", "reverse"),
    [(0, True, "", False), (12, True, "", True), (12, False, "C", False), (0, False, "", True), (0, "z", "", False)],
)
def test_results_lie_where_the_inputs_do(implementation, padding, shared, constant, reverse):
    inputs, order = make_inputs(shared, constant), make_order(padding)
    options = dict(delta_softplus=True, reverse=reverse, return_last_state=True, implementation=implementation)
    results = jax.jit(lambda x, order: selective_scan(**x, order=order, **options))(inputs, order)
    for actual, expected in zip(results, exact(inputs, order, reverse)):
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5)


@needs_compiler
@pytest.mark.parametrize(
    ("padding", "shared", "constant"), [(0, True, ""), (12, True, "C"), (12, False, ""), (0, "z", "")]
)
def test_gradients_of_native_are_those_of_gathering(padding, shared, constant):
    inputs, order = make_inputs(shared, constant), make_order(padding)

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(inputs, implementation):
        def loss(inputs):
            y, last_state = selective_scan(
                **inputs, delta_softplus=True, return_last_state=True, order=order, implementation=implementation
            )
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(last_state))

        return jax.grad(loss)(inputs)

    for name, expected in gradients(inputs, "associative").items():
        actual = gradients(inputs, "native")[name]
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4, err_msg=name)


@needs_compiler
def test_native_in_bfloat16_and_under_vmap():
    inputs, orders = make_inputs(True, "", jnp.bfloat16), np.stack([make_order(0), make_order(0)[:, ::-1]])

    def scan(order, implementation="native"):
        return selective_scan(**inputs, delta_softplus=True, order=order, implementation=implementation)

    mapped = jax.vmap(scan)(orders)
    assert mapped.dtype == jnp.bfloat16
    for actual, order in zip(mapped, orders):
        np.testing.assert_array_equal(actual, scan(order))
        np.testing.assert_allclose(np.float32(actual), np.float32(scan(order, "sequential")), rtol=2**-7, atol=2**-7)


@needs_compiler
@pytest.mark.parametrize("wrong", [1, POSITIONS])
def test_native_refuses_an_order_that_leaves_out_a_position(wrong):
    order = np.tile(np.arange(POSITIONS, dtype=np.int32), (GROUPS, 1))
    order[1, 0] = wrong
    with pytest.raises(Exception, match="order visits a position twice or never"):
        jax.block_until_ready(selective_scan(**make_inputs(True, ""), order=order, implementation="native"))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (np.zeros((GROUPS, POSITIONS), np.float32), "order: dtype is float32"),
        (np.zeros(POSITIONS, np.int32), "order: shape is"),
        (np.zeros((4, POSITIONS), np.int32), "order: shape is"),
        (np.zeros((1, POSITIONS), np.int32), "B: shape is"),
    ],
)
def test_bad_orders_are_named(order, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**make_inputs(False, ""), order=order)
