"""Scans over several devices: the results of one device, and nothing moved but sums of gradients."""

import contextlib
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

from kernels import build, selective_scan

IMPLEMENTATIONS = [*(["native"] if build.compiler() else []), "sequential", "associative"]


def run_on(devices: int, check: str) -> None:
    """Runs a function of this module in a process that has so many devices."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_differentiation; test_differentiation.{check}()"
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | dict(XLA_FLAGS=flags, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def problem(groups: int) -> tuple[dict, dict]:
    """Arguments of a scan, and how they are split over the axes "data" and "model" of a mesh."""
    batch, length, channels, state = 8, 11, 8, 3
    long, matrix = (P("data", None, "model"), (batch, length, channels)), (P("model"), (channels, state))
    varying = P("data", None, "model" if groups > 1 else None), (batch, length, groups, state)
    arrays = dict(u=long, delta=long, A=matrix, B=varying, C=varying if groups > 1 else matrix, z=long)
    arrays |= dict(D=(P("model"), (channels,)), initial_state=(P("data", "model"), (batch, channels, state)))
    generator = np.random.default_rng(0)
    inputs = {name: jnp.float32(generator.standard_normal(shape)) for name, (_, shape) in arrays.items()}
    return inputs | dict(A=-jnp.exp(inputs["A"])), {name: spec for name, (spec, _) in arrays.items()}


def results_of(implementation: str):
    """A function of the arguments: (y, last state)."""
    options = dict(delta_softplus=True, return_last_state=True, implementation=implementation)
    return lambda inputs: selective_scan(**inputs, **options)


def gradients_of(results):
    """A function of the arguments: the gradient of a loss, and the results."""

    def loss(inputs):
        y, last_state = results(inputs)
        return (y**2).sum() + (last_state**3).sum(), (y, last_state)

    return jax.jit(jax.grad(loss, has_aux=True))


def compare(compiled, inputs: dict, expected) -> None:
    """The program returns what is expected, and moves no arrays between devices."""
    assert not re.findall(r"all-gather|all-to-all|collective-permute", compiled.as_text())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4), compiled(inputs), expected)


def check_meshes() -> None:
    """Automatic and explicit axes; four devices split the channels, too."""
    shape = (jax.device_count() // 2, 2) if jax.device_count() > 2 else (2, 1)
    for implementation in IMPLEMENTATIONS:
        for groups, kind in (1, AxisType.Auto), (2, AxisType.Explicit):
            inputs, specs = problem(groups)
            function, forward = gradients_of(results_of(implementation)), jax.jit(results_of(implementation))
            expected = function(inputs)
            mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))
            with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
                split = jax.device_put(inputs, {name: NamedSharding(mesh, specs[name]) for name in inputs})
                compare(function.lower(split).compile(), split, expected)
                compare(forward.lower(split).compile(), split, expected[1])


def check_shard_map() -> None:
    """Gradients of arguments that every device holds are added up."""
    inputs, specs = problem(1)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    specs = {name: P("data") if "data" in spec else P() for name, spec in specs.items()}
    for implementation in IMPLEMENTATIONS:
        results = results_of(implementation)
        expected = gradients_of(results)(inputs)
        mapped = jax.shard_map(results, mesh=mesh, in_specs=(specs,), out_specs=P("data"))
        compare(gradients_of(mapped).lower(inputs).compile(), inputs, expected)


def check_uneven() -> None:
    """What cannot be split into equal parts is not split; the results are the same."""
    inputs, specs = problem(2)
    inputs = {name: x[:6] if "data" in specs[name] else x for name, x in inputs.items()}
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))

    def constrained(inputs, results):
        split, whole = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
        shardings = {name: split if "data" in specs[name] else whole for name in inputs}
        return results(jax.lax.with_sharding_constraint(inputs, shardings))

    for implementation in IMPLEMENTATIONS:
        results = results_of(implementation)
        actual = gradients_of(lambda inputs, results=results: constrained(inputs, results))(inputs)
        expected = gradients_of(results)(inputs)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4), actual, expected)


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_compute_what_they_hold(devices):
    run_on(devices, "check_meshes")


@pytest.mark.parametrize("devices", [2, 4])
def test_the_gradient_in_shard_map(devices):
    run_on(devices, "check_shard_map")


def test_parts_of_different_sizes():
    run_on(4, "check_uneven")
