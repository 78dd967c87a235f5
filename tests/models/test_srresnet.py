"""SRResNet against the recorded vectors of the original code, and batch statistics over several devices."""

import golden
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vimd_jax.models.layers import Conv, convolve
from vimd_jax.models.srresnet import BatchNorm, SRResNet, convolve_tiles, pixel_shuffle, winograd
from weight_convert import convert_state_dict


def leaves(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("case", golden.cases("c04_sr_*_eval"))
def test_recorded_outputs(case):
    io = golden.tensors(case)
    model = golden_models.srresnet(golden.meta(case)["constructor"])
    variables = convert_state_dict(golden.tensors(case, "weights"), model)
    output = jax.jit(model.apply)(variables, golden_models.nhwc(io["input"]))
    assert golden.relative_error(output, golden_models.nhwc(io["output"])) < 1e-5


def test_recorded_training_step():
    """Output, updated statistics and gradients, normalised by batch statistics."""
    case = "c04_sr_x4_train"
    io = golden.tensors(case)
    model = golden_models.srresnet(golden.meta(case)["constructor"])
    variables = convert_state_dict(golden.tensors(case, "weights"), model)

    def scalar(params, images):
        output, updated = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return jnp.sum(output * golden_models.nhwc(io["dout"])), (output, updated)

    (gradient, image_gradient), (output, updated) = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))(
        variables["params"], golden_models.nhwc(io["input"])
    )
    after = {name.removeprefix("after/"): x for name, x in io.items() if name.startswith("after/")}
    named = {name.removeprefix("grad/"): x for name, x in io.items() if name.startswith("grad/")}
    expected = convert_state_dict(after | named, model)
    assert golden.relative_error(output, golden_models.nhwc(io["output"])) < 1e-5
    for path, leaf in leaves(updated["batch_stats"]).items():
        assert golden.relative_error(leaf, leaves(expected["batch_stats"])[path]) < 1e-5, path
    for path, leaf in leaves(gradient).items():
        assert golden.relative_error(leaf, leaves(expected["params"])[path]) < 1e-4, path
    assert golden.relative_error(image_gradient, golden_models.nhwc(io["grad_input"])) < 1e-4


def test_batch_statistics_over_devices_are_those_of_the_whole_batch():
    x = jax.random.normal(jax.random.key(0), (8, 3, 4, 5)) * 2 + 1
    variables = BatchNorm(True, None).init(jax.random.key(1), x)
    whole, updated = BatchNorm(True, None).apply(variables, x, mutable=["batch_stats"])
    shards, each = jax.vmap(
        lambda part: BatchNorm(True, "device").apply(variables, part, mutable=["batch_stats"]), axis_name="device"
    )(x.reshape(4, 2, 3, 4, 5))
    np.testing.assert_allclose(shards.reshape(x.shape), whole, rtol=1e-5, atol=1e-5)
    for name in ("mean", "var"):
        statistic = each["batch_stats"][name]
        np.testing.assert_allclose(statistic, np.broadcast_to(updated["batch_stats"][name], statistic.shape), rtol=1e-5)


def test_running_variance_is_unbiased():
    x = jnp.arange(6.0).reshape(3, 2, 1, 1)
    norm = BatchNorm(True, None)
    _, updated = norm.apply(norm.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    np.testing.assert_allclose(updated["batch_stats"]["mean"], [0.1 * 2.5], rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["var"], [0.9 + 0.1 * 3.5], rtol=1e-6)


def test_pixel_shuffle_order():
    x = jnp.arange(8.0).reshape(1, 1, 1, 8)  # four pixels of two output channels each
    assert pixel_shuffle(x)[0, :, :, 0].tolist() == [[0, 2], [4, 6]]
    assert pixel_shuffle(x)[0, :, :, 1].tolist() == [[1, 3], [5, 7]]


def test_convolutions_start_as_pytorch_s():
    params = jax.jit(SRResNet(scale=2, channels=16, num_blocks=1).init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    params = params["params"]
    fan_in = {"conv_in": 3 * 81, "conv_mid": 16 * 9, "conv_out": 16 * 81}
    for name, inputs in fan_in.items():
        bound = inputs**-0.5
        assert 0.95 * bound < np.abs(params[name]["kernel"]).max() <= bound, name
        bias = params[name].get("bias")
        assert bias is None or 0 < np.abs(bias).max() <= bound, name
    assert 0.95 / 12 < np.abs(params["blocks"]["conv1"]["kernel"]).max() <= 1 / 12
    assert np.all(params["blocks"]["prelu"]["alpha"] == 0.25)


def test_running_averages_become_part_of_the_filters():
    """A folded convolution equals one that is normalised afterwards, and leaves no pass over its output."""
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], (2, 6, 5, 3))
    conv, norm = Conv(4, 3, use_bias=False), BatchNorm(train=False, axis_name=None)
    filters = conv.init(keys[1], x)
    draw = [1 + jax.random.uniform(key, (4,)) for key in keys[2:]]
    variables = {"params": dict(zip(("scale", "bias"), draw)), "batch_stats": dict(zip(("mean", "var"), draw[2:]))}

    class Folded(nn.Module):
        @nn.compact
        def __call__(self, x):
            return BatchNorm(False, None, name="norm")(x, Conv(4, 3, use_bias=False, name="conv"))

    both = {
        "params": {"norm": variables["params"], "conv": filters["params"]},
        "batch_stats": {"norm": variables["batch_stats"]},
    }
    expected = norm.apply(variables, conv.apply(filters, x))
    np.testing.assert_allclose(Folded().apply(both, x), expected, rtol=1e-5, atol=1e-5)
    after = str(jax.make_jaxpr(Folded().apply)(both, x)).split("conv_general_dilated")[1]
    assert " mul " not in after and " sub " not in after


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"^scale: 3"):
        SRResNet(scale=3)
    with pytest.raises(ValueError, match=r"^images: .*\(8, 8, 3\)"):
        SRResNet().init(jax.random.key(0), jnp.zeros((8, 8, 3)))
    with pytest.raises(ValueError, match=r"^images: .*uint8"):
        SRResNet().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 2), (58, 4)])
def test_winograd_is_a_convolution(size):
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = jax.random.normal(keys[0], (2, *size, 3)), jax.random.normal(keys[1], (3, 3, 3, 4))
    np.testing.assert_allclose(winograd(x, kernel), convolve(x, kernel), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 2)])
def test_convolve_tiles_is_a_convolution(size):
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = jax.random.normal(keys[0], (2, *size, 4)), jax.random.normal(keys[1], (9, 9, 4, 3))
    np.testing.assert_allclose(convolve_tiles(x, kernel), convolve(x, kernel), rtol=1e-4, atol=1e-5)
