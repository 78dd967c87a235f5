"""Strictness and exactness of the conversion. Outputs of converted networks are compared in tests/models."""

import json

import golden
import golden_models
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vimd_jax.models import create_model
from vimd_jax.models.network import variable_shapes
from vimd_jax.models.published import PUBLISHED as PUBLISHED_NETWORKS
from vimd_jax.models.srresnet import SRResNet
from vimd_jax.models.srvm import SRVM
from vimd_jax.models.vim import Vim
from weight_convert import convert_state_dict, export_state_dict
from weight_convert.mapping import plan, step_counters
from weight_convert.tables import computed_tensors

FILES = [json.loads(path.read_text()) for path in sorted((golden.FOLDER / "keys").glob("*.json"))]
SEGMENTERS = json.loads((golden.FOLDER / "segmenter_keys.json").read_text())
PUBLISHED = {part: {name: value for file in FILES for name, value in file[part].items()} for part in FILES[0]}


def published(variant: str) -> dict[str, np.ndarray]:
    """A state dict with the names and shapes of a published network and random values."""
    description, random = PUBLISHED["variants"][variant], np.random.default_rng(0)
    names = PUBLISHED["names"][description["names"]]
    return {
        name: random.random(shape, np.float32) for name, shape in zip(names, description["shapes"], strict=True)
    } | {name: random.integers(2**62, size=()) for name in names if name.endswith("num_batches_tracked")}


def model_of(variant: str):
    description = PUBLISHED["variants"][variant]
    if "model" in description:
        return create_model(description["model"], **description["options"])
    if "srresnet" in variant:
        return create_model(variant.removeprefix("vimd_").removesuffix("_64_16"))
    if "student" in variant:
        return create_model("vim_tiny_stride8", num_classes=PUBLISHED["variants"][variant]["num_classes"])
    size = next(size for size in ("tiny", "small", "base") if size in variant)
    if variant.startswith("v2m"):
        return create_model(f"v2m_{size}", depth=12 if "depth12" in variant else 24)
    return create_model(f"vim_{size}" + ("_stride8" if "stride8" in variant else ""))


def assert_same_bits(actual: dict, expected: dict):
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].shape == array.shape, name
        assert actual[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("variant", sorted(PUBLISHED["variants"]))
def test_published_networks_round_trip_to_the_bit(variant):
    state_dict, model = published(variant), model_of(variant)
    state_dict |= computed_tensors(model)  # rotary tables are no weights
    variables = convert_state_dict(state_dict, model)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == PUBLISHED["variants"][variant]["param_count"]
    uncounted = {name: x if x.ndim else np.zeros((), np.int64) for name, x in state_dict.items()}
    assert_same_bits(export_state_dict(variables, model), uncounted)


@pytest.mark.parametrize("name", SEGMENTERS["variants"])
def test_published_segmenters_have_these_tensors(name):
    """Every name in the authors' files is used once, with its shape; every part has the same number of parameters."""
    published, model = SEGMENTERS["variants"][name], create_model(name)
    entries = plan(model)
    shapes = {entry.source: entry.shape for entry in entries} | dict.fromkeys(step_counters(entries), ())
    shapes |= {tensor: value.shape for tensor, value in computed_tensors(model).items()}
    names = SEGMENTERS["names"][published["names"]]
    assert shapes == {tensor: tuple(shape) for tensor, shape in zip(names, published["shapes"], strict=True)}
    assert len(entries) == len({entry.source for entry in entries})
    counts = dict.fromkeys(published["param_counts"], 0)
    for path, leaf in variable_shapes(model).items():
        if path.startswith("params/"):
            counts[path.split("/")[1]] += leaf.size
    assert counts == published["param_counts"]
    assert name not in PUBLISHED_NETWORKS or PUBLISHED_NETWORKS[name].parameters == sum(counts.values())


@pytest.mark.parametrize("case", golden.cases("c10_segmentor_*"))
def test_segmenters_round_trip_to_the_bit(case):
    state_dict, model = golden.tensors(case, "weights"), golden_models.segmenter(golden.meta(case)["constructor"])
    exported = export_state_dict(convert_state_dict(state_dict, model), model)
    assert set(exported) == set(state_dict)
    weights = {name: x for name, x in state_dict.items() if not name.endswith("num_batches_tracked")}
    tables = computed_tensors(model)  # no weights
    assert_same_bits({name: exported[name] for name in weights}, weights | tables)


SMALL = Vim(num_classes=5, image_size=32, stride=8, embed_dim=16, depth=2, state_size=4)
SMALL_SR = SRResNet(scale=2, channels=4, num_blocks=2)


def random_state_dict(model) -> dict[str, np.ndarray]:
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return export_state_dict(
        jax.tree.map(lambda x: np.random.default_rng(x.size).random(x.shape, np.float32), shapes), model
    )


@pytest.mark.parametrize("class_token", ["middle", "head", "double", None])
def test_the_variables_are_those_of_init(class_token):
    model = SMALL.copy(class_token=class_token)
    variables = convert_state_dict(random_state_dict(model), model)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def test_a_layer_is_where_it_belongs():
    """Compares with the documented layout of the parameters, not with the inverse conversion."""
    state_dict = random_state_dict(SMALL)
    params = convert_state_dict(state_dict, SMALL)["params"]
    mixer = params["layers"]["mixer"]
    np.testing.assert_array_equal(mixer["in_proj"]["kernel"][1], state_dict["layers.1.mixer.in_proj.weight"].T)
    backward = mixer["backward"]
    np.testing.assert_array_equal(backward["A_log"][1], state_dict["layers.1.mixer.A_b_log"])
    np.testing.assert_array_equal(
        backward["conv"]["kernel"][0, :, 0, :], state_dict["layers.0.mixer.conv1d_b.weight"][:, 0].T
    )
    patches = np.moveaxis(state_dict["patch_embed.proj.weight"], [2, 3], [0, 1]).swapaxes(2, 3)
    np.testing.assert_array_equal(params["patch_embed"]["kernel"], patches)


def without(name):
    return lambda weights: weights.pop(name)


def rename(old, new):
    return lambda weights: weights.update({new: weights.pop(old)})


def cast(name, dtype):
    return lambda weights: weights.update({name: weights[name].astype(dtype)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("norm_f.weight"), r"do not fit Vim: missing \(1\): norm_f.weight$"),
        (without("layers.1.mixer.D_b"), r"missing \(1\): layers.1.mixer.D_b$"),
        (rename("norm_f.weight", "norm.weight"), r"missing \(1\): norm_f.weight; unexpected \(1\): norm.weight$"),
        (lambda w: w.update({"layers.2.norm.weight": np.zeros(16)}), r"unexpected \(1\): layers.2.norm.weight$"),
        (lambda w: w.update({"head.bias": np.zeros(6)}), r"wrong shape \(1\): head.bias is \(6,\), expected \(5,\)$"),
        (lambda w: w.update({"norm_f.num_batches_tracked": np.array(1)}), "unexpected"),
        (cast("head.bias", np.int32), r"not floating point \(1\): head.bias is int32$"),
        (cast("head.bias", np.complex64), r"not floating point \(1\): head.bias is complex64$"),
        (
            lambda w: w.update({"rope.freqs_cos": np.zeros((4, 16))}),
            "unexpected.*; its tensors imply other options: rope=True",
        ),
        (lambda w: w.update({"layers.0.mixer.gamma": np.zeros(16)}), r"unexpected \(1\): layers.0.mixer.gamma$"),
        (without("cls_token"), "missing.*; its tensors imply other options: class_token=None"),
        (lambda w: w.clear(), r"missing \(41\): .* and 38 more; no tensor has a name of Vim"),
    ],
)
def test_differences_are_listed(change, message):
    weights = random_state_dict(SMALL)
    change(weights)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(weights, SMALL)


def test_names_are_escaped_and_cut_in_messages():
    weights = random_state_dict(SMALL) | {"\x1b[2J\nlast line: all is well" + "x" * 1000: np.zeros(3)}
    with pytest.raises(ValueError) as error:
        convert_state_dict(weights, SMALL)
    assert r"\x1b[2J\nlast line" in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_rotary_tables_are_compared():
    model = Vim(num_classes=5, image_size=32, patch_size=8, stride=8, embed_dim=16, depth=1, rope=True)
    weights = random_state_dict(model)
    assert weights["rope.freqs_cos"].shape == (16, 16)
    convert_state_dict(weights, model)
    with pytest.raises(ValueError, match=r"not the rotary table of this grid \(1\): rope.freqs_sin$"):
        convert_state_dict(weights | {"rope.freqs_sin": weights["rope.freqs_cos"]}, model)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_dtypes_become_float32(dtype):
    weights = {name: x.astype(dtype) for name, x in random_state_dict(SMALL).items()}
    for leaf in jax.tree.leaves(convert_state_dict(weights, SMALL)):
        assert leaf.dtype == jnp.float32
    bias = convert_state_dict(weights, SMALL)["params"]["head"]["bias"]
    np.testing.assert_array_equal(bias, weights["head.bias"].astype(np.float32))


def test_both_parts_of_srvm():
    model = SRVM(sr=SMALL_SR, classifier=SMALL)
    parts = {"sr": random_state_dict(SMALL_SR), "classifier": random_state_dict(SMALL)}
    variables = convert_state_dict(parts, model)
    for part, network in (("sr", SMALL_SR), ("classifier", SMALL)):
        alone = convert_state_dict(parts[part], network)
        jax.tree.map(np.testing.assert_array_equal, variables["params"][part], alone["params"])
    jax.tree.map(
        np.testing.assert_array_equal,
        variables["batch_stats"]["sr"],
        convert_state_dict(parts["sr"], SMALL_SR)["batch_stats"],
    )
    flat = {f"{part}.{name}": x for part, tensors in parts.items() for name, x in tensors.items()}
    assert_same_bits(export_state_dict(variables, model), flat)
    jax.tree.map(np.testing.assert_array_equal, convert_state_dict(flat, model), variables)
    with pytest.raises(ValueError, match="missing.*sr.conv1.0.bias"):
        convert_state_dict({"classifier": parts["classifier"]}, model)


def test_batch_counters_are_optional_but_belong_to_a_batch_norm():
    weights = random_state_dict(SMALL_SR)
    without_counters = {name: x for name, x in weights.items() if not name.endswith("num_batches_tracked")}
    assert len(without_counters) == len(weights) - 5
    jax.tree.map(
        np.testing.assert_array_equal,
        convert_state_dict(without_counters, SMALL_SR),
        convert_state_dict(weights, SMALL_SR),
    )
    with pytest.raises(ValueError, match=r"unexpected \(1\): conv3.num_batches_tracked"):
        convert_state_dict(weights | {"conv3.num_batches_tracked": np.array(1)}, SMALL_SR)
