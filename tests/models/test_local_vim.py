"""LocalVim against the recorded vectors of the original code, its initialisation, and its options."""

import functools

import golden
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vimd_jax.models import create_model
from vimd_jax.models.layers import ChannelGate, rms_norm
from vimd_jax.models.local_vim import SEARCHED, UNSEARCHED, LocalVim
from vimd_jax.models.positions import resize_positions
from vimd_jax.models.scan_order import DIRECTIONS, layer_directions
from weight_convert import convert_state_dict
from weight_convert.mapping import plan

RECORDED = golden.cases("c07_localvim_*")
SMALL = LocalVim(
    num_classes=5,
    image_size=32,
    patch_size=8,
    embed_dim=16,
    depth=3,
    directions=(("h", "v_flip", "w2"), ("v", "w3", "h_flip"), ("w2_flip", "w7", "v")),
)


def sample_images(height: int = 32, width: int = 32) -> jax.Array:
    return jax.random.uniform(jax.random.key(5), (2, height, width, 3))


@functools.partial(jax.jit, static_argnames=("model", "return_features"))
def run(model, variables, images, return_features=False):
    return model.apply(variables, images, return_features=return_features)


@functools.cache
def variables_of(model):
    return golden_models.random_variables(model, sample_images())


def recorded(case: str):
    """The tensors of a case, the published network, and its variables."""
    model = golden_models.local_vim(golden.meta(case)["constructor"], vertical_reverse="published")
    return golden.tensors(case), model, convert_state_dict(golden.tensors(case, "weights"), model)


@pytest.mark.parametrize("case", RECORDED)
def test_recorded_vectors(case):
    io, model, variables = recorded(case)
    images = golden_models.nhwc(io["input"])
    logits, features = run(model, variables, images, return_features=True)
    assert golden.relative_error(logits, io["logits"]) < 1e-5
    assert golden.relative_error(features["pre_logits"], io["pre_head"]) < 1e-5
    if "dlogits" not in io:
        return
    gradients = jax.jit(jax.grad(lambda v, x: jnp.sum(model.apply(v, x) * io["dlogits"]), argnums=(0, 1)))
    gradient, image_gradient = gradients(variables, images)
    named = {name.removeprefix("grad/"): x for name, x in io.items() if name.startswith("grad/")}
    expected = flatten_dict(convert_state_dict(named, model), sep="/")
    for path, leaf in flatten_dict(gradient, sep="/").items():
        assert golden.relative_error(leaf, expected[path]) < 1e-4, path
    assert golden.relative_error(image_gradient, golden_models.nhwc(io["grad_input"])) < 1e-4


def test_supernet_gradients_are_among_the_recorded():
    assert any("grad_input" in golden.tensors(case) for case in RECORDED)


@pytest.mark.parametrize("case", RECORDED)
def test_recorded_mixers(case):
    """The update of the second layer; class scores, dominated by the stream, would hardly show an error in it."""
    io, model, variables = recorded(case)
    params = jax.tree.map(lambda x: x[1], variables["params"]["layers"])
    grid = model.grid_of(io["input"].shape[2:])
    order = jax.tree.map(lambda x: x[1], model.layer_inputs(grid))
    normalized = rms_norm().apply({"params": params["norm"]}, io["layer01.residual"])
    update = jax.jit(model.make_mixer(grid)().apply)({"params": params["mixer"]}, normalized, order)
    assert golden.relative_error(update, io["layer01.hidden"]) < 1e-5


# Logits of the original code for weights set by a rule: the first five, the sum and the norm of all.
RULE = LocalVim(
    num_classes=5,
    image_size=64,
    embed_dim=16,
    depth=3,
    directions=(("h", "h_flip", "v", "v_flip"), ("w2", "w2_flip", "w7", "w7_flip"), ("h", "v_flip", "w2", "w7_flip")),
)
BY_RULE = {
    "rotated": ({}, [0.247837, 0.324000, 0.357439, 0.343886, 0.285252], 3.126596, 0.996929),
    "middle token": (
        {"class_token": "middle", "rope": False},
        [0.097616, 0.172833, 0.225405, 0.248652, 0.239711],
        1.969853,
        0.647807,
    ),
    "search": (
        {"directions": None, "depth": 2},
        [0.042708, -0.002233, -0.047338, -0.086629, -0.114835],
        -0.415683,
        0.222575,
    ),
}


@pytest.mark.parametrize("name", BY_RULE)
def test_logits_of_weights_by_rule(name):
    overrides, first, total, norm = BY_RULE[name]
    model = RULE.clone(**overrides)
    weights = golden_models.weights_by_rule({entry.source: entry.shape for entry in plan(model)})
    images = golden_models.nhwc(golden_models.images_by_rule((2, 3, 64, 64)))
    logits = run(model, convert_state_dict(weights, model), images)
    np.testing.assert_allclose(logits[0], first, atol=1e-5)
    assert float(logits.sum()) == pytest.approx(total, abs=2e-5)
    assert float(jnp.linalg.norm(logits)) == pytest.approx(norm, abs=1e-5)


def test_published_reverse_differs_on_grids_that_are_not_square():
    variables, published = variables_of(SMALL), SMALL.clone(vertical_reverse="published")
    square, wide = sample_images(), sample_images(24, 40)
    np.testing.assert_array_equal(run(SMALL, variables, square), run(published, variables, square))
    assert golden.relative_error(run(published, variables, wide), run(SMALL, variables, wide)) > 1e-4


@pytest.mark.parametrize("class_token", ["middle", "head", None])
def test_other_image_size_resizes_positions(class_token):
    """An image of another size gives the same as a network for that size with a resized table."""
    model, images = SMALL.clone(class_token=class_token, rope=False), sample_images(45, 24)
    params = variables_of(model)["params"]
    table = resize_positions(params["position_embedding"], (4, 4), (6, 3), class_token)
    made_for_it = model.clone(image_size=(45, 24))
    resized = {"params": params | {"position_embedding": table}}
    np.testing.assert_allclose(
        run(model, {"params": params}, images), run(made_for_it, resized, images), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("stride", "size"), [(None, (29, 35)), (8, (7, 3)), (4, (33, 30)), (12, (30, 41))])
def test_images_are_padded_to_whole_patches_after_the_normalization(stride, size):
    model = SMALL.clone(stride=stride, input_normalization=True, rope=False)
    rows, columns = model.grid_of(size)
    full = tuple((n - 1) * model.stride + 8 for n in (rows, columns))
    assert all(
        0 <= whole - side < max(model.stride, 8) or n == 1 for whole, side, n in zip(full, size, (rows, columns))
    )
    images = sample_images(*size)
    padding = ((0, 0), *((0, max(whole - side, 0)) for whole, side in zip(full, size)), (0, 0))
    mean = jnp.array([0.485, 0.456, 0.406])
    padded = jnp.pad(images - mean, padding) + mean  # zero after normalisation
    variables = variables_of(model)
    np.testing.assert_allclose(run(model, variables, images), run(model, variables, padded), rtol=1e-5, atol=1e-6)


def test_rotation_of_class_tokens_and_of_other_grids():
    model = SMALL.clone(class_token="middle")
    cosines, sines = model.rotation((4, 4))
    plain_cosines, plain_sines = SMALL.rotation((4, 4))
    np.testing.assert_array_equal(cosines[8], 1)
    np.testing.assert_array_equal(sines[8], 0)
    np.testing.assert_array_equal(np.delete(cosines, 8, axis=0), plain_cosines)
    np.testing.assert_array_equal(np.delete(sines, 8, axis=0), plain_sines)
    # The published code resizes the tables of cosines and sines, not the angles.
    wide, _ = SMALL.rotation((3, 6))
    table = resize_positions(plain_cosines[None], (4, 4), (3, 6), None)[0]
    np.testing.assert_allclose(wide, table, atol=1e-6)


@pytest.mark.parametrize("class_token", ["middle", "head"])
def test_rotation_and_class_token_go_together(class_token):
    model = SMALL.clone(class_token=class_token)
    variables = variables_of(model)
    for size in [(32, 32), (24, 50)]:
        assert np.all(np.isfinite(run(model, variables, sample_images(*size))))


def test_channel_gate_by_hand():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 16)).astype(np.float32)
    gate = ChannelGate(axes=(1,))
    params = golden_models.random_variables(gate, x)["params"]
    normalized = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    mean = (normalized * params["norm"]["scale"] + params["norm"]["bias"]).mean(axis=1, keepdims=True)
    code = jax.nn.gelu(mean @ params["reduce"]["kernel"] + params["reduce"]["bias"], approximate=False)
    expected = x / (1 + np.exp(-(code @ params["expand"]["kernel"] + params["expand"]["bias"])))
    np.testing.assert_allclose(gate.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-6)


def test_initial_distributions():
    """Means and deviations of the original initialisation (its parameters at seed 0), and the exact bounds."""
    model = create_model("local_vim_tiny_middle_token", depth=2)
    params = flatten_dict(jax.jit(model.init)(jax.random.key(1), sample_images())["params"], sep="/")
    mixer = {path.removeprefix("layers/mixer/"): x for path, x in params.items() if path.startswith("layers/mixer/")}
    normal = ["in_proj/kernel", "ssm/x_proj_kernel", "ssm/dt_proj_kernel", "gate/reduce/kernel", "gate/expand/kernel"]
    deviations = {name: (mixer.pop(name), 0.02) for name in normal}
    deviations |= {name: (params.pop(name), 0.02) for name in ("position_embedding", "head/kernel")}
    bounds = {
        "conv/kernel": (mixer.pop("conv/kernel"), 0.5),
        "conv/bias": (mixer.pop("conv/bias"), 0.5),
        "out_proj/kernel": (mixer.pop("out_proj/kernel"), (384 * 2) ** -0.5),
        "patch_embed/kernel": (params.pop("patch_embed/kernel"), 768**-0.5),
        "patch_embed/bias": (params.pop("patch_embed/bias"), 768**-0.5),
    }
    for name, (leaf, bound) in bounds.items():
        assert 0.95 * bound < np.abs(leaf).max() <= bound, name
    deviations |= {name: (leaf, bound / 3**0.5) for name, (leaf, bound) in bounds.items()}
    for name, (leaf, deviation) in deviations.items():
        assert float(leaf.mean()) == pytest.approx(0, abs=4 * deviation / leaf.size**0.5), name
        assert float(leaf.std()) == pytest.approx(deviation, rel=0.02 + 3 / leaf.size**0.5), name
    np.testing.assert_allclose(
        mixer["ssm/A_log"], np.broadcast_to(np.log(np.arange(1, 17)), (2, 4, 384, 16)), rtol=1e-6
    )
    for name in ("ssm/dt_proj_bias", "gate/norm/bias", "gate/reduce/bias", "gate/expand/bias"):
        assert not np.any(mixer[name]), name
    assert not np.any(params["class_token"]) and not np.any(params["head/bias"])
    assert np.all(mixer["ssm/D"] == 1) and np.all(mixer["gate/norm/scale"] == 1) and np.all(params["norm/scale"] == 1)
    weights = SMALL.clone(directions=None).init(jax.random.key(0), sample_images())["params"]["layers"]["mixer"][
        "search"
    ]
    assert 0 < np.abs(weights["direction_weights"]).max() < 0.005


def test_weight_decay_as_published():
    model = SMALL.clone(directions=None, class_token="middle")
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), sample_images())["params"])
    decayed = {"/".join(path) for path in shapes if model.decays(path)}
    mixer = "layers/mixer/"
    assert decayed == {
        "patch_embed/kernel",
        "head/kernel",
        mixer + "in_proj/kernel",
        mixer + "out_proj/kernel",
        mixer + "conv/kernel",
        mixer + "ssm/x_proj_kernel",
        mixer + "ssm/dt_proj_kernel",
        mixer + "ssm/A_log",
        mixer + "gate/reduce/kernel",
        mixer + "gate/expand/kernel",
        mixer + "search/direction_weights",
    }


def test_published_directions():
    assert len(SEARCHED) == 20 and {len(names) for names in SEARCHED} == {4}
    for names in SEARCHED:
        assert sorted(names, key=DIRECTIONS.index) == list(names)
    assert layer_directions(SEARCHED, 3) == SEARCHED[:3]
    assert layer_directions(UNSEARCHED, 2) == (("h", "h_flip", "w2", "w2_flip"),) * 2
    assert layer_directions(None, 2) == (DIRECTIONS,) * 2
    assert create_model("local_vim_tiny", depth=2).directions == SEARCHED


def test_stride_follows_patch_size():
    assert LocalVim(patch_size=4).stride == 4
    assert LocalVim(patch_size=4, stride=2).stride == 2
    assert create_model("local_vim_tiny", image_size=(50, 61), patch_size=4).grid == (13, 16)


def test_layers_of_different_directions_are_one_program():
    def program(depth, directions):
        model = SMALL.clone(depth=depth, directions=directions)
        variables = jax.eval_shape(model.init, jax.random.key(0), sample_images())
        text = jax.jit(model.apply).lower(variables, sample_images()).as_text()
        return [line for line in text.splitlines() if "constant" not in line]

    same = program(2, (("h", "v"),))
    assert len(program(6, (("h", "v"), ("v", "h"), ("w2", "w4"), ("h_flip", "v"), ("v", "w2"), ("h", "h")))) == len(
        same
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"directions": (("h", "x"),)}, "directions: 'x' is not valid"),
        ({"directions": (("h", "w0_flip"),)}, "directions: 'w0_flip' is not valid"),
        ({"directions": (("h",), ("v",))}, "directions: 2 for 3 layers"),
        ({"directions": (("h",),) * 4}, "directions: 4 for 3 layers"),
        ({"directions": (("h",), ("v",), ("h", "v"))}, "directions: expected at least one in each layer"),
        ({"directions": ((),)}, "directions: "),
        ({"directions": ()}, "directions: 0 for 3 layers"),
        ({"directions": "h"}, "directions: 'h' is not valid"),
        ({"directions": ("h", "v", "h")}, "directions: "),
        ({"depth": 21, "directions": SEARCHED}, "directions: 20 for 21 layers"),
        ({"class_token": "double"}, "class_token: 'double' is not valid"),
        ({"vertical_reverse": "wrong"}, "vertical_reverse: 'wrong' is not valid"),
        ({"stride": 0}, "stride: 0 is not valid"),
        ({"embed_dim": 3, "rope": False}, "embed_dim: 3 is not valid"),
        ({"rope": True, "embed_dim": 18}, "rope: "),
        ({"image_size": (0, 8)}, "image_size: "),
    ],
)
def test_bad_options_are_named(overrides, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        SMALL.clone(**overrides)
    assert "\n" not in str(error.value)
