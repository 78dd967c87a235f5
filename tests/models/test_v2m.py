"""V2M against recorded vectors of the original code and figures of an independent program; routing and options."""

import functools
from unittest import mock

import golden
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vimd_jax.models.v2m import V2M, LinePass, Mixer
from weight_convert import convert_state_dict
from weight_convert.mapping import plan

MIXERS, MODELS = golden.cases("c09_v2m_mixer_*"), golden.cases("c09_v2m_model_*")
ROUTINGS = ("four_corners", "aligned", "published")
SMALL = V2M(num_classes=7, image_size=(24, 32), patch_size=8, stride=8, embed_dim=16, depth=2, state_size=4)


@functools.partial(jax.jit, static_argnames=("model", "return_features"))
def run(model, variables, x, **return_features):
    return model.apply(variables, x, **return_features)


@functools.partial(jax.jit, static_argnames="model")
def gradients(model, variables, x, cotangent):
    """Gradients of sum(output * cotangent) with respect to the variables and x; and the output."""

    def scalar(variables, x):
        y = model.apply(variables, x)
        return jnp.sum(y * cotangent), y

    return jax.grad(scalar, argnums=(0, 1), has_aux=True)(variables, x)


def mixer_of(model: V2M) -> Mixer:
    return model.make_mixer(model.grid)()


def mixer_variables(weights: dict[str, np.ndarray], model: V2M):
    """Converts a mixer's tensors to variables, by the table of the whole network."""
    rest = {entry.source: np.zeros(entry.shape, np.float32) for entry in plan(model)}
    named = {f"layers.0.mixer.{name}": tensor for name, tensor in weights.items()}
    assert set(named) == {name for name in rest if ".mixer." in name}
    layers = convert_state_dict(rest | named, model)["params"]["layers"]
    return {"params": jax.tree.map(lambda leaf: leaf[0], layers["mixer"])}


def assert_close(actual, expected, tolerance):
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        branch = functools.reduce(lambda tree, key: tree[key.key], path, actual)
        assert golden.relative_error(branch, leaf) < tolerance, jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def small():
    return golden_models.random_variables(SMALL, jnp.zeros((1, 24, 32, 3)))


def sample_images(height: int = 24, width: int = 32) -> jax.Array:
    return jax.random.uniform(jax.random.key(5), (2, height, width, 3))


@pytest.mark.parametrize("case", MIXERS)
def test_recorded_mixers(case):
    io, constructor = golden.tensors(case), golden.meta(case)["constructor"]
    model = V2M(
        image_size=16 * constructor["grid"],
        embed_dim=constructor["d_model"],
        depth=1,
        merge="mean" if constructor["if_devide_out"] else "sum",
        routing="published",
    )
    variables = mixer_variables(golden.tensors(case, "weights"), model)
    (gradient, x_gradient), y = gradients(mixer_of(model), variables, io["input"], io["dy"])
    assert golden.relative_error(y, io["output"]) < 1e-5
    assert golden.relative_error(x_gradient, io["grad_input"]) < 1e-5
    recorded = {name.removeprefix("grad/"): x for name, x in io.items() if name.startswith("grad/")}
    assert_close(gradient, mixer_variables(recorded, model), 1e-4)


@pytest.mark.parametrize("case", MODELS)
def test_recorded_models(case):
    io = golden.tensors(case)
    model = golden_models.v2m(golden.meta(case)["constructor"])
    variables = convert_state_dict(golden.tensors(case, "weights"), model)
    images = golden_models.nhwc(io["input"])
    (gradient, image_gradient), logits = gradients(model, variables, images, io["dlogits"])
    assert golden.relative_error(logits, io["logits"]) < 1e-5
    assert golden.relative_error(image_gradient, golden_models.nhwc(io["grad_input"])) < 1e-4
    recorded = {name.removeprefix("grad/"): x for name, x in io.items() if name.startswith("grad/")}
    assert_close(gradient, convert_state_dict(recorded, model), 1e-4)

    _, features = run(model, variables, images, return_features=True)
    assert golden.relative_error(features["pre_logits"], io["pre_head"]) < 1e-5
    assert len(features["hidden_states"]) == model.depth
    for i in range(1, model.depth):  # the original names the stream by the layer that reads it
        stream = io[f"layer{i:02}.residual"]
        normalized = stream / np.sqrt(np.square(stream).mean(-1, keepdims=True) + 1e-5)
        expected = normalized * np.asarray(variables["params"]["norm"]["scale"])
        assert golden.relative_error(features["hidden_states"][i - 1], expected) < 1e-5, i


# For weights set by a rule: the first outputs, the sum of all and the Euclidean norm. Those of "published" come from
# the original code, the others from a NumPy program that shares no code with this one.
LOGITS_BY_RULE = {
    "published": ([-1.102649, -1.010480, -0.786939, -0.461095, -0.075314], -6.936160, 2.496819),
    "aligned": ([-0.909639, -0.839688, -0.660647, -0.395779, -0.079494], -5.848851, 2.085572),
    "four_corners": ([-0.878532, -0.828673, -0.671161, -0.426449, -0.126321], -5.935270, 2.073493),
}
MIXERS_BY_RULE = {
    ("published", "mean"): ([-0.018996, -0.012143, -0.003705, 0.005216, 0.013456], 2.048343, 0.462122),
    ("published", "sum"): ([-0.037992, -0.024286, -0.007411, 0.010431, 0.026912], 4.096687, 0.924244),
    ("aligned", "mean"): ([-0.070703, -0.048081, -0.019186, 0.012212, 0.042017], 2.048343, 0.582834),
    ("four_corners", "mean"): ([-0.084340, -0.059822, -0.027499, 0.008411, 0.043224], 2.166415, 0.579398),
}


def assert_figures(y, figures):
    first, total, norm = figures
    np.testing.assert_allclose(y.ravel()[: len(first)], first, atol=2e-6)
    assert float(y.sum()) == pytest.approx(total, abs=1e-5)
    assert float(jnp.linalg.norm(y)) == pytest.approx(norm, abs=5e-6)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_logits_of_weights_by_rule(routing):
    model = V2M(num_classes=5, image_size=32, patch_size=16, stride=8, embed_dim=16, depth=3, routing=routing)
    weights = golden_models.weights_by_rule({entry.source: entry.shape for entry in plan(model)})
    images = golden_models.nhwc(golden_models.images_by_rule((2, 3, 32, 32)))
    assert_figures(run(model, convert_state_dict(weights, model), images), LOGITS_BY_RULE[routing])


@pytest.mark.parametrize(("routing", "merge"), MIXERS_BY_RULE)
def test_mixers_with_weights_by_rule(routing, merge):
    model = V2M(image_size=48, embed_dim=8, depth=1, state_size=4, merge=merge, routing=routing)
    prefix = "layers.0.mixer."
    shapes = {e.source.removeprefix(prefix): e.shape for e in plan(model) if e.source.startswith(prefix)}
    variables = mixer_variables(golden_models.weights_by_rule(shapes), model)
    x = np.sin(0.3 * np.arange(9 * 8)).reshape(1, 9, 8).astype(np.float32)
    assert_figures(run(mixer_of(model), variables, x), MIXERS_BY_RULE[routing, merge])


def routed(grid: tuple[int, int], routing: str) -> np.ndarray:
    """The number of views that map each patch (columns) to each output position (rows), with identities for scans."""
    tokens = grid[0] * grid[1]
    mixer = Mixer(depth=1, state_size=16, grid=grid, merge="sum", routing=routing, dtype=jnp.float32)
    to_x = np.eye(tokens, 4 * tokens, dtype=np.float32)
    params = {"in_proj": {"kernel": to_x}, "out_proj": {"kernel": np.eye(2 * tokens, tokens, dtype=np.float32)}}
    scans = mock.patch.object(LinePass, "__call__", lambda self, x, reverse: x)
    with scans, mock.patch.object(nn, "silu", jnp.ones_like):  # gates of one
        return mixer.apply({"params": params}, np.eye(tokens, dtype=np.float32)[None])[0]


@pytest.mark.parametrize("side", [3, 4, 5])
def test_published_routing(side):
    recorded = golden.tensors("c09_v2m_routing")[f"routing/P{side}"]
    np.testing.assert_array_equal(routed((side, side), "published"), recorded)


@pytest.mark.parametrize("routing", ["four_corners", "aligned"])
def test_every_output_ends_up_at_its_own_patch(routing):
    np.testing.assert_array_equal(routed((3, 4), routing), 4 * np.eye(12))


def test_four_corners_rotate_with_the_grid():
    """Rotating an image permutes the corners, so the output rotates with it."""
    model = SMALL.clone(depth=1)
    params = golden_models.random_variables(mixer_of(model), jnp.zeros((1, 12, 16)), seed=1)
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 16)).astype(np.float32)

    def mix(x):
        return run(model.make_mixer(x.shape[1:3])(), params, x.reshape(1, 12, 16)).reshape(x.shape)

    np.testing.assert_allclose(mix(np.rot90(x, axes=(1, 2))), np.rot90(mix(x), axes=(1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("routing", ["four_corners", "aligned"])
def test_what_a_patch_sees(routing):
    """Every patch sees all others from four corners; in the authors' views not those both below and to the right."""
    model = SMALL.clone(depth=1, routing=routing)
    mixer = mixer_of(model)
    params = golden_models.random_variables(mixer, jnp.zeros((1, 12, 16)), seed=1)
    x = jax.random.normal(jax.random.key(0), (1, 12, 16))
    patch = 1 * 4 + 2  # row 1, column 2 of 3 x 4
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(mixer.apply(params, x)[0, patch])))(x)
    seen = np.any(np.asarray(gradient[0]) != 0, axis=-1).reshape(3, 4)
    expected = np.ones((3, 4), bool)
    if routing == "aligned":
        expected[2:, 3:] = False
    np.testing.assert_array_equal(seen, expected)


def test_initial_distributions():
    """Deviations of the original initialisation (its parameters at seed 0), and constant parameters."""
    params = jax.jit(V2M(num_classes=100, depth=4).init)(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))["params"]
    mixer = params["layers"]["mixer"]
    expected = {
        "patch_embed": (params["patch_embed"]["kernel"], 0, 0.0411),
        "position_embedding": (params["position_embedding"], 0, 0.02),
        "head": (params["head"]["kernel"], 0, 0.02),
        "in_proj": (mixer["in_proj"]["kernel"], 0, 0.0417),
        "out_proj": (mixer["out_proj"]["kernel"], 0, 0.0295 / np.sqrt(4)),
        "steps": (mixer["along"]["dt_proj"]["bias"], -4.58, 1.32),
        **{
            f"{scan}/{module}/{leaf}": (mixer[scan][module][leaf], 0, deviation)
            for scan in ("along", "across")
            for module, leaf, deviation in [
                ("conv", "kernel", 0.2887),
                ("conv", "bias", 0.2887),
                ("x_proj", "kernel", 0.0295),
                ("dt_proj", "kernel", 0.1667),
            ]
        },
    }
    for name, (leaf, mean, deviation) in expected.items():
        samples = leaf.size**0.5
        assert float(leaf.mean()) == pytest.approx(mean, abs=4 * deviation / samples), name
        assert float(leaf.std()) == pytest.approx(deviation, rel=0.02 + 3 / samples), name
    counting = np.broadcast_to(np.log(np.arange(1, 17)), (4, 384, 16))
    for scan in ("along", "across"):
        np.testing.assert_allclose(mixer[scan]["A_log"], counting, rtol=1e-6)
        assert np.all(mixer[scan]["D"] == 1)
    assert not np.any(mixer["across"]["dt_proj"]["bias"])
    assert not np.any(params["patch_embed"]["bias"]) and not np.any(params["head"]["bias"])
    assert np.all(params["norm"]["scale"] == 1) and np.all(params["layers"]["norm"]["scale"] == 1)


def test_what_weight_decay_shrinks(small):
    """timm's rule, as for Vim: matrices, including state matrices, but not vectors or positions."""
    leaves = {tuple(key.key for key in path[1:]) for path, _ in jax.tree_util.tree_leaves_with_path(small)}
    spared = {path for path in leaves if not V2M.decays(path)}
    assert {path[-1] for path in spared} == {"bias", "scale", "D", "position_embedding"}
    assert {path[-1] for path in leaves - spared} == {"kernel", "A_log"}


@pytest.mark.parametrize("size", [(24, 32), (40, 24)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_finite_at_any_size_and_dtype(small, size, dtype):
    model, images = SMALL.clone(dtype=dtype), sample_images(*size)
    patches = size[0] * size[1] // 64
    logits, features = run(model, small, images, return_features=True)
    assert logits.shape == (2, 7) and logits.dtype == jnp.float32
    assert features["hidden_states"].shape == (2, 2, patches, 16)
    assert features["pre_logits"].shape == (2, 16)
    (gradient, image_gradient), again = gradients(model, small, images, 1.0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((gradient, image_gradient)))
    if dtype == "bfloat16":
        exact = run(SMALL, small, images)
        assert 0 < golden.relative_error(logits, exact) < 0.05
    np.testing.assert_allclose(again, logits, rtol=1e-4, atol=1e-4)


def test_remat_and_drop_path(small):
    images = sample_images()
    np.testing.assert_allclose(
        run(SMALL.clone(remat=True), small, images), run(SMALL, small, images), rtol=1e-5, atol=1e-6
    )
    model = SMALL.clone(drop_path_rate=0.9)
    train = jax.jit(lambda key: model.apply(small, images, train=True, rngs={"drop_path": key}))
    assert not np.allclose(train(jax.random.key(0)), train(jax.random.key(1)))
    np.testing.assert_array_equal(run(model, small, images), run(SMALL, small, images))


def test_one_trace_serves_all_batches_of_a_shape(small):
    traces = []

    @jax.jit
    def apply(images):
        traces.append(images.shape)
        return SMALL.apply(small, images)

    for _ in range(2):
        apply(sample_images())
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"routing": "rotated"}, "^routing: .* expected 'four_corners' or 'aligned' or 'published'$"),
        ({"merge": "concat"}, "^merge: "),
        ({"class_token": "middle"}, "^class_token: 'middle' is not valid, expected None$"),
        ({"routing": "published"}, r'^routing: "published" needs a square grid .*image_size \(24, 32\) have 3 x 4; '),
        ({"image_size": 7}, "^image_size: "),
    ],
)
def test_bad_options_are_named(overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        SMALL.clone(**overrides)
    assert "\n" not in str(error.value)


def test_published_routing_needs_square_images(small):
    model = SMALL.clone(image_size=32, routing="published")
    with pytest.raises(ValueError, match=r'^routing: "published" needs a square grid .*images \(40, 24\) have 5 x 3'):
        jax.eval_shape(model.init, jax.random.key(0), sample_images(40, 24))
