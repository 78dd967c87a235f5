"""Every implementation of the selective scan against the recorded vectors of the original code."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import selective_scan

IMPLEMENTATIONS = ["native", "sequential"]


def recorded(case: str) -> tuple[dict, dict, dict]:
    """Inputs in this project's layout, expected results and expected gradients by argument, of one recorded case."""
    arrays = {}
    for name, x in golden.tensors(case).items():
        short = name.removeprefix("grad_")
        if x.ndim == 4:  # (batch, groups, state, length)
            x = np.moveaxis(x, 3, 1)
        elif x.ndim == 3 and short != "last_state":  # (batch, channels or state, length)
            x = np.swapaxes(x, 1, 2)
        arrays[name] = x
    gradients = {name.removeprefix("grad_"): arrays.pop(name) for name in list(arrays) if name.startswith("grad_")}
    results = {name: arrays.pop(name) for name in ("y", "last_state", "dy")}
    return arrays, results, gradients


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", golden.cases("c01_scan_*"))
def test_recorded_results_and_gradients(case, implementation, reverse):
    inputs, results, gradients = recorded(case)

    def flip(x):
        return jnp.flip(x, 1) if reverse and x.ndim > 2 else x

    def loss(inputs):
        y, last_state = selective_scan(
            **{name: flip(x) for name, x in inputs.items()},
            delta_softplus=golden.meta(case)["constructor"]["delta_softplus"],
            reverse=reverse,
            return_last_state=True,
            implementation=implementation,
        )
        y = flip(y)
        return (y * results["dy"]).sum(), (y, last_state)

    (_, (y, last_state)), actual = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    assert golden.relative_error(y, results["y"]) < 1e-5
    assert golden.relative_error(last_state, results["last_state"]) < 1e-5
    assert actual.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert golden.relative_error(actual[name], expected) < 2e-5, name
