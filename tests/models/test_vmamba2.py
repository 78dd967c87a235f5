"""VMamba's second release against figures of the original code for weights set by a rule, and its sizes."""

import functools

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vimd_jax.models.vmamba2 import VMamba2
from weight_convert import convert_state_dict, export_state_dict
from weight_convert.mapping import plan

SMALL = VMamba2(num_classes=5, image_size=40, dims=8, depths=(2, 1))


@functools.cache
def variables_by_rule(expand: int):
    model = SMALL.clone(expand=expand)
    weights = golden_models.weights_by_rule({entry.source: entry.shape for entry in plan(model)})
    return convert_state_dict(weights, model)


@pytest.mark.parametrize(
    ("expand", "size", "expected", "total", "length"),
    [
        (2, (40, 40), [0.332215, 0.076697, -0.189282, -0.430927, -0.616572], -1.806158, 1.267980),
        (2, (40, 56), [0.165031, -0.051388, -0.261557, -0.437965, -0.557453], -2.079376, 1.061930),
        (1, (40, 40), [-0.186685, -0.199497, -0.186739, -0.149979, -0.093870], -1.055495, 0.390804),
        (1, (40, 56), [-0.065820, -0.086780, -0.096875, -0.094692, -0.080373], -0.420436, 0.196496),
    ],
)
def test_logits_of_weights_by_rule(expand, size, expected, total, length):
    model, images = SMALL.clone(expand=expand), golden_models.nhwc(golden_models.images_by_rule((2, 3, *size)))
    logits = jax.jit(model.apply)(variables_by_rule(expand), images)
    np.testing.assert_allclose(logits[0], expected, atol=1e-5)
    assert float(logits.sum()) == pytest.approx(total, abs=1e-5)
    assert float(jnp.linalg.norm(logits)) == pytest.approx(length, abs=1e-5)


def test_odd_sizes_are_rounded_up():
    images = jnp.zeros((1, 41, 58, 3))
    _, features = jax.eval_shape(functools.partial(SMALL.apply, return_features=True), variables_by_rule(2), images)
    assert [x.shape[1:3] for x in features["hidden_states"]] == [(11, 15), (6, 8)]


@pytest.mark.parametrize("convolutions", [False, True], ids=["linear", "1x1 convolutions"])
def test_files_come_back_as_they_were(convolutions):
    """Reads both shapes of linear layers in the authors' files."""
    variables = golden_models.random_variables(SMALL, jnp.zeros((1, 40, 40, 3)))
    tensors = export_state_dict(variables, SMALL)
    if convolutions:
        linear = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
        tensors = {name: x[..., None, None] if name.endswith(linear) else x for name, x in tensors.items()}
    again = convert_state_dict(tensors, SMALL)
    jax.tree.map(np.testing.assert_array_equal, variables, again)


@pytest.mark.parametrize(
    ("overrides", "field"), [({"dims": 9}, "dims"), ({"expand": 0}, "expand"), ({"mlp_ratio": 0.0}, "mlp_ratio")]
)
def test_bad_options_are_named(overrides, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        SMALL.clone(**overrides)
