"""Depthwise convolutions: results and gradients beside a plain loop, dtypes, `vmap`, several devices."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import build, depthwise_convolution, use

IMPLEMENTATIONS = [*(["native"] if build.compiler() else []), "shifted", "plain"]
# Shape of x, of the filter, zeros before. Channels fill vectors of any machine or leave some over; one map is smaller
# than the filter, and one is large enough for several threads.
CASES = {
    "square": ((2, 5, 7, 37), (3, 3), (1, 1)),
    "causal": ((3, 1, 9, 16), (1, 4), (0, 3)),
    "anti-causal": ((1, 1, 20, 5), (1, 4), (0, 0)),
    "one position": ((2, 1, 1, 3), (3, 3), (1, 1)),
    "threads": ((2, 16, 20, 80), (3, 3), (1, 1)),
}


def problem(shape: tuple, filter_size: tuple, dtype=jnp.float32):
    """x, kernel, bias, and a gradient of the result."""
    generator = np.random.default_rng(0)
    x, kernel, bias, dy = (
        jnp.float32(generator.standard_normal(size)) for size in (shape, (*filter_size, shape[-1]), shape[-1:], shape)
    )
    return x.astype(dtype), kernel, bias, dy.astype(dtype)


def expected(x, kernel, bias, dy, before, silu):
    """The result and the gradients of x, kernel and bias, in float64, tap by tap."""
    x, kernel, bias, dy = (np.asarray(array, np.float64) for array in (x, kernel, bias, dy))
    (rows, columns), (height, width) = kernel.shape[:2], x.shape[1:3]
    padded = np.pad(x, ((0, 0), *((n, size - 1 - n) for n, size in zip(before, (rows, columns))), (0, 0)))
    places = {
        (i, j): (slice(None), slice(i, i + height), slice(j, j + width)) for i in range(rows) for j in range(columns)
    }
    y = bias + sum(padded[place] * kernel[tap] for tap, place in places.items())
    sigmoid = 1 / (1 + np.exp(-y))
    slope = sigmoid * (1 + y * (1 - sigmoid)) if silu else 1
    gradient, dpadded, dkernel = dy * slope, np.zeros_like(padded), np.zeros_like(kernel)
    for tap, place in places.items():
        dpadded[place] += gradient * kernel[tap]
        dkernel[tap] = (gradient * padded[place]).sum((0, 1, 2))
    inside = slice(before[0], before[0] + height), slice(before[1], before[1] + width)
    return y * sigmoid if silu else y, (dpadded[:, *inside], dkernel, gradient.sum((0, 1, 2)))


def results(x, kernel, bias, dy, **options):
    y, pull = jax.vjp(lambda *arrays: depthwise_convolution(*arrays, **options), x, kernel, bias)
    return y, pull(dy)


def assert_close(actual, expected, tolerance: float) -> None:
    for value, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.float64(value), reference, rtol=tolerance, atol=tolerance * np.abs(reference).max()
        )


@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_results_and_gradients(implementation, case, silu):
    shape, size, before = CASES[case]
    arrays = problem(shape, size)
    actual = jax.jit(results, static_argnames=("before", "silu", "implementation"))(
        *arrays, before=before, silu=silu, implementation=implementation
    )
    assert_close(actual, expected(*arrays, before, silu), 2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_rounded_once(implementation):
    shape, size, before = CASES["square"]
    arrays = problem(shape, size, jnp.bfloat16)
    y, gradients = results(*arrays, before=before, silu=True, implementation=implementation)
    assert y.dtype == gradients[0].dtype == jnp.bfloat16
    assert [x.dtype for x in gradients[1:]] == [jnp.float32] * 2
    assert_close(y, expected(*arrays, before, True)[0], 2**-8)
    assert_close(gradients, expected(*arrays, before, True)[1], 2e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_not_a_number_stays_and_large_numbers_are_finite(implementation):
    x = jnp.array([jnp.nan, 1e4, -1e4, 0])[None, :, None, None] * jnp.ones(20)
    kernel = jnp.zeros((3, 3, 20)).at[1, 1].set(1)
    y = depthwise_convolution(x, kernel, before=(1, 1), silu=True, implementation=implementation)
    assert np.isnan(y[0, 0]).all()
    np.testing.assert_allclose(y[0, 3, 0], 0, atol=1e-30)
    alone = depthwise_convolution(x[:, 1:], kernel, before=(1, 1), silu=True, implementation=implementation)
    np.testing.assert_allclose(alone[0, :, 0, 0], [1e4, 0, 0], atol=1e-30)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_over_everything(implementation):
    shape, size, before = CASES["square"]
    arrays = problem(shape, size)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), arrays)

    def function(*arrays):
        return results(*arrays, before=before, silu=True, implementation=implementation)

    actual = jax.vmap(function)(*stacked)
    alone = [function(*(x[k] for x in stacked)) for k in range(2)]
    assert_close(actual, jax.tree.map(lambda *x: np.float64(jnp.stack(x)), *alone), 1e-5)


def test_a_filter_that_does_not_fit():
    with pytest.raises(ValueError, match=r"^kernel: shape is \(3, 3, 4\), expected .* for x of \(1, 2, 2, 5\)"):
        depthwise_convolution(jnp.ones((1, 2, 2, 5)), jnp.ones((3, 3, 4)), before=(1, 1))


@pytest.mark.skipif(not build.compiler(), reason="no C++ compiler")
def test_other_filters_are_not_native():
    x, kernel = jnp.ones((1, 6, 6, 2)), jnp.ones((5, 5, 2))
    with pytest.raises(ValueError, match="it has filters of 3 by 3 and 1 by 4, not of"):
        depthwise_convolution(x, kernel, before=(2, 2), implementation="native")


@pytest.mark.skipif(not build.compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("check", ["check_split_arrays", "check_shard_map"])
def test_two_devices(check):
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_convolution; test_convolution.{check}()"
    environment = os.environ | dict(XLA_FLAGS="--xla_force_host_platform_device_count=2")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def check_split_arrays() -> None:
    """Images or channels are split over devices, by the partitioner or by explicit axes: only sums are moved."""
    shape, size, before = CASES["threads"]
    arrays = problem(shape, size)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2,), ("part",), axis_types=(kind,))
        images, channels = P("part"), P(None, None, None, "part")
        for split in ((images, P(), P(), images), (channels, P(None, None, "part"), P("part"), channels)):
            placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, split)]
            with jax.set_mesh(mesh), use(convolution="native"):
                program = jax.jit(results, static_argnames=("before", "silu"))
                compiled = program.lower(*placed, before=before, silu=True).compile()
                actual = compiled(*placed)
            assert not re.findall(r"all-gather|all-to-all|collective-permute", compiled.as_text()), (kind, split)
            assert actual[0].sharding.is_equivalent_to(placed[0].sharding, 4)
            assert_close(actual, expected(*arrays, before, True), 2e-6)


def check_shard_map() -> None:
    """Every device has a part of the images; gradients of what all share are summed."""
    shape, size, before = CASES["threads"]
    arrays = problem(shape, size)
    mesh = jax.make_mesh((2,), ("part",), axis_types=(AxisType.Auto,))
    parts = P("part"), P(), P(), P("part")

    def part(*arrays):
        return results(*arrays, before=before, silu=True, implementation="native")

    mapped = jax.shard_map(part, mesh=mesh, in_specs=parts, out_specs=(parts[0], parts[:3]))
    assert_close(jax.jit(mapped)(*arrays), expected(*arrays, before, True), 2e-6)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_orders(implementation, shared):
    """Groups that convolve a sequence in orders of their own give what each gives alone on a gathered sequence."""
    groups, channels, length = 3, 20, 11
    x, kernel, bias, dy = problem((2, 1, length, groups * channels), (1, 4))
    x = x[..., :channels] if shared else x
    order = np.stack([np.random.default_rng(seed).permutation(length) for seed in range(groups)])

    def alone(x, kernel, bias):
        parts = []
        for group, steps in enumerate(order):
            part = slice(group * channels, (group + 1) * channels)
            own = x if shared else x[..., part]
            y = depthwise_convolution(
                own[:, :, steps], kernel[..., part], bias[part], before=(0, 3), silu=True, implementation="plain"
            )
            parts.append(y[:, :, np.argsort(steps)])
        return jnp.concatenate(parts, axis=-1)

    y, pull = jax.vjp(alone, x, kernel, bias)
    options = dict(before=(0, 3), silu=True, order=order, implementation=implementation)
    assert_close(results(x, kernel, bias, dy, **options), (y, pull(dy)), 5e-6)


@pytest.mark.skipif(not build.compiler(), reason="no C++ compiler")
def test_an_order_that_visits_a_position_twice():
    arrays = jnp.ones((1, 1, 3, 2)), jnp.ones((1, 4, 2))
    with pytest.raises(Exception, match="an order that visits a position twice"):
        depthwise_convolution(*arrays, before=(0, 3), order=np.array([[0, 1, 1]]), implementation="native")
    with pytest.raises(ValueError, match=r"^order: shape is \(1, 2\), expected \(groups, 3\)"):
        depthwise_convolution(*arrays, before=(0, 3), order=np.array([[0, 1]]))
