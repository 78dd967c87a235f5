"""The C++ kernel: its arithmetic and its threads."""

import concurrent.futures
import hashlib
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import build, selective_scan

needs_compiler = pytest.mark.skipif(not build.compiler(), reason="no C++ compiler")


def one_step(u, delta, A, B=0.0, C=1.0, D=None, z=None, initial_state=0.0, delta_softplus=False) -> np.ndarray:
    """y for scalars and (count,) arrays, each number a sequence of its own of one step, one channel and one state."""
    count = max(np.size(x) for x in (u, delta, z, D) if x is not None)

    def long(x):
        return None if x is None else jnp.broadcast_to(jnp.asarray(x), (count,)).reshape(1, 1, count)

    def parameter(x):
        return None if x is None else jnp.full((count,), x, jnp.float32)

    matrices = (jnp.full((count, 1), x, jnp.float32) for x in (A, B, C))
    state = jnp.full((1, count, 1), initial_state, jnp.float32)
    flags = dict(initial_state=state, delta_softplus=delta_softplus, implementation="native")
    return np.asarray(selective_scan(long(u), long(delta), *matrices, parameter(D), long(z), **flags))[0, 0]


@needs_compiler
def test_exponential():
    x = np.float32(np.linspace(-87, 88, 200_001))
    y = one_step(u=np.float32(0), delta=x, A=1.0, initial_state=1.0)
    np.testing.assert_allclose(y, np.exp(np.float64(x)), rtol=6e-6)  # x log2(e) is rounded: error grows with |x|
    near = abs(x) < 1
    np.testing.assert_allclose(y[near], np.exp(np.float64(x[near])), rtol=2.5e-7)
    slow = np.float32(np.linspace(-0.01, 0, 10_001))  # where errors add up over many steps
    y = one_step(u=np.float32(0), delta=slow, A=1.0, initial_state=1.0)
    np.testing.assert_allclose(y, np.exp(np.float64(slow)), rtol=1e-7)
    limits = one_step(u=np.float32(0), delta=np.float32([0, -1e30, -88, 89, 1e30, np.nan]), A=1.0, initial_state=1.0)
    np.testing.assert_array_equal(limits, np.float32([1, 0, 0, np.inf, np.inf, np.nan]))


@needs_compiler
def test_softplus_and_silu():
    x = np.float32(np.linspace(-80, 80, 200_001))
    softplus = one_step(u=np.float32(1), delta=x, A=-1.0, B=1.0, delta_softplus=True)
    np.testing.assert_allclose(softplus, np.logaddexp(0, np.float64(x)), rtol=4e-7)
    silu = one_step(u=np.float32(1), delta=np.float32(0), A=-1.0, D=1.0, z=x)
    np.testing.assert_allclose(silu, x / (1 + np.exp(-np.float64(x))), rtol=4e-7)
    large = np.float32([-1e4, 1e4])
    np.testing.assert_array_equal(one_step(np.float32(1), large, A=-1.0, B=1.0, delta_softplus=True), [0, 1e4])


@needs_compiler
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@np.errstate(invalid="ignore")  # on ARM, NumPy warns of a signalling NaN
def test_every_16_bit_number_is_read_and_rounded_as_jax_does(dtype):
    u = jax.lax.bitcast_convert_type(jnp.arange(1 << 16, dtype=jnp.uint16), dtype)
    for factor in (1.0, 1.0009765625, 1 / 3, 2.0**-8.3):
        y = one_step(u=u, delta=jnp.zeros((), dtype), A=-1.0, D=factor)
        expected = (u.astype(jnp.float32) * np.float32(factor)).astype(dtype)
        finite = np.isfinite(np.float32(u))  # 0 * infinity entered the state
        expected_zero = abs(np.float32(expected)) < float(jnp.finfo(dtype).tiny)  # bfloat16: flushed to zero
        same = np.float32(y) == np.float32(expected)
        assert (same | (expected_zero if dtype == jnp.bfloat16 else False))[finite].all()
        assert np.isnan(np.float32(y))[~finite].all()


def large_problem() -> dict:
    keys = jax.random.split(jax.random.key(0), 5)
    shape = 3, 300, 200
    return dict(
        u=jax.random.normal(keys[0], shape),
        delta=jax.random.normal(keys[1], shape),
        A=-jnp.exp(jax.random.normal(keys[2], (200, 16))),
        B=jax.random.normal(keys[3], (3, 300, 16)),
        C=jax.random.normal(keys[4], (3, 300, 16)),
    )


@jax.jit
def large_gradient(inputs: dict) -> dict:
    return jax.grad(lambda x: selective_scan(**x, delta_softplus=True, implementation="native").sum())(inputs)


def digest(tree) -> str:
    """Of all bits of all arrays."""
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))).hexdigest()


@needs_compiler
def test_many_callers_at_once_get_the_same_bits():
    inputs = large_problem()
    expected = digest(large_gradient(inputs))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: digest(large_gradient(inputs)), range(24))) == {expected}


def run_python(code: str, **environment) -> str:
    header = f"import sys; sys.path[:0] = {sys.path!r}\n"
    result = subprocess.run(
        [sys.executable, "-c", header + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_one_thread_and_several_devices_get_the_same_bits():
    code = """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import jax, jax.numpy as jnp
        from test_native import digest, large_gradient, large_problem
        inputs = large_problem()
        mapped = jax.pmap(large_gradient)(jax.tree.map(lambda x: jnp.stack([x] * 4), inputs))
        (bits,) = {digest(jax.tree.map(lambda x: x[i], mapped)) for i in range(4)}
        assert digest(large_gradient(inputs)) == bits
        print(bits)
    """
    output = run_python(code, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert output == digest(large_gradient(large_problem()))


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_it_runs_in_a_fork():
    """A fork has none of XLA's threads: JAX itself can run there only what was compiled before, synchronously."""
    code = """
        import os, warnings, jax
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        from test_native import digest, large_gradient, large_problem
        inputs = large_problem()
        gradient = large_gradient.lower(inputs).compile()  # JAX 0.12 forgets in a fork what it compiled by itself
        bits = digest(gradient(inputs))
        warnings.simplefilter("ignore")
        child = os.fork()
        if child == 0:
            os._exit(0 if digest(gradient(inputs)) == bits else 1)
        assert os.waitpid(child, 0)[1] == 0 and digest(gradient(inputs)) == bits
    """
    run_python(code)
