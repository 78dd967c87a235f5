"""Runs small networks of every family over several virtual devices, forward and backward: logits and gradients must be
those of one device, and the devices may add up gradients but not exchange activations.

    python scripts/check_sharding.py [--devices 2 4] [--families vim v2m]

Each number of devices gets a batch split over an automatic mesh, an explicit one, and `jax.shard_map`.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "models")]

from test_all_models import small  # noqa: E402

FAMILIES = ("vim", "local_vim", "v2m", "vmamba", "vmamba2", "local_vmamba", "efficient_vmamba")


def with_gradient(logits: Callable) -> Callable:
    """A compiled function of variables and images: gradients of a loss, and the logits."""

    def loss(params, rest, images):
        outputs = logits({"params": params} | rest, images)
        return jnp.square(outputs).sum(), outputs

    def results(variables, images):
        rest = {name: tree for name, tree in variables.items() if name != "params"}
        return jax.grad(loss, has_aux=True)(variables["params"], rest, images)

    return jax.jit(results)


def compare(compiled: jax.stages.Compiled, arguments: tuple, expected) -> None:
    """Checks that the program returns what is expected and moves nothing but sums."""
    moved = re.findall(r"all-gather|all-to-all|collective-permute", compiled.as_text())
    assert not moved, f"the devices exchange arrays: {len(moved)} times {sorted(set(moved))}"
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * scale)  # noqa: E731
    jax.tree.map(close, compiled(*arguments), expected)


def check(family: str) -> None:
    """Compares all devices of this process with one of them."""
    model, images = small(f"{family}_tiny"), jax.random.uniform(jax.random.key(0), (4, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    expected = with_gradient(model.apply)(variables, images)
    for kind in AxisType.Auto, AxisType.Explicit:
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
            whole = jax.device_put(variables, NamedSharding(mesh, P()))
            split = jax.device_put(images, NamedSharding(mesh, P("data")))
            compare(with_gradient(model.apply).lower(whole, split).compile(), (whole, split), expected)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(model.apply, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    compare(with_gradient(mapped).lower(variables, images).compile(), (variables, images), expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process, which has the devices
    arguments = parser.parse_args()
    if arguments.here:
        for family in arguments.families:
            check(family)
            print(f"{jax.device_count()} devices, {family}: equal, nothing exchanged", flush=True)
        return
    for devices in arguments.devices:
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        command = [sys.executable, __file__, "--here", "--families", *arguments.families]
        if status := subprocess.run(command, env=environment, cwd=ROOT).returncode:
            sys.exit(status)


if __name__ == "__main__":
    main()
