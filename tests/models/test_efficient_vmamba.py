"""EfficientVMamba against the recorded vectors of the original code, and by hand. For its trunk see test_vmamba.py."""

import functools

import golden
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_vmamba import check_part, gradients, leaves, run, sample_images

from vimd_jax.models.efficient_vmamba import EfficientVMamba, EVSSBlock, atrous_scan, atrous_scan_order
from vimd_jax.models.layers import BatchNorm
from vimd_jax.models.scan_order import PADDING
from vimd_jax.models.vmamba import SS2D
from weight_convert import convert_state_dict
from weight_convert.mapping import plan

MIXERS = golden.cases("c08_es2d_block_*")
BLOCKS = golden.cases("c08_evss_block*")
MODELS = golden.cases("c08_efficientvmamba_*")
MAPS = golden.tensors("c08_es2d_maps")
SMALL = EfficientVMamba(num_classes=5, image_size=32, dims=8, depths=(1, 1, 2, 1), state_size=4)


@pytest.fixture(scope="module")
def small():
    return golden_models.random_variables(SMALL, sample_images())


@pytest.mark.parametrize("size", [name.removeprefix("scan/") for name in MAPS if name.startswith("scan/")])
def test_recorded_scan_paths(size):
    grid = tuple(map(int, size.split("x")))
    paths = atrous_scan(grid)
    np.testing.assert_array_equal(paths, MAPS[f"scan/{size}"])
    token_of = MAPS[f"merge/{size}"]
    np.testing.assert_array_equal(atrous_scan_order(grid).places[0], token_of)


def test_scan_paths_by_hand():
    _ = PADDING
    by_hand = [[0, 2, 4, 10, 12, 14], [5, _, 7, _, 9, _], [1, 3, _, 11, 13, _], [6, _, 8, _, _, _]]
    np.testing.assert_array_equal(atrous_scan((3, 5)), by_hand)
    np.testing.assert_array_equal(atrous_scan((1, 1)), [[0], [_], [_], [_]])


@pytest.mark.parametrize("case", MIXERS)
def test_recorded_mixers(case):
    io = golden.tensors(case)
    mixer = SS2D(state_size=16, dtype=jnp.float32)
    order = atrous_scan_order(io["input"].shape[1:3])

    def apply(variables, x):
        return mixer.apply({"params": variables["params"]["mixer"]}, x, order)

    check_part(case, apply, EfficientVMamba(dims=io["input"].shape[-1], depths=(1,)), "op.")


@pytest.mark.parametrize("case", BLOCKS)
def test_recorded_blocks(case):
    io, constructor = golden.tensors(case), golden.meta(case)["constructor"]
    whole = EfficientVMamba(dims=io["input"].shape[-1], depths=(1,), mlp_ratio=constructor["mlp_ratio"])
    mixer = functools.partial(SS2D, state_size=16, dtype=jnp.float32)
    norm = functools.partial(BatchNorm, train=False, axis_name=None)
    block = EVSSBlock(drops=False, mixer=mixer, batch_norm=norm, mlp_ratio=whole.mlp_ratio, dtype=jnp.float32)
    order = atrous_scan_order(io["input"].shape[1:3])

    def apply(variables, x):
        return block.apply(variables, x, (0.0, order))[0]

    check_part(case, apply, whole)


@pytest.mark.parametrize("case", MODELS)
def test_recorded_models(case):
    io = golden.tensors(case)
    model = golden_models.efficient_vmamba(golden.meta(case)["constructor"])
    variables = convert_state_dict(golden.tensors(case, "weights"), model)
    logits, features = run(model, variables, golden_models.nhwc(io["input"]), return_features=True)
    assert golden.relative_error(logits, io["logits"]) < 1e-5
    states = features["hidden_states"]
    for stage in (0, 1):
        last = f"layers.{stage}.blocks.{model.depths[stage] - 1}"
        assert golden.relative_error(states[stage], io[last]) < 1e-5
    assert golden.relative_error(states[3], io["layers.3"]) < 1e-5


@pytest.mark.parametrize(
    ("size", "expected", "total", "length"),  # logits of the original code for weights set by a rule
    [
        ((40, 40), [0.751655, -0.829254, 1.215978, -1.253932, 1.391685], 2.561357, 3.549973),
        ((40, 56), [0.901876, -1.033327, 1.462578, -1.529377, 1.680690], 2.963699, 4.284102),
        ((64, 64), [0.935725, -1.085593, 1.530360, -1.608914, 1.767568], 3.078544, 4.496825),
    ],
    ids=str,
)
def test_logits_of_weights_by_rule(size, expected, total, length):
    model = EfficientVMamba(num_classes=5, dims=16, depths=(2, 1, 1, 1))
    weights = golden_models.weights_by_rule({entry.source: entry.shape for entry in plan(model)})
    images = golden_models.nhwc(golden_models.images_by_rule((2, 3, *size)))
    logits = run(model, convert_state_dict(weights, model), images)
    np.testing.assert_allclose(logits[0], expected, atol=1e-5)
    assert float(logits.sum()) == pytest.approx(total, abs=2e-5)
    assert float(jnp.linalg.norm(logits)) == pytest.approx(length, abs=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (21, 36)], ids=str)
def test_features_and_gradients_at_any_size(small, size):
    (gradient, image_gradient), (logits, features) = gradients(SMALL, small, sample_images(*size), 1.0)
    sides = [(side // 4, -(-(side // 4) // 2), -(-(side // 4) // 4), -(-(side // 4) // 8)) for side in size]
    assert [state.shape for state in features["hidden_states"]] == [
        (2, rows, columns, 8 * 2**stage) for stage, (rows, columns) in enumerate(zip(*sides))
    ]
    assert features["pre_logits"].shape == (2, 64) and logits.shape == (2, 5)
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf) for leaf in jax.tree.leaves(gradient["params"]))
    assert np.all(np.isfinite(image_gradient))


def test_bfloat16_is_close_and_finite(small):
    model = SMALL.clone(dtype="bfloat16")
    logits, features = run(model, small, sample_images(), return_features=True)
    assert {logits.dtype, *(state.dtype for state in features["hidden_states"])} == {jnp.dtype("float32")}
    assert 0 < golden.relative_error(logits, run(SMALL, small, sample_images())) < 0.05


def test_batch_statistics(small):
    """Training normalises by batch statistics and updates running averages; evaluation reads only these."""
    images = sample_images(batch=4)

    @jax.jit
    def train(variables):
        return SMALL.apply(variables, images, train=True, mutable=["batch_stats"])

    (trained, updates), first = train(small), leaves(small["batch_stats"])
    statistics = leaves(updates["batch_stats"])
    assert set(statistics) == set(first)
    assert all(not np.allclose(statistics[name], first[name]) for name in first)
    other = {**small, "batch_stats": jax.tree.map(lambda x: x + 0.5, small["batch_stats"])}
    np.testing.assert_allclose(train(other)[0], trained, rtol=1e-5, atol=1e-5)
    evaluated = run(SMALL, small, images)
    assert not np.allclose(evaluated, trained) and not np.allclose(run(SMALL, other, images), evaluated)
    with_updates = {**small, **updates}
    alone = jnp.concatenate([run(SMALL, with_updates, images[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(alone, run(SMALL, with_updates, images), rtol=1e-4, atol=1e-5)


def test_running_averages_are_those_of_the_first_convolution(small):
    images = sample_images(batch=4)
    _, updates = jax.jit(lambda v: SMALL.apply(v, images, train=True, mutable=["batch_stats"]))(small)
    old, new = small["batch_stats"]["stage_0"]["conv_norm"], updates["batch_stats"]["stage_0"]["conv_norm"]
    params = small["params"]
    patches = jax.lax.conv_general_dilated(
        lhs=images,
        rhs=params["patch_embed"]["kernel"],
        window_strides=(4, 4),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = _norm(patches + params["patch_embed"]["bias"], params["patch_norm"])
    x = _norm(x, jax.tree.map(lambda leaf: leaf[0], params["stage_0"]["norm"]))
    kernel, bias = params["stage_0"]["conv"]["kernel"][0], params["stage_0"]["conv"]["bias"][0]
    x = bias + jax.lax.conv_general_dilated(
        lhs=x,
        rhs=kernel,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=8,
    )
    np.testing.assert_allclose(new["mean"][0], 0.9 * old["mean"][0] + 0.1 * x.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    variance = np.var(x, axis=(0, 1, 2), ddof=1)
    np.testing.assert_allclose(new["var"][0], 0.9 * old["var"][0] + 0.1 * variance, rtol=1e-4)


def _norm(x, params):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * params["scale"] + params["bias"]


def test_devices_share_a_batch(small):
    """Two halves of a batch on a named axis are normalised like the undivided batch."""
    images = sample_images(batch=4)
    model = SMALL.clone(bn_axis_name="devices")

    def train(model, images):
        return model.apply(small, images, train=True, mutable=["batch_stats"])

    halves, updates = jax.jit(jax.vmap(functools.partial(train, model), axis_name="devices"))(
        images.reshape(2, 2, *images.shape[1:])
    )
    whole, expected = jax.jit(functools.partial(train, SMALL))(images)
    np.testing.assert_allclose(halves.reshape(whole.shape), whole, rtol=1e-3, atol=1e-4)
    for name, leaf in leaves(expected["batch_stats"]).items():
        np.testing.assert_allclose(leaves(updates["batch_stats"])[name][0], leaf, rtol=1e-3, atol=1e-4, err_msg=name)


def test_initial_distributions():
    """Linear layers are initialised with deviation 0.02; convolutions, also 1×1, by PyTorch's default."""
    model = EfficientVMamba(num_classes=5, dims=32, depths=(1, 1, 1, 1), mlp_ratio=2.0, downsample="conv")
    variables = jax.jit(model.init)(jax.random.key(1), sample_images(32, 32, 1))
    scanning, convolving = variables["params"]["stage_1"], variables["params"]["stage_2"]
    downsampling = variables["params"]["downsample_1"]["conv"]
    deviations = {
        "mixer": (scanning["mixer"]["in_proj"]["kernel"], 0.02),
        "gate": (scanning["gate"]["expand"]["kernel"], 0.02),
        "mlp_in": (scanning["mlp_in"]["kernel"], 0.02),
        "mlp_out": (scanning["mlp_out"]["kernel"], 0.02),
        "conv": (scanning["conv"]["kernel"], 1 / 3 / 3**0.5),
        "conv_out": (scanning["conv_out"]["kernel"], 64**-0.5 / 3**0.5),
        "conv_out bias": (scanning["conv_out"]["bias"], 64**-0.5 / 3**0.5),
        "expand": (convolving["expand"]["kernel"], 128**-0.5 / 3**0.5),
        "depthwise": (convolving["depthwise"]["kernel"], 1 / 3 / 3**0.5),
        "se_reduce": (convolving["se_reduce"]["kernel"], 512**-0.5 / 3**0.5),
        "se_reduce bias": (convolving["se_reduce"]["bias"], 512**-0.5 / 3**0.5),
        "se_expand": (convolving["se_expand"]["kernel"], 64**-0.5 / 3**0.5),
        "se_expand bias": (convolving["se_expand"]["bias"], 64**-0.5 / 3**0.5),
        "project": (convolving["project"]["kernel"], 512**-0.5 / 3**0.5),
        "downsample": (downsampling["kernel"], 256**-0.5 / 3**0.5),
        "downsample bias": (downsampling["bias"], 256**-0.5 / 3**0.5),
    }
    for name, (leaf, deviation) in deviations.items():
        assert float(leaf.mean()) == pytest.approx(0, abs=4 * deviation / leaf.size**0.5), name
        assert float(leaf.std()) == pytest.approx(deviation, rel=0.02 + 3 / leaf.size**0.5), name
    assert not np.any(scanning["gate"]["reduce"]["bias"]) and not np.any(scanning["mlp_in"]["bias"])


def test_weight_decay_leaves_out_vectors_and_biases():
    model = SMALL.clone(mlp_ratio=2.0)
    params = jax.eval_shape(model.init, jax.random.key(0), sample_images())["params"]
    kept = {path[-1] for path in flatten_dict(params) if not model.decays(path)}
    decayed = {path[-1] for path in flatten_dict(params) if model.decays(path)}
    assert kept == {"scale", "bias", "D"}
    assert decayed == {"kernel", "x_proj_kernel", "dt_proj_kernel", "dt_proj_bias", "A_log"}


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"dims": (8, 16, 4, 32)}, "dims"),
        ({"dims": 7}, "dims"),
        ({"downsample": "pool"}, "downsample"),
        ({"mlp_ratio": -1.0}, "mlp_ratio"),
        ({"mlp_ratio": "big"}, "mlp_ratio"),
        ({"bn_axis_name": 3}, "bn_axis_name"),
    ],
    ids=str,
)
def test_bad_options_are_named(overrides, field):
    with pytest.raises(ValueError, match=f"^{field}: .*") as error:
        SMALL.clone(**overrides)
    assert "\n" not in str(error.value)


def test_images_too_small_for_strided_convolutions_are_named():
    model = SMALL.clone(downsample="conv")
    jax.eval_shape(model.init, jax.random.key(0), sample_images(32, 32))
    with pytest.raises(ValueError, match=r"^images: too small, a map of \(1, 1\) tokens"):
        jax.eval_shape(model.init, jax.random.key(0), sample_images(16, 16))


def test_remat_does_not_change_training(small):
    """Covers stochastic depth and updated statistics."""
    images = sample_images()

    @functools.partial(jax.jit, static_argnames="model")
    def step(model, params):
        def loss(params):
            variables, rngs = {**small, "params": params}, {"drop_path": jax.random.key(0)}
            logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)
            return jnp.sum(jnp.sin(logits)), updates

        return jax.grad(loss, has_aux=True)(params)

    model = SMALL.clone(drop_path_rate=0.3)
    plain, again = step(model, small["params"]), step(model.clone(remat=True), small["params"])
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-5)
