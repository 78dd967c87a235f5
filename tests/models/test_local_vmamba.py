"""LocalVMamba against the recorded vectors of the original code, its initialisation, and its options."""

import functools

import golden
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vimd_jax.models import create_model
from vimd_jax.models.layers import layer_norm
from vimd_jax.models.local_vmamba import SEARCHED_SMALL, SEARCHED_TINY, LocalVMamba
from vimd_jax.models.scan_order import DIRECTIONS
from weight_convert import convert_state_dict
from weight_convert.mapping import plan

RECORDED = golden.cases("c07_localvmamba_*")


@functools.partial(jax.jit, static_argnames=("model", "return_features"))
def run(model, variables, images, return_features=False):
    return model.apply(variables, images, return_features=return_features)


def recorded(case: str):
    """The tensors of a case, the published network, and its variables."""
    model = golden_models.local_vmamba(golden.meta(case)["constructor"], vertical_reverse="published")
    return golden.tensors(case), model, convert_state_dict(golden.tensors(case, "weights"), model)


@pytest.mark.parametrize("case", RECORDED)
def test_recorded_vectors(case):
    io, model, variables = recorded(case)
    logits, features = run(model, variables, golden_models.nhwc(io["input"]), return_features=True)
    assert golden.relative_error(logits, io["logits"]) < 1e-5
    for stage, state in enumerate(features["hidden_states"]):
        last = f"layers.{stage}.blocks.{model.depths[stage] - 1}"
        assert golden.relative_error(state, io[last]) < 1e-5, stage
    assert golden.relative_error(features["pre_logits"], io["classifier.norm"].mean(axis=(1, 2))) < 1e-5


@pytest.mark.parametrize("case", RECORDED)
def test_recorded_mixers(case):
    """The update of the first block; class scores, dominated by the stream, would hardly show an error in it."""
    io, model, variables = recorded(case)
    params = jax.tree.map(lambda x: x[0], variables["params"]["stage_0"])
    x = io["patch_embed"]
    order = jax.tree.map(lambda x: x[0], model.block_inputs(0, x.shape[1:3]))
    mixer = model.make_block(0, train=False)().mixer()
    normalized = layer_norm().apply({"params": params["norm"]}, x)
    update = jax.jit(mixer.apply)({"params": params["mixer"]}, normalized, order)
    assert golden.relative_error(update, io["layers.0.blocks.0.op"]) < 1e-5


def test_recorded_gradients():
    """Gradients of the first two stages, the only ones in the recording."""
    io, model, variables = recorded("c07_localvmamba_reduced")
    gradients = jax.jit(jax.grad(lambda v, x: jnp.sum(model.apply(v, x) * io["dlogits"]), argnums=(0, 1)))
    gradient, image_gradient = gradients(variables, golden_models.nhwc(io["input"]))
    named = {name.removeprefix("grad/"): x for name, x in io.items() if name.startswith("grad/")}
    assert {"layers.0.blocks.0.op.A_logs", "layers.1.downsample.reduction.weight", "patch_embed.0.weight"} <= set(named)
    weights = golden.tensors("c07_localvmamba_reduced", "weights")
    expected = flatten_dict(convert_state_dict(weights | named, model), sep="/")
    known = {entry.target for entry in plan(model) if entry.source in named}
    for path, leaf in flatten_dict(gradient, sep="/").items():
        assert path not in known or golden.relative_error(leaf, expected[path]) < 1e-4, path
    assert golden.relative_error(image_gradient, golden_models.nhwc(io["grad_input"])) < 1e-4


# Logits of the original code for weights set by a rule: the first five, the sum and the norm of all.
RULE = LocalVMamba(
    num_classes=5,
    dims=(8, 16),
    depths=(1, 2),
    directions=(
        ("h", "v", "w2", "w7_flip"),
        ("h_flip", "v_flip", "w2_flip", "w7"),
        ("h", "h_flip", "w2", "w7"),
    ),
)
BY_RULE = {
    "padded windows": ({}, (40, 40), [0.276861, 0.193688, 0.084792, -0.035527, -0.151429], 0.760571, 0.540542),
    "search": (
        {"directions": None, "depths": (1, 1)},
        (40, 40),
        [0.272572, 0.209645, 0.118913, 0.012306, -0.096123],
        1.379904,
        0.655002,
    ),
    "published reverse": (
        {"vertical_reverse": "published"},
        (40, 56),
        [0.392187, 0.305244, 0.178023, 0.027217, -0.127358],
        1.388789,
        0.733192,
    ),
    "correct reverse": ({}, (40, 56), [0.399371, 0.306024, 0.172297, 0.015732, -0.143103], 1.495635, 0.775396),
}


@pytest.mark.parametrize("name", BY_RULE)
def test_logits_of_weights_by_rule(name):
    overrides, size, first, total, norm = BY_RULE[name]
    model = RULE.clone(**overrides)
    weights = golden_models.weights_by_rule({entry.source: entry.shape for entry in plan(model)})
    images = golden_models.nhwc(golden_models.images_by_rule((2, 3, *size)))
    logits = run(model, convert_state_dict(weights, model), images)
    np.testing.assert_allclose(logits[0], first, atol=1e-5)
    assert float(logits.sum()) == pytest.approx(total, abs=2e-5)
    assert float(jnp.linalg.norm(logits)) == pytest.approx(norm, abs=1e-5)


def test_a_turned_image_gives_a_turned_result():
    """Rows and columns are scanned alike: swapping an image's axes and the directions swaps the features' axes."""
    rows = RULE.clone(dims=8, depths=(1,), directions=(("h", "v_flip"),))
    columns = rows.clone(directions=(("v", "h_flip"),))
    variables = golden_models.random_variables(rows, jnp.zeros((1, 16, 16, 3)))
    params = flatten_dict(variables["params"])
    # The filters of patches and of the depthwise convolution are transposed with the image.
    for path in (("patch_embed", "kernel"), ("stage_0", "mixer", "conv", "kernel")):
        params[path] = params[path].swapaxes(-4, -3)
    images = jax.random.uniform(jax.random.key(0), (1, 12, 20, 3))
    _, first = run(rows, variables, images, return_features=True)
    _, second = run(columns, {"params": unflatten_dict(params)}, images.swapaxes(1, 2), return_features=True)
    first, second = (features["hidden_states"][0] for features in (first, second))
    np.testing.assert_allclose(first, second.swapaxes(1, 2), rtol=1e-4, atol=1e-5)


def test_initial_distributions():
    """Same as VMamba's; step sizes are initialised as in Mamba, unlike LocalVim's."""
    params = jax.jit(create_model("local_vmamba_tiny", depths=(2,)).init)(jax.random.key(1), jnp.zeros((1, 16, 16, 3)))
    mixer = params["params"]["stage_0"]["mixer"]
    deviations = {
        "in_proj": (mixer["in_proj"]["kernel"], 0.02),
        "out_proj": (mixer["out_proj"]["kernel"], 0.02),
        "x_proj": (mixer["ssm"]["x_proj_kernel"], 192**-0.5 / 3**0.5),
        "dt_proj": (mixer["ssm"]["dt_proj_kernel"], 6**-0.5 / 3**0.5),
        "reduce": (mixer["gate"]["reduce"]["kernel"], 0.02),
        "expand": (mixer["gate"]["expand"]["kernel"], 0.02),
    }
    for name, (leaf, deviation) in deviations.items():
        assert float(leaf.std()) == pytest.approx(deviation, rel=0.02 + 3 / leaf.size**0.5), name
    steps = np.asarray(jax.nn.softplus(mixer["ssm"]["dt_proj_bias"]))
    assert steps.min() > 0.00099 and steps.max() < 0.101
    assert not np.any(mixer["gate"]["expand"]["bias"]) and np.all(mixer["gate"]["norm"]["scale"] == 1)


def test_weight_decay_as_published():
    model = RULE.clone(directions=None)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    paths = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images)["params"])
    mixer = {path[2:]: model.decays(path) for path in paths if path[:2] == ("stage_0", "mixer")}
    assert {path for path, decays in mixer.items() if not decays} == {
        ("conv", "bias"),
        ("ssm", "D"),
        ("norm", "scale"),
        ("norm", "bias"),
        ("gate", "norm", "scale"),
        ("gate", "norm", "bias"),
        ("gate", "reduce", "bias"),
        ("gate", "expand", "bias"),
    }
    assert mixer["ssm", "dt_proj_bias"] and mixer["search", "direction_weights"]


def test_published_directions():
    assert (len(SEARCHED_TINY), len(SEARCHED_SMALL)) == (15, 33)
    for names in (*SEARCHED_TINY, *SEARCHED_SMALL):
        assert len(names) == 4 and sorted(names, key=DIRECTIONS.index) == list(names)
    assert create_model("local_vmamba_tiny").directions == SEARCHED_TINY
    assert create_model("local_vmamba_small").directions == SEARCHED_SMALL
    assert create_model("local_vmamba_small", dims=8, depths=(1, 1)).directions == SEARCHED_SMALL


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"directions": (("h", "x"),)}, "directions: 'x' is not valid"),
        ({"directions": (("h",), ("v",))}, "directions: 2 for 3 layers"),
        ({"directions": (("h",), ("v",), ("h", "v"))}, "directions: expected at least one in each layer"),
        ({"depths": (16,), "dims": 8, "directions": SEARCHED_TINY}, "directions: 15 for 16 layers"),
        ({"vertical_reverse": None}, "vertical_reverse: None is not valid"),
        ({"dims": 2}, "dims: "),
    ],
)
def test_bad_options_are_named(overrides, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        RULE.clone(**overrides)
    assert "\n" not in str(error.value)
