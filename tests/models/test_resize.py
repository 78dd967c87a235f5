"""Bilinear resizing and adaptive pooling against the recorded results of PyTorch."""

import re

import golden
import golden_models
import jax
import jax.numpy as jnp
import pytest

from vimd_jax.models.resize import adaptive_average_pool, resize_bilinear

RESIZED, POOLED = golden.tensors("c10_resize_odd"), golden.tensors("c10_ppm_pool")


@pytest.mark.parametrize("case", [name[1:] for name in RESIZED if re.fullmatch(r"x\d", name)])
def test_recorded_bilinear_sizes_and_gradients(case):
    x, expected, cotangent, gradient = (
        golden_models.nhwc(RESIZED[name]) for name in (f"x{case}", f"y{case}_bilinear_ac0", f"cot{case}", f"grad{case}")
    )
    resized, vjp = jax.vjp(lambda x: resize_bilinear(x, expected.shape[1:3]), jnp.asarray(x))
    assert golden.relative_error(resized, expected) < 1e-5
    assert golden.relative_error(vjp(jnp.asarray(cotangent))[0], gradient) < 1e-5


@pytest.mark.parametrize("name", [name for name in POOLED if re.fullmatch(r"x\d_pool\d", name)])
def test_recorded_pooling_also_of_maps_smaller_than_the_grid(name):
    x, expected = (golden_models.nhwc(POOLED[key]) for key in (name[:2], name))
    pooled = adaptive_average_pool(x, int(name[-1]))
    assert golden.relative_error(pooled, expected) < 1e-5
    assert golden.relative_error(resize_bilinear(pooled, x.shape[1:3]), golden_models.nhwc(POOLED[f"{name}_up"])) < 1e-5
