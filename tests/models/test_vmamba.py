"""VMamba and the trunk of networks with stages, against the recorded vectors of the original code and by hand."""

import functools
import re

import golden
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import kernels
from kernels import build
from vimd_jax.models import create_model
from vimd_jax.models.hierarchical import PatchMerging
from vimd_jax.models.layers import DepthwiseConv
from vimd_jax.models.scan_order import stack_orders
from vimd_jax.models.vmamba import SS2D, VMamba, VSSBlock, cross_scan, cross_scan_order
from weight_convert import convert_state_dict
from weight_convert.mapping import plan

MIXERS = golden.cases("c08_vmamba_ss2d_v0*")
BLOCKS = golden.cases("c08_vmamba_vssblock_v0*")
MODELS = golden.cases("c08_vmamba_v0_reduced*")
SMALL = VMamba(num_classes=5, image_size=32, dims=8, depths=(1, 2), state_size=4)


def leaves(tree) -> dict[str, np.ndarray]:
    return flatten_dict(tree, sep="/")


def sample_images(height: int = 32, width: int = 32, batch: int = 2) -> jax.Array:
    return jax.random.uniform(jax.random.key(5), (batch, height, width, 3))


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


def check_part(case: str, apply, whole, prefix: str = "") -> None:
    """A recorded block or mixer: `apply` maps (its variables, input) to its output; with all gradients."""
    io = golden.tensors(case)
    variables = golden_models.first_block(golden.tensors(case, "weights"), whole, prefix)

    @jax.jit
    def output_and_gradients(variables, x):
        y, vjp = jax.vjp(apply, variables, x)
        return y, *vjp(io["dy"])

    output, gradient, input_gradient = output_and_gradients(variables, io["input"])
    assert golden.relative_error(output, io["output"]) < 1e-5
    assert golden.relative_error(input_gradient, io["grad_input"]) < 1e-4
    named = {name.removeprefix("grad/"): x for name, x in io.items() if name.startswith("grad/")}
    recorded = golden_models.first_block(named, whole, prefix)["params"]
    parameters = leaves(gradient["params"])
    of_this_part = [name for name in parameters if not prefix or name.startswith("mixer/")]
    for name in of_this_part:
        assert golden.relative_error(parameters[name], leaves(recorded)[name]) < 1e-4, name
    assert len(of_this_part) == len(named)


@pytest.mark.parametrize("size", ["4x4", "3x5"])
def test_recorded_scan_paths(size):
    recorded = golden.tensors("c08_vmamba_cross_scan_maps")
    paths = cross_scan(tuple(map(int, size.split("x"))))
    np.testing.assert_array_equal(paths, recorded[f"scan/{size}"])
    np.testing.assert_array_equal(paths, recorded[f"scan_fn/{size}"])


def test_scan_paths_by_hand():
    columns = [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    np.testing.assert_array_equal(cross_scan((3, 4)), [range(12), columns, range(11, -1, -1), columns[::-1]])


@pytest.mark.parametrize("case", MIXERS)
def test_recorded_mixers(case):
    io = golden.tensors(case)
    mixer = SS2D(state_size=16, dtype=jnp.float32)
    order = cross_scan_order(io["input"].shape[1:3])

    def apply(variables, x):
        return mixer.apply({"params": variables["params"]["mixer"]}, x, order)

    check_part(case, apply, VMamba(dims=io["input"].shape[-1], depths=(1,)), "op.")


@pytest.mark.parametrize("case", BLOCKS)
def test_recorded_blocks(case):
    io = golden.tensors(case)
    block = VSSBlock(drops=False, mixer=functools.partial(SS2D, state_size=16, dtype=jnp.float32))
    order = cross_scan_order(io["input"].shape[1:3])

    def apply(variables, x):
        return block.apply(variables, x, (0.0, order))[0]

    check_part(case, apply, VMamba(dims=io["input"].shape[-1], depths=(1,)))


@pytest.mark.parametrize("case", MODELS)
def test_recorded_models(case):
    io = golden.tensors(case)
    model = golden_models.vmamba(golden.meta(case)["constructor"])
    variables = convert_state_dict(golden.tensors(case, "weights"), model)
    images = golden_models.nhwc(io["input"])
    (gradient, image_gradient), (logits, features) = gradients(model, variables, images, io["dlogits"])
    assert golden.relative_error(logits, io["logits"]) < 1e-5
    for stage, (state, depth) in enumerate(zip(features["hidden_states"], model.depths, strict=True)):
        assert golden.relative_error(state, io[f"layers.{stage}.blocks.{depth - 1}"]) < 1e-5
    assert golden.relative_error(features["pre_logits"], io["classifier.norm"].mean(axis=(1, 2))) < 1e-5
    named = {name.removeprefix("grad/"): x for name, x in io.items() if name.startswith("grad/")}
    expected = leaves(convert_state_dict(named, model))
    for name, leaf in leaves(gradient).items():
        assert golden.relative_error(leaf, expected[name]) < 1e-4, name
    assert golden.relative_error(image_gradient, golden_models.nhwc(io["grad_input"])) < 1e-4


@pytest.mark.parametrize(
    ("size", "expected", "total", "length"),  # logits of the original code for weights set by a rule
    [
        ((64, 64), [0.158626, 0.044821, -0.075288, -0.185935, -0.272542], 0.370459, 0.617167),
        ((32, 64), [0.157804, 0.050508, -0.063833, -0.170206, -0.254592], -0.715328, 0.494173),
    ],
)
def test_logits_of_weights_by_rule(size, expected, total, length):
    model = VMamba(num_classes=5, dims=8, depths=(2, 1))
    weights = golden_models.weights_by_rule({entry.source: entry.shape for entry in plan(model)})
    images = golden_models.nhwc(golden_models.images_by_rule((2, 3, *size)))
    logits = run(model, convert_state_dict(weights, model), images)
    np.testing.assert_allclose(logits[0], expected, atol=1e-5)
    assert float(logits.sum()) == pytest.approx(total, abs=1e-5)
    assert float(jnp.linalg.norm(logits)) == pytest.approx(length, abs=1e-5)


def test_depthwise_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 4))
    conv = DepthwiseConv()
    params = golden_models.random_variables(conv, x)["params"]
    expected = jax.lax.conv_general_dilated(
        lhs=x,
        rhs=params["kernel"],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    np.testing.assert_allclose(conv.apply({"params": params}, x), expected + params["bias"], rtol=1e-4, atol=1e-5)


def test_patch_merging_by_hand():
    """The order of the four tokens, and zeros beyond odd borders, seen through a norm and projection that keep them."""
    x = jnp.arange(1.0, 16).reshape(1, 3, 5, 1)
    merging = PatchMerging(4, jnp.float32)
    params = {"norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}, "reduction": {"kernel": jnp.eye(4)}}
    merged = merging.apply({"params": params}, x)
    tokens = np.array([[[1, 6, 2, 7], [3, 8, 4, 9], [5, 10, 0, 0]], [[11, 0, 12, 0], [13, 0, 14, 0], [15, 0, 0, 0]]])
    mean, variance = tokens.mean(-1, keepdims=True), tokens.var(-1, keepdims=True)
    np.testing.assert_allclose(merged[0], (tokens - mean) / np.sqrt(variance + 1e-5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (22, 40)], ids=str)
def test_features_and_gradients_at_any_size(small, size):
    (gradient, image_gradient), (logits, features) = gradients(SMALL, small, sample_images(*size), 1.0)
    rows, columns = size[0] // 4, size[1] // 4
    assert [state.shape for state in features["hidden_states"]] == [
        (2, rows, columns, 8),
        (2, -(-rows // 2), -(-columns // 2), 16),
    ]
    assert features["pre_logits"].shape == (2, 16) and logits.shape == (2, 5)
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert np.all(np.isfinite(image_gradient))


def test_pixels_beyond_the_last_patch_are_left_out(small):
    images = sample_images(30, 35)
    np.testing.assert_array_equal(run(SMALL, small, images), run(SMALL, small, images[:, :28, :32]))


def test_bfloat16_is_close_and_finite(small):
    model = SMALL.clone(dtype="bfloat16")
    variables = jax.eval_shape(model.init, jax.random.key(0), sample_images())
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    gradient, (logits, features) = gradients(model, small, sample_images(), 1.0)
    assert {logits.dtype, *(state.dtype for state in features["hidden_states"])} == {jnp.dtype("float32")}
    assert 0 < golden.relative_error(logits, run(SMALL, small, sample_images())) < 0.05
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_drop_path_acts_only_while_training(small):
    model, images = SMALL.clone(drop_path_rate=0.9), sample_images(batch=8)
    train = jax.jit(lambda key: model.apply(small, images, train=True, rngs={"drop_path": key}))
    first, again, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(run(model, small, images), run(SMALL, small, images))
    jax.eval_shape(lambda: SMALL.apply(small, images, train=True))  # without a rate, no random stream is needed


def test_drop_rates_grow_over_all_stages(monkeypatch):
    rates = []
    monkeypatch.setattr(VMamba, "run_stage", lambda self, stage, x, stage_rates, train: rates.append(stage_rates) or x)
    model = VMamba(dims=8, depths=(1, 2, 3), drop_path_rate=0.5)
    jax.eval_shape(model.init, jax.random.key(0), sample_images())
    np.testing.assert_allclose(np.concatenate(rates), np.linspace(0, 0.5, 6))
    assert [len(stage) for stage in rates] == [1, 2, 3]


def test_remat_does_not_change_numbers(small):
    plain, _ = gradients(SMALL, small, sample_images(), 1.0)
    again, _ = gradients(SMALL.clone(remat=True), small, sample_images(), 1.0)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        assert golden.relative_error(other, one) < 1e-5


def test_program_does_not_grow_with_depth():
    def program(depth):
        model = SMALL.clone(depths=(2, depth))
        variables = jax.eval_shape(model.init, jax.random.key(0), sample_images())
        return len(jax.jit(model.apply).lower(variables, sample_images()).as_text().splitlines())

    assert program(27) == program(9)


def test_jit_traces_once(small):
    traced = []

    @jax.jit
    def logits(variables, images):
        traced.append(images.shape)
        return SMALL.apply(variables, images)

    for _ in range(3):
        logits(small, sample_images())
    assert len(traced) == 1


def test_orders_of_different_lengths_are_stacked():
    short, long = cross_scan_order((2, 3)), cross_scan_order((2, 3))
    long = long._replace(tokens=np.pad(long.tokens, ((0, 0), (0, 2)), constant_values=-1))
    stacked = stack_orders([short, long])
    assert stacked.tokens.shape == (2, 4, 8) and stacked.places is None
    np.testing.assert_array_equal(stacked.tokens[0, :, 6:], -1)


def test_initial_distributions():
    """Deviations of the original initialisation (its parameters at seed 0), and the exact bounds."""
    model = VMamba(num_classes=200, dims=96, depths=(1, 1))
    params = jax.jit(model.init)(jax.random.key(1), sample_images(16, 16, 1))["params"]
    mixer = params["stage_0"]["mixer"]
    deviations = {
        "patch_embed/kernel": (params["patch_embed"]["kernel"], 48**-0.5 / 3**0.5),
        "patch_embed/bias": (params["patch_embed"]["bias"], 48**-0.5 / 3**0.5),
        "head/kernel": (params["head"]["kernel"], 0.02),
        "reduction": (params["downsample_0"]["reduction"]["kernel"], 0.02),
        "in_proj": (mixer["in_proj"]["kernel"], 0.02),
        "out_proj": (mixer["out_proj"]["kernel"], 0.02),
        "conv": (mixer["conv"]["kernel"], 1 / 3 / 3**0.5),
        "conv bias": (mixer["conv"]["bias"], 1 / 3 / 3**0.5),
        "x_proj": (mixer["ssm"]["x_proj_kernel"], 192**-0.5 / 3**0.5),
        "dt_proj": (mixer["ssm"]["dt_proj_kernel"], 6**-0.5 / 3**0.5),
    }
    for name, (leaf, deviation) in deviations.items():
        assert float(leaf.mean()) == pytest.approx(0, abs=4 * deviation / leaf.size**0.5), name
        assert float(leaf.std()) == pytest.approx(deviation, rel=0.02 + 3 / leaf.size**0.5), name
    assert 0.99 * 192**-0.5 < np.abs(mixer["ssm"]["x_proj_kernel"]).max() <= 192**-0.5
    steps = jax.nn.softplus(mixer["ssm"]["dt_proj_bias"])
    assert 0.00099 < steps.min() < 0.002 and 0.05 < steps.max() < 0.101
    np.testing.assert_allclose(np.exp(mixer["ssm"]["A_log"]) - np.arange(1, 17), 0, atol=1e-5)
    assert np.all(mixer["ssm"]["D"] == 1) and not np.any(params["head"]["bias"])


def test_weight_decay_leaves_out_vectors_and_biases():
    """As published: the bias of the step sizes, a matrix called dt_projs_bias, decays."""
    paths = jax.eval_shape(SMALL.init, jax.random.key(0), sample_images())["params"]
    decayed = {"/".join(path) for path in flatten_dict(paths) if SMALL.decays(path)}
    assert {name.split("stage_0/")[-1] for name in decayed if "stage_0" in name} == {
        "mixer/in_proj/kernel",
        "mixer/conv/kernel",
        "mixer/out_proj/kernel",
        "mixer/ssm/x_proj_kernel",
        "mixer/ssm/dt_proj_kernel",
        "mixer/ssm/dt_proj_bias",
        "mixer/ssm/A_log",
    }
    assert {name for name in decayed if "stage" not in name} == {
        "patch_embed/kernel",
        "downsample_0/reduction/kernel",
        "head/kernel",
    }


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"dims": 0}, "dims"),
        ({"dims": (8, 16, 32)}, "dims"),
        ({"dims": "wide"}, "dims"),
        ({"depths": ()}, "depths"),
        ({"depths": (2, 0)}, "depths"),
        ({"depths": 2}, "depths"),
        ({"state_size": 0}, "state_size"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"dtype": "float16"}, "dtype"),
    ],
    ids=str,
)
def test_bad_options_are_named(overrides, field):
    with pytest.raises(ValueError, match=f"^{field}: .*") as error:
        SMALL.clone(**overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("images", "part"),
    [
        (jnp.zeros((32, 32, 3)), r"\(32, 32, 3\)"),
        (jnp.zeros((1, 32, 32, 3), jnp.uint8), "uint8"),
        (jnp.zeros((1, 32, 3, 3)), r"\(32, 3\)"),
    ],
    ids=["rank", "bytes", "small"],
)
def test_bad_images_are_named(small, images, part):
    with pytest.raises(ValueError, match=f"^images: .*{part}"):
        run(SMALL, small, images)


@pytest.mark.skipif(not build.compiler(), reason="no C++ compiler")
def test_the_native_scan_moves_no_directions():
    """It reads and writes the map's own rows: no map is gathered, forward or backward, nor kept in several orders."""
    model = create_model("vmamba_tiny", dims=8, depths=(1,), num_classes=0)
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(params):
        return jnp.sum(model.apply({"params": params}, images))

    with jax.default_device("cpu"), kernels.use(scan="native"):
        jaxpr = str(jax.make_jaxpr(jax.grad(loss))(variables["params"]))
    assert "ffi_call" in jaxpr and not re.search(r" (gather|scatter(-add)?)\[", jaxpr)
