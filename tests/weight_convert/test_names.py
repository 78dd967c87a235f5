"""Names and shapes of weights of networks with stages, in files from older releases and other tools."""

import functools

import golden_models
import jax
import ml_dtypes
import numpy as np
import pytest
import torch_writer

from vimd_jax.models import create_model
from vimd_jax.models.efficient_vmamba import EfficientVMamba
from vimd_jax.models.vim import Vim
from vimd_jax.models.vmamba import VMamba
from vimd_jax.models.vmamba2 import VMamba2
from weight_convert import (
    convert_state_dict,
    export_state_dict,
    load_torch_checkpoint,
    load_torch_model,
    torch_variables,
)

VMAMBA = VMamba(num_classes=5, dims=8, depths=(2, 1), state_size=4)
EFFICIENT = EfficientVMamba(num_classes=5, dims=8, depths=(1, 1, 2, 1), state_size=4)


def weights_of(model) -> dict[str, np.ndarray]:
    variables = golden_models.random_variables(model, np.zeros((1, 32, 32, 3), np.float32))
    return export_state_dict(variables, model)


def renamed(weights: dict, names: dict[str, str]) -> dict:
    """The weights, with parts of their names replaced."""

    def old(name):
        return functools.reduce(lambda name, part: name.replace(part, names[part]), names, name)

    return {old(name): tensor for name, tensor in weights.items()}


def assert_same(actual: dict, expected: dict):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


FIRST_NAMES = {
    "patch_embed.0.": "patch_embed.proj.",
    "patch_embed.2.": "patch_embed.norm.",
    "blocks.0.norm.": "blocks.0.ln_1.",
    "blocks.1.norm.": "blocks.1.ln_1.",
    ".op.": ".self_attention.",
    "classifier.norm.": "norm.",
    "classifier.head.": "head.",
}
ONE_FILE_NAMES = {
    ".op.x_proj_weight": ".op.x_proj.weight",
    ".op.dt_projs_weight": ".op.dt_projs.weight",
    ".downsample.norm.": ".downsample.1.",
    ".downsample.reduction.": ".downsample.2.",
}


@pytest.mark.parametrize("model", [VMAMBA, EFFICIENT], ids=["vmamba", "efficient"])
def test_first_names(model):
    weights = weights_of(model)
    old = renamed(weights, FIRST_NAMES)
    assert "layers.0.blocks.0.self_attention.Ds" in old and "head.bias" in old and "layers.1.blocks.0.ln_1.bias" in old
    assert_same(convert_state_dict(old, model), convert_state_dict(weights, model))


def test_names_and_shapes_of_the_version_in_one_file():
    """In such files the directions share one projection tensor, and linear layers may be 1×1 convolutions."""
    weights = weights_of(VMAMBA)
    old = {
        name: x.reshape(-1, x.shape[-1]) if name.endswith(("x_proj.weight", "dt_projs.weight")) else x
        for name, x in renamed(weights, ONE_FILE_NAMES).items()
    }
    assert old["layers.0.blocks.0.op.x_proj.weight"].shape == (4 * 9, 16)
    for name in [name for name in old if name.endswith(("in_proj.weight", "out_proj.weight", "downsample.2.weight"))]:
        old[name] = old[name][:, :, None, None]
    assert_same(convert_state_dict(old, VMAMBA), convert_state_dict(weights, VMAMBA))


def test_convolutions_that_come_as_linear_layers():
    weights = weights_of(EFFICIENT)
    flat = {name: x[:, :, 0, 0] if x.shape[2:] == (1, 1) and "conv_" in name else x for name, x in weights.items()}
    assert flat["layers.2.1.conv_pw.0.weight"].ndim == 2
    assert_same(convert_state_dict(flat, EFFICIENT), convert_state_dict(weights, EFFICIENT))


def test_other_shapes_of_the_same_size_are_refused():
    weights = weights_of(VMAMBA)
    name = "layers.0.blocks.0.op.out_proj.weight"
    with pytest.raises(ValueError, match=rf"wrong shape \(1\): {name} is \(16, 8\), expected \(8, 16\)"):
        convert_state_dict(weights | {name: weights[name].T}, VMAMBA)


def test_blocks_are_where_they_belong():
    """Compares with the documented layouts of the parameters, not with the inverse conversion."""
    weights = weights_of(EFFICIENT)
    variables = convert_state_dict(weights, EFFICIENT)
    params, statistics = variables["params"], variables["batch_stats"]
    for block in range(2):
        kernel = weights[f"layers.2.{block + 1}.conv_pw.0.weight"]
        np.testing.assert_array_equal(params["stage_2"]["expand"]["kernel"][block], kernel[:, :, 0, 0].T)
        mean = weights[f"layers.2.{block + 1}.conv_dw.1.running_mean"]
        np.testing.assert_array_equal(statistics["stage_2"]["depthwise_norm"]["mean"][block], mean)
    np.testing.assert_array_equal(
        params["downsample_2"]["reduction"]["kernel"], weights["layers.2.4.reduction.weight"].T
    )
    ssm = params["stage_0"]["mixer"]["ssm"]
    x_proj = weights["layers.0.blocks.0.op.x_proj_weight"]
    np.testing.assert_array_equal(ssm["x_proj_kernel"][0, 3], x_proj[3].T)
    np.testing.assert_array_equal(ssm["A_log"][0, 2], weights["layers.0.blocks.0.op.A_logs"][2 * 16 : 3 * 16])


@pytest.mark.parametrize("model", [VMAMBA, EFFICIENT, Vim(image_size=32, embed_dim=16, depth=1)], ids=type)
@pytest.mark.parametrize("wrappers", ["module.", "module.module."])
def test_wrappers_around_the_network(model, wrappers):
    weights = weights_of(model)
    wrapped = {wrappers + name: x for name, x in weights.items()}
    assert_same(convert_state_dict(wrapped, model), convert_state_dict(weights, model))


def test_two_tensors_for_one_variable_are_named():
    weights = weights_of(VMAMBA)
    twice = weights | {"head.bias": weights["classifier.head.bias"]}
    with pytest.raises(ValueError, match=r"unexpected \(1\): head.bias$"):
        convert_state_dict(twice, VMAMBA)
    with pytest.raises(ValueError, match=r"unexpected \(1\): module.classifier.head.bias$"):
        convert_state_dict(weights | {"module.classifier.head.bias": weights["classifier.head.bias"]}, VMAMBA)


@pytest.mark.parametrize(
    ("entry", "key"), [("state_dict", None), ("model", None), ("ema_model", "ema_model"), ("model_ema", "model_ema")]
)
def test_files_of_the_authors_trainers(entry, key, tmp_path):
    """Averaged weights of a wrapped network, as trainers save them along with the optimizer and other entries."""
    weights = weights_of(EFFICIENT)
    content = {
        "epoch": 3,
        "optimizer": {"state": {}},
        entry: {f"module.module.{name}": x for name, x in weights.items()},
    }
    torch_writer.save(tmp_path / "x.ckpt", content)
    read = load_torch_checkpoint(tmp_path / "x.ckpt", key=key)
    assert_same(convert_state_dict(read, EFFICIENT), convert_state_dict(weights, EFFICIENT))

    options = {"dims": 8, "depths": (1, 1, 2, 1), "state_size": 4}
    trained = load_torch_model(tmp_path / "x.ckpt", "efficient_vmamba_tiny", options, key)
    assert trained.model.num_classes == 5  # read off the file's head
    assert_same(trained.variables, convert_state_dict(weights, EFFICIENT))


def test_a_classifier_whose_head_is_called_classifier(tmp_path):
    """Names with `classifier.` need not belong to a student; in a student's file the word occurs twice."""
    weights, student = weights_of(VMAMBA), create_model("srvm_tiny", sr="bicubic", classifier="vmamba_tiny")
    student = student.clone(classifier=VMAMBA)
    torch_writer.save(tmp_path / "alone.pth", weights)
    torch_writer.save(tmp_path / "student.pth", {f"classifier.{name}": x for name, x in weights.items()})
    alone = torch_variables(tmp_path / "alone.pth", VMAMBA)
    part = torch_variables(tmp_path / "student.pth", VMAMBA)
    assert_same(alone, part)
    whole = torch_variables(tmp_path / "student.pth", student)
    np.testing.assert_array_equal(whole["params/classifier/head/bias"], alone["params/head/bias"])
    exported = export_state_dict(convert_state_dict({"classifier": weights}, student), student)
    assert set(exported) == {f"classifier.{name}" for name in weights}


def test_options_that_names_depend_on_are_pointed_out():
    weights = weights_of(EFFICIENT.clone(mlp_ratio=2.0))
    with pytest.raises(ValueError, match="unexpected.*; its tensors imply other options: mlp_ratio=2.0"):
        convert_state_dict(weights, EFFICIENT)
    weights = weights_of(EFFICIENT.clone(downsample="conv"))
    with pytest.raises(ValueError, match="options: downsample='conv'"):
        convert_state_dict(weights, EFFICIENT)


def test_the_release_that_a_file_is_of_is_named():
    newer = weights_of(VMamba2(num_classes=5, dims=8, depths=(2, 1)))
    with pytest.raises(ValueError, match="the names of vmamba2_base, .*VMamba's second release .#v2cls"):
        convert_state_dict(newer, VMAMBA)
    with pytest.raises(ValueError, match="the names of vmamba_base, .*VMamba's first release .#v0cls"):
        convert_state_dict(weights_of(VMAMBA), VMamba2(num_classes=5, dims=8, depths=(2, 1)))


def test_rotary_tables_are_compared_as_exactly_as_their_numbers_are():
    model = create_model(
        "local_vim_tiny", embed_dim=16, depth=1, image_size=112, num_classes=2, directions=(("h", "v"),)
    )
    weights = weights_of(model)
    rounded = {name: x.astype(ml_dtypes.bfloat16) for name, x in weights.items()}
    assert np.abs(rounded["rope.freqs_cos"].astype(np.float32) - weights["rope.freqs_cos"]).max() > 1e-3
    convert_state_dict(rounded, model)
    rounded["rope.freqs_cos"] = rounded["rope.freqs_sin"]
    with pytest.raises(ValueError, match="not the rotary table of this grid"):
        convert_state_dict(rounded, model)


def test_a_part_of_any_composite_fills_its_network(tmp_path):
    """A file with two such parts is refused."""
    vim = Vim(num_classes=5, image_size=32, embed_dim=16, depth=1)
    weights = weights_of(vim)
    headless = {name: x for name, x in weights.items() if not name.startswith("head.")}
    inside = {f"module.backbone.{name}": x for name, x in weights.items()} | {"neck.x": np.ones(3, np.float32)}
    assert_same(
        torch_variables(_saved(tmp_path / "x.pth", inside), vim),
        torch_variables(_saved(tmp_path / "y.pth", weights), vim),
    )
    twice = {f"{role}.{name}": x for role in ("student", "teacher") for name, x in weights.items()}
    with pytest.raises(ValueError, match="holds more than one Vim, named student., teacher."):
        torch_variables(_saved(tmp_path / "z.pth", twice), vim)
    with pytest.raises(ValueError, match=r"missing \(2\): head.bias, head.weight"):
        torch_variables(_saved(tmp_path / "w.pth", headless), vim)
    assert "params/head/kernel" not in torch_variables(tmp_path / "w.pth", vim, flexible=True)


def _saved(path, weights):
    torch_writer.save(path, weights)
    return path
