"""Vim against the recorded vectors of the original code, its initialisation, and its options."""

import functools

import golden
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vimd_jax.models.isotropic import Layer
from vimd_jax.models.layers import rms_norm
from vimd_jax.models.mamba import ShortConv, inverse_softplus_of_steps
from vimd_jax.models.positions import resize_positions
from vimd_jax.models.vim import Mixer, Vim
from weight_convert import convert_state_dict
from weight_convert.mapping import plan

RECORDED = [*golden.cases("c03_vim_*"), *golden.cases("c03_vimd_*")]
SMALL = Vim(num_classes=7, image_size=32, patch_size=8, stride=8, embed_dim=16, depth=3)


def leaves(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def sample_images(batch: int = 2, size: int = 32) -> jax.Array:
    return jax.random.uniform(jax.random.key(5), (batch, size, size, 3))


@functools.partial(jax.jit, static_argnames=("model", "return_features"))
def run(model, variables, images, return_features=False):
    return model.apply(variables, images, return_features=return_features)


@functools.partial(jax.jit, static_argnames="model")
def gradients(model, variables, images, cotangent):
    def scalar(variables, images):
        logits, features = model.apply(variables, images, return_features=True)
        return jnp.sum(logits * cotangent), (logits, features)

    return jax.grad(scalar, argnums=(0, 1), has_aux=True)(variables, images)


@pytest.fixture(scope="module")
def small():
    return golden_models.random_variables(SMALL, sample_images())


@pytest.mark.parametrize("case", RECORDED)
def test_recorded_vectors(case):
    io = golden.tensors(case)
    model = golden_models.vim(golden.meta(case)["constructor"])
    variables = convert_state_dict(golden.tensors(case, "weights"), model)
    images = golden_models.nhwc(io["input"])
    if "dlogits" in io:
        (gradient, image_gradient), (logits, features) = gradients(model, variables, images, io["dlogits"])
        named = {name.removeprefix("grad/"): x for name, x in io.items() if name.startswith("grad/")}
        expected = leaves(convert_state_dict(named, model))
        for path, leaf in leaves(gradient).items():
            assert golden.relative_error(leaf, expected[path]) < 1e-4, path
        assert golden.relative_error(image_gradient, golden_models.nhwc(io["grad_input"])) < 1e-4
    else:
        logits, features = run(model, variables, images, return_features=True)
    assert golden.relative_error(logits, io["logits"]) < 1e-5
    assert golden.relative_error(features["pre_logits"], io["pre_head"]) < 1e-5
    states = [name for name in sorted(io) if name.startswith("feature")]
    assert len(states) == ("vimd" in case) * model.depth
    for state, name in zip(features["hidden_states"], states):
        assert golden.relative_error(state, io[name]) < 1e-5, name


# Logits of the original code for weights set by a rule (below): the first four, then the sum of all.
RULE = dict(num_classes=5, image_size=32, patch_size=16, stride=8, embed_dim=16, depth=3)
BY_RULE = {
    "published": ({}, [-0.236070, -0.063140, 0.117931, 0.283698], 1.031706),
    "stride": ({"stride": 16}, [-0.195500, 0.016671, 0.226571, 0.406994], 1.979650),
    "double": ({"class_token": "double"}, [0.053684, -0.002921, -0.058794, -0.106548], -0.507701),
    "mean pool": ({"class_token": None}, [-0.390872, -0.476078, -0.499631, -0.458363], -4.394712),
    "first release": (
        {"stride": 16, "class_token": "head", "rope": True, "merge": "sum"},
        [0.187484, 0.250567, 0.280863, 0.274600],
        2.461068,
    ),
}


@pytest.mark.parametrize("name", BY_RULE)
def test_logits_of_weights_by_rule(name):
    overrides, first, total = BY_RULE[name]
    model = Vim(**(RULE | overrides))
    weights = golden_models.weights_by_rule({entry.source: entry.shape for entry in plan(model)})
    images = golden_models.nhwc(golden_models.images_by_rule((2, 3, 32, 32)))
    logits = run(model, convert_state_dict(weights, model), images)
    np.testing.assert_allclose(logits[0, :4], first, atol=1e-5)
    assert float(logits.sum()) == pytest.approx(total, abs=5e-5)


def test_initial_distributions():
    """Means and deviations of the original initialisation (its parameters at seed 0), and the exact bounds."""
    params = jax.jit(Vim(num_classes=200, depth=4, stride=8).init)(jax.random.key(1), sample_images(1, 16))["params"]
    mixer = params["layers"]["mixer"]
    expected = {
        "patch_embed/kernel": (params["patch_embed"]["kernel"], 0, 0.0412),
        "class_token": (params["class_token"], 0, 0.02),
        "position_embedding": (params["position_embedding"], 0, 0.02),
        "head/kernel": (params["head"]["kernel"], 0, 0.02),
        "in_proj": (mixer["in_proj"]["kernel"], 0, 0.0417),
        "out_proj": (mixer["out_proj"]["kernel"], 0, 0.00602 * np.sqrt(24 / 4)),
        **{
            f"{direction}/{name}": (mixer[direction][module][leaf], 0, deviation)
            for direction in ("forward", "backward")
            for name, module, leaf, deviation in [
                ("conv", "conv", "kernel", 0.2887),
                ("conv bias", "conv", "bias", 0.2887),
                ("x_proj", "x_proj", "kernel", 0.0295),
                ("dt_proj", "dt_proj", "kernel", 0.1667),
            ]
        },
        "forward/dt bias": (mixer["forward"]["dt_proj"]["bias"], -4.58, 1.32),
    }
    for name, (leaf, mean, deviation) in expected.items():
        samples = leaf.size**0.5
        assert float(leaf.mean()) == pytest.approx(mean, abs=4 * deviation / samples), name
        assert float(leaf.std()) == pytest.approx(deviation, rel=0.02 + 3 / samples), name
    for direction in ("forward", "backward"):
        np.testing.assert_allclose(
            mixer[direction]["A_log"], np.broadcast_to(np.log(np.arange(1, 17)), (4, 384, 16)), rtol=1e-6
        )
        assert np.all(mixer[direction]["D"] == 1)
    assert not np.any(mixer["backward"]["dt_proj"]["bias"])
    assert not np.any(params["patch_embed"]["bias"]) and not np.any(params["head"]["bias"])
    assert np.all(params["norm"]["scale"] == 1) and np.all(params["layers"]["norm"]["scale"] == 1)
    uniform = {"in_proj": 192**-0.5, "out_proj": (384 * 4) ** -0.5}
    for name, bound in uniform.items():
        assert 0.99 * bound < np.abs(mixer[name]["kernel"]).max() <= bound, name
    assert not np.array_equal(mixer["in_proj"]["kernel"][0], mixer["in_proj"]["kernel"][1])


def test_initial_steps_are_log_uniform():
    steps = np.asarray(jax.nn.softplus(inverse_softplus_of_steps(jax.random.key(0), (20000,))))
    assert 0.00099 < steps.min() < 0.00102 and 0.098 < steps.max() < 0.101
    assert np.median(steps) == pytest.approx(0.01, rel=0.05)


def test_last_token_and_max_over_logits(small):
    images = sample_images()
    params = {name: small["params"][name] for name in small["params"] if name != "class_token"}
    params["position_embedding"] = params["position_embedding"][:, 1:]
    model = SMALL.clone(class_token=None)
    last_logits, last = run(model.clone(pool="last"), {"params": params}, images, return_features=True)
    max_logits, every = run(model.clone(pool="max"), {"params": params}, images, return_features=True)
    np.testing.assert_allclose(last["pre_logits"], last["hidden_states"][-1][:, -1], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(every["pre_logits"], every["hidden_states"][-1], rtol=1e-6, atol=1e-6)
    logits = every["pre_logits"] @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(max_logits, logits.max(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last_logits, logits[:, -1], rtol=1e-4, atol=1e-5)


def test_other_image_size_resizes_positions(small):
    """An image of another size gives the same as a network for that size with a resized table."""
    images = jax.random.uniform(jax.random.key(1), (2, 48, 40, 3))
    table = resize_positions(small["params"]["position_embedding"], (4, 4), (6, 5), "middle")
    resized = {"params": small["params"] | {"position_embedding": table}}
    made_for_it = SMALL.clone(image_size=(48, 40))
    np.testing.assert_allclose(run(SMALL, small, images), run(made_for_it, resized, images), rtol=1e-5, atol=1e-6)


def test_position_table_follows_image_size_not_the_first_image(small):
    shape = jax.eval_shape(SMALL.init, jax.random.key(0), sample_images(1, 64))["params"]["position_embedding"].shape
    assert shape == small["params"]["position_embedding"].shape == (1, 17, 16)


def test_backward_direction_looks_ahead():
    x = jax.random.normal(jax.random.key(0), (2, 9, 5))
    variables = ShortConv(False).init(jax.random.key(1), x)
    flipped = ShortConv(False).apply(variables, x[:, ::-1])[:, ::-1]
    np.testing.assert_allclose(ShortConv(True).apply(variables, x), flipped, rtol=1e-5, atol=1e-6)


def test_drop_path_drops_whole_images_and_scales_the_rest():
    mixer = functools.partial(Mixer, depth=3, state_size=4, merge="mean", dtype=jnp.float32)
    layer = Layer(mixer, rms_norm, drops=True, keep=None)
    x = jax.random.normal(jax.random.key(0), (64, 4, 16))

    @jax.jit
    def mixed(rate):
        keys = {"params": jax.random.key(1), "drop_path": jax.random.key(2)}
        return layer.init_with_output(keys, x, rate, None, None)[0][0] - x

    whole, dropped = mixed(0.0), mixed(0.75)
    kept = np.asarray(jnp.any(dropped != 0, axis=(1, 2)))
    assert 6 <= kept.sum() <= 28
    np.testing.assert_allclose(dropped[kept], 4 * whole[kept], rtol=1e-4, atol=1e-5)


def test_drop_path_acts_only_while_training(small):
    model = SMALL.clone(drop_path_rate=0.9)
    images = sample_images()

    @jax.jit
    def train(key):
        return model.apply(small, images, train=True, rngs={"drop_path": key})

    first, again, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(run(model, small, images), run(SMALL, small, images))
    jax.eval_shape(lambda: SMALL.apply(small, images, train=True))  # without a rate, no random stream is needed


def test_remat_changes_memory_but_not_numbers():
    """With remat the gradient's memory grows by one state per layer; results are the same."""
    images = sample_images(4)
    state = 4 * 17 * 16 * 4  # batch, tokens, channels, bytes
    growth, results = {}, {}
    for remat in (False, True):
        model = SMALL.clone(remat=remat)
        short, long = (_compiled_gradient(model.clone(depth=depth), images) for depth in (8, 16))
        growth[remat] = (_temporary_bytes(long) - _temporary_bytes(short)) / 8 / state
        results[remat] = jax.tree.leaves(short(golden_models.random_variables(model.clone(depth=8), images), images))
    assert growth[True] < 1.5
    assert growth[False] > 5 * growth[True]
    for plain, again in zip(results[False], results[True]):
        assert golden.relative_error(again, plain) < 1e-5


def _compiled_gradient(model, images):
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    gradient = jax.grad(lambda v, x: jnp.sum(jnp.sin(model.apply(v, x, train=True))))
    return jax.jit(gradient).lower(variables, images).compile()


def _temporary_bytes(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def test_program_does_not_grow_with_depth():
    def program(depth):
        model = SMALL.clone(depth=depth, remat=True)
        variables = jax.eval_shape(model.init, jax.random.key(0), sample_images())
        gradient = jax.grad(lambda v, x: model.apply(v, x, train=True).sum())
        return len(jax.jit(gradient).lower(variables, sample_images()).as_text().splitlines())

    assert program(48) == program(24)


def test_bfloat16_is_close_and_finite(small):
    images = sample_images()
    model = SMALL.clone(dtype="bfloat16")
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    gradient, (logits, features) = gradients(model, small, images, 1.0)
    exact = run(SMALL, small, images)
    assert logits.dtype == features["hidden_states"].dtype == jnp.float32
    assert 0 < golden.relative_error(logits, exact) < 0.05
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_input_normalization_is_imagenet_s(small):
    images = sample_images()
    normalized = (images - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    logits = run(SMALL.clone(input_normalization=True), small, images)
    np.testing.assert_allclose(logits, run(SMALL, small, normalized.astype(jnp.float32)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"class_token": "center"}, "class_token"),
        ({"pool": "all"}, "pool"),
        ({"merge": "concat"}, "merge"),
        ({"rope": True, "embed_dim": 18}, "rope"),
        ({"depth": 0}, "depth"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"image_size": 7}, "image_size"),
        ({"image_size": (32, 32, 3)}, "image_size"),
    ],
)
def test_bad_options_are_named(overrides, field):
    with pytest.raises(ValueError, match=f"^{field}: .*") as error:
        SMALL.clone(**overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("images", "part"),
    [
        (jnp.zeros((32, 32, 3)), r"\(32, 32, 3\)"),
        (jnp.zeros((1, 32, 32, 1)), r"\(1, 32, 32, 1\)"),
        (jnp.zeros((1, 3, 32, 32)), r"\(1, 3, 32, 32\)"),
        (jnp.zeros((1, 32, 32, 3), jnp.uint8), "uint8"),
        (jnp.zeros((1, 32, 7, 3)), r"\(32, 7\)"),
    ],
)
def test_bad_images_are_named(small, images, part):
    with pytest.raises(ValueError, match=f"^images: .*{part}"):
        run(SMALL, small, images)
