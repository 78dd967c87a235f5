"""Shared layers: programs that XLA compiles for convolutions whose filters are a slice of stacked weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vimd_jax.models.layers import DepthwiseConv, materialized
from vimd_jax.models.mamba import GroupedShortConv, ShortConv


class Step(nn.Module):
    """A convolution as the body of nn.scan."""

    conv: type[nn.Module]
    options: dict

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return self.conv(**self.options)(x), None


@pytest.mark.parametrize(
    ("conv", "options", "shape"),
    [
        (ShortConv, {"reverse": True}, (1, 9, 8)),
        (GroupedShortConv, {}, (2, 1, 9, 8)),
        (DepthwiseConv, {"activation": nn.silu}, (1, 5, 4, 8)),
    ],
)
def test_a_convolution_of_a_layer_stack_does_not_slice_its_weights_in_its_loop(conv, options, shape):
    stack = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(conv, options)
    variables = jax.eval_shape(stack.init, jax.random.key(0), jnp.zeros(shape), None)
    with jax.default_device("cpu"):
        program = jax.jit(stack.apply).lower(variables, jax.ShapeDtypeStruct(shape, jnp.float32), None).compile()
    computations = re.split(r"\n\n", program.as_text())
    loops = [text for text in computations if re.search(r"= \S+ (exponential|logistic)\(", text)]
    assert loops and not any("dynamic-slice(" in text for text in loops)


def test_weights_apart_are_the_same_bits_and_so_are_their_gradients():
    weights = jax.random.normal(jax.random.key(0), (3, 3, 1, 5))
    np.testing.assert_array_equal(jax.jit(materialized)(weights), weights)
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: jnp.sum(materialized(x) * weights)))(weights), weights)


def test_weights_apart_cost_nothing_on_a_gpu():
    lowered = jax.jit(materialized).trace(jnp.ones((5, 8))).lower(lowering_platforms=("cuda",))
    assert "dot_general" not in lowered.as_text()
