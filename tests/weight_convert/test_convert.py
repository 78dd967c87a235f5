"""The commands that convert and export, and the directory between them."""

import dataclasses
import errno
import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_writer
from safetensors.numpy import load_file, save_file

from vimd_jax.checkpoints import format
from vimd_jax.checkpoints.format import read_description, save_model
from vimd_jax.load import load_model, load_variables
from vimd_jax.models import create_model, list_models
from weight_convert import convert as convert_command
from weight_convert import export as export_command
from weight_convert import load_torch_checkpoint
from weight_convert.load import assumptions
from weight_convert.mapping import plan

FILES = golden.FOLDER / "checkpoints"
VIM_OPTIONS = ["--option", "embed_dim=48", "--option", "depth=4", "--option", "stride=8", "--image_size", "64"]
VIM = ["--model", "vim_tiny", "--checkpoint", str(FILES / "vim_style.pth"), *VIM_OPTIONS]
SR_FILE = FILES / "srresnet_style.pth.tar"
SR = ["--model", "srresnet_x4", "--checkpoint", str(SR_FILE), "--option", "channels=16", "--option", "num_blocks=3"]


def convert(*arguments) -> int:
    return convert_command.main([str(argument) for argument in arguments])


def export(*arguments) -> int:
    return export_command.main([str(argument) for argument in arguments])


def assert_same_tensors(file, state_dict):
    exported = load_file(file)
    assert set(exported) == set(state_dict)
    for name, array in state_dict.items():
        assert exported[name].dtype == array.dtype
        np.testing.assert_array_equal(exported[name], array, strict=True)


def test_vim_there_and_back(tmp_path, capsys):
    assert convert(*VIM, "--output", tmp_path / "vim") == 0
    printed = capsys.readouterr().out
    assert "layers.{0..3}.mixer.A_b_log" in printed and "params/layers/mixer/backward/A_log" in printed
    assert "75 tensors read" in printed and "142,234 parameters" in printed
    assert export("--checkpoint", tmp_path / "vim", "--output", tmp_path / "vim.safetensors") == 0
    assert_same_tensors(tmp_path / "vim.safetensors", load_torch_checkpoint(FILES / "vim_style.pth"))

    written = read_description(tmp_path / "vim")
    sha256 = hashlib.sha256((FILES / "vim_style.pth").read_bytes()).hexdigest()
    assert written["provenance"]["sources"] == [{"file": "vim_style.pth", "sha256": sha256}]
    assert written["checksum"] in printed
    given = {"embed_dim": 48, "depth": 4, "stride": 8, "image_size": 64, "num_classes": 10}
    assert written["options"].items() >= given.items()


def test_an_exported_file_names_its_classes(tmp_path):
    assert convert(*VIM, "--output", tmp_path / "vim") == 0
    names = tuple(f"bird {i}" for i in range(10))
    save_model(tmp_path / "named", load_model(tmp_path / "vim", class_names=names))
    assert export("--checkpoint", tmp_path / "named", "--output", tmp_path / "x.safetensors") == 0
    command = ["--model", "vim_tiny", "--checkpoint", tmp_path / "x.safetensors", *VIM_OPTIONS]
    assert convert(*command, "--output", tmp_path / "again") == 0
    assert load_model(tmp_path / "again").class_names == names
    tensors, options = (
        load_file(tmp_path / "x.safetensors"),
        {"embed_dim": 48, "depth": 4, "stride": 8, "image_size": 64},
    )
    for strange in ("[1, 2]", "{", "[" * 10**5, '["one"]'):
        save_file(tensors, tmp_path / "strange.safetensors", {"class_names": strange})
        strange = load_model(tmp_path / "strange.safetensors", "vim_tiny", options=options)
        assert strange.class_names[0] == "class 0"


def test_srresnet_there_and_back_with_its_batch_counters(tmp_path):
    assert convert(*SR, "--output", tmp_path / "sr") == 0
    assert export("--checkpoint", tmp_path / "sr", "--output", tmp_path / "sr.safetensors") == 0
    expected = load_torch_checkpoint(SR_FILE)
    assert expected["conv2.1.num_batches_tracked"] == 7
    assert_same_tensors(tmp_path / "sr.safetensors", expected)


@pytest.mark.parametrize("counters", [["x"], {"conv3.weight": 3, "conv2.1.num_batches_tracked": [1]}])
def test_counters_of_a_stranger_are_no_tensors(counters, tmp_path):
    assert convert(*SR, "--output", tmp_path / "sr") == 0
    trained = load_model(tmp_path / "sr")
    save_model(tmp_path / "x", dataclasses.replace(trained, provenance={"num_batches_tracked": counters}))
    assert export("--checkpoint", tmp_path / "x", "--output", tmp_path / "x.safetensors") == 0
    expected = load_torch_checkpoint(SR_FILE)
    expected |= {name: np.zeros((), np.int64) for name in expected if name.endswith("num_batches_tracked")}
    assert_same_tensors(tmp_path / "x.safetensors", expected)


def test_srvm_from_two_files_and_back(tmp_path, capsys):
    options = [*VIM_OPTIONS, "--option", "sr_channels=16", "--option", "sr_num_blocks=3"]
    arguments = ["--model", "srvm_tiny", "--checkpoint", FILES / "vim_style.pth", *options]
    assert convert(*arguments, "--output", tmp_path / "x") == 1
    error = capsys.readouterr().err
    assert "missing (49): sr.conv1.0.bias" in error and "--sr_checkpoint" in error
    assert convert(*arguments, "--sr_checkpoint", SR_FILE, "--output", tmp_path / "srvm") == 0
    for part, source in (("sr", SR_FILE), ("classifier", FILES / "vim_style.pth")):
        output = tmp_path / f"{part}.safetensors"
        assert export("--checkpoint", tmp_path / "srvm", "--output", output, "--part", part) == 0
        assert_same_tensors(output, load_torch_checkpoint(source))
    assert export("--checkpoint", tmp_path / "srvm", "--output", tmp_path / "both.safetensors") == 0
    again = [
        "--model",
        "srvm_tiny",
        "--checkpoint",
        tmp_path / "both.safetensors",
        *options,
        "--output",
        tmp_path / "again",
    ]
    assert convert(*again) == 0
    first, second = (read_description(tmp_path / name) for name in ("srvm", "again"))
    assert first["checksum"] == second["checksum"]

    student = load_model(tmp_path / "srvm")
    assert student.low_resolution == 16
    for part, model in (("sr", student.model.sr), ("classifier", student.model.classifier)):
        for source in (tmp_path / "srvm", tmp_path / "both.safetensors"):
            params = load_variables(source, model)["params"]
            jax.tree.map(np.testing.assert_array_equal, params, student.variables["params"][part])


def test_the_converted_directory_gives_the_network_and_its_variables(tmp_path):
    assert convert(*VIM, "--key", "model_ema", "--output", tmp_path / "vim") == 0
    vim = load_model(tmp_path / "vim")
    assert vim.provenance["key"] == "model_ema"
    assert vim.model == create_model("vim_tiny", embed_dim=48, depth=4, stride=8, image_size=64, num_classes=10)
    ema = load_torch_checkpoint(FILES / "vim_style.pth", key="model_ema")
    np.testing.assert_array_equal(vim.variables["params"]["head"]["kernel"], ema["head.weight"].T)
    jax.tree.map(np.testing.assert_array_equal, load_variables(tmp_path / "vim", vim.model), vim.variables)


def test_fine_tuning_from_a_file_and_from_its_conversion_is_the_same(tmp_path, capsys):
    task = create_model("vim_tiny", embed_dim=48, depth=4, stride=8, image_size=(64, 96), num_classes=3)
    assert convert(*VIM, "--output", tmp_path / "source") == 0
    assert convert(*VIM[:-1], "64x96", "--num_classes", 3, "--output", tmp_path / "task") == 0
    printed = capsys.readouterr().out
    assert "10 classes in the checkpoint, 3 wanted: the head is initialised anew and needs training" in printed
    assert "7x7 patches (taken to be square) in the checkpoint, 7x11 wanted: the position embedding is" in printed
    expected = load_variables(FILES / "vim_style.pth", task, adapt=True)
    for directory in ("source", "task"):
        actual = load_variables(tmp_path / directory, task, adapt=True)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert len(read_description(tmp_path / "task")["provenance"]["changes"]) == 2


def test_a_grid_of_the_same_size_but_another_shape_is_resized_too(tmp_path):
    """The directory records its grid, which the number of tokens does not determine."""
    assert convert(*VIM[:-1], "64x96", "--output", tmp_path / "wide") == 0
    tall = create_model("vim_tiny", embed_dim=48, depth=4, stride=8, image_size=(96, 64), num_classes=10)
    with pytest.raises(ValueError, match="7x11 patches in the checkpoint, 11x7 wanted$"):
        load_variables(tmp_path / "wide", tall)
    resized = load_variables(tmp_path / "wide", tall, adapt=True)["params"]["position_embedding"]
    assert np.abs(resized - load_model(tmp_path / "wide").variables["params"]["position_embedding"]).max() > 0.1


def test_a_file_trained_on_images_that_are_not_square(tmp_path):
    """--source_size, for the grid that a state dict lacks, gives the same result as a directory in between."""
    assert convert(*VIM[:-1], "64x96", "--output", tmp_path / "wide") == 0
    assert export("--checkpoint", tmp_path / "wide", "--output", tmp_path / "wide.safetensors") == 0
    file = [*VIM[:2], "--checkpoint", tmp_path / "wide.safetensors", *VIM_OPTIONS]
    assert convert(*file, "--source_size", "64x96", "--output", tmp_path / "square") == 0
    square = load_model(tmp_path / "square")
    resized = load_variables(tmp_path / "wide", square.model, adapt=True)
    jax.tree.map(np.testing.assert_array_equal, resized, square.variables)


def test_a_file_without_a_head(tmp_path, capsys):
    file = changed(tmp_path / "x.pth", lambda state: [state.pop(f"head.{part}") for part in ("weight", "bias")])
    assert convert_file(file, "--output", tmp_path / "x") == 1
    assert "has no head: add --num_classes N for a new one, or 0 for none" in capsys.readouterr().err
    assert convert_file(file, "--num_classes", 0, "--output", tmp_path / "trunk") == 0
    assert convert_file(file, "--num_classes", 3, "--output", tmp_path / "new") == 0
    assert "no classes in the checkpoint, 3 wanted: the head is initialised anew" in capsys.readouterr().out
    trunk, new = load_model(tmp_path / "trunk"), load_model(tmp_path / "new")
    assert trunk.class_names == () and len(new.class_names) == 3
    filled = load_variables(tmp_path / "trunk", new.model, adapt=True)
    jax.tree.map(np.testing.assert_array_equal, filled, new.variables)
    dropped = load_variables(FILES / "vim_style.pth", trunk.model, adapt=True)
    jax.tree.map(np.testing.assert_array_equal, dropped, trunk.variables)


def test_classes_may_be_an_option_too(tmp_path):
    assert convert(*VIM, "--option", "num_classes=3", "--output", tmp_path / "vim") == 0
    assert load_model(tmp_path / "vim").model.num_classes == 3


def test_numbers_that_are_not_finite_are_pointed_out(tmp_path, capsys):
    state_dict = dict(load_torch_checkpoint(FILES / "vim_style.pth"))
    state_dict["head.bias"] = np.full(10, np.nan, np.float32)
    save_file(state_dict, tmp_path / "x.safetensors")
    assert convert(*VIM[:2], "--checkpoint", tmp_path / "x.safetensors", *VIM_OPTIONS, "--dry_run") == 0
    assert (
        "warning: 1 variables contain NaN or infinite values, the first is params/head/bias" in capsys.readouterr().out
    )


def changed(path, change, source=FILES / "vim_style.pth"):
    """A copy of a file with a state dict modified by `change`."""
    state_dict = dict(load_torch_checkpoint(source))
    change(state_dict)
    torch_writer.save(path, {"model": state_dict})
    return path


def convert_file(path, *arguments) -> int:
    return convert(*VIM[:2], "--checkpoint", path, *VIM_OPTIONS, *arguments)


def expanded(value, shape, strides):
    return torch_writer.View((np.full(1, value, np.float32), 0, shape, strides))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"head.bias": expanded(0, (290_000,), (0,))},
            "not as many classes as rows of head.weight (1): head.bias is (290000,)",
        ),
        ({"head.bias": np.zeros(7, np.float32)}, "not as many classes as rows of head.weight (1): head.bias is (7,)"),
        ({"head.weight": np.zeros((10, 4), np.float32)}, "head.weight is (10, 4), expected (10, 48)"),
        ({"head.weight": np.zeros((0, 48), np.float32)}, "the head of the file has no classes: its shape is (0, 48)"),
        ({"pos_embed": np.zeros((2, 50, 48), np.float32)}, "pos_embed is (2, 50, 48), expected (1, 50, 48)"),
        ({"pos_embed": np.zeros((1, 1, 48), np.float32)}, "the position embedding is for 0 patches"),
        ({"pos_embed": np.zeros((1, 0, 48), np.float32)}, "the position embedding is for -1 patches"),
        ({"pos_embed": np.zeros((1, 52, 48), np.float32)}, "is for 51 patches, not for 7x7; say what size of images"),
    ],
)
def test_what_would_not_be_read_again_is_not_written(change, message, tmp_path, capsys):
    file = changed(tmp_path / "x.pth", lambda state_dict: state_dict.update(change))
    assert convert_file(file, "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_head_that_is_replaced_must_agree_too(tmp_path, capsys):
    file = changed(tmp_path / "x.pth", lambda state_dict: state_dict.update({"head.bias": np.zeros(7, np.float32)}))
    assert convert_file(file, "--dry_run", "--num_classes", 10) == 1
    assert "not as many classes as rows of head.weight (1): head.bias is (7,)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "size", [["--image_size", 99999999], ["--num_classes", 10**12], ["--option", "depth=100000000"]]
)
def test_networks_that_no_memory_holds(size, tmp_path, capsys):
    assert convert(*VIM, *size, "--output", tmp_path / "out") == 1
    assert "a network of more than 2,147,483,648 numbers" in capsys.readouterr().err


@pytest.mark.parametrize("counter", [np.array(2j), np.array([1, 2]), np.array(np.inf, np.float16)])
def test_counters_that_do_not_count_are_left_out(counter, tmp_path):
    file = changed(tmp_path / "x.pth", lambda state: state.update({"conv2.1.num_batches_tracked": counter}), SR_FILE)
    assert convert(*SR[:2], "--checkpoint", file, *SR[4:], "--output", tmp_path / "sr") == 0
    assert "conv2.1.num_batches_tracked" not in load_model(tmp_path / "sr").provenance["num_batches_tracked"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "model._orig_mod.", "net.backbone."])
def test_a_prefix_is_left_out_and_told(prefix, tmp_path, capsys):
    def wrap(state_dict):
        for name in list(state_dict):
            state_dict[prefix + name] = state_dict.pop(name)
        state_dict["n_averaged"] = np.array(3)  # as torch.optim.swa_utils adds

    file = changed(tmp_path / "x.pth", wrap)
    assert convert_file(file, "--output", tmp_path / "wrapped") == 0
    assert f"names are read without their prefix {prefix}" in capsys.readouterr().out
    assert convert(*VIM, "--output", tmp_path / "plain") == 0
    assert "without their prefix" not in capsys.readouterr().out
    wrapped, plain = (read_description(tmp_path / name)["checksum"] for name in ("wrapped", "plain"))
    assert wrapped == plain


@pytest.mark.parametrize(("outer", "inner"), [("", ""), ("module.", ""), ("model.", "_orig_mod.")])
def test_both_parts_in_one_file(outer, inner, tmp_path):
    options = [*VIM_OPTIONS, "--option", "sr_channels=16", "--option", "sr_num_blocks=3"]
    parts = {"sr": load_torch_checkpoint(SR_FILE), "classifier": load_torch_checkpoint(FILES / "vim_style.pth")}
    content = {part: {inner + name: x for name, x in tensors.items()} for part, tensors in parts.items()}
    if outer:
        joined = {f"{part}.{name}": x for part, tensors in content.items() for name, x in tensors.items()}
        content = {"model": {outer + name: x for name, x in joined.items()}}
    torch_writer.save(tmp_path / "x.pth", content)
    assert (
        convert("--model", "srvm_tiny", "--checkpoint", tmp_path / "x.pth", *options, "--output", tmp_path / "x") == 0
    )
    student = load_model(tmp_path / "x")
    params = load_variables(tmp_path / "x.pth", student.model.classifier)["params"]
    jax.tree.map(np.testing.assert_array_equal, params, student.variables["params"]["classifier"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (VIM[:4], "its tensors imply other options: depth=4,embed_dim=48"),
        ([*VIM, "--option", "patch_size=8"], "other options: patch_size=16"),
        ([*SR[:4], "--option", "channels=16"], "other options: num_blocks=3"),
        (["--model", "srresnet_x2", *SR[2:]], "other options: scale=4"),
    ],
)
def test_options_that_would_fit_are_named(arguments, message, tmp_path, capsys):
    assert convert(*arguments, "--dry_run") == 1
    error = capsys.readouterr().err
    assert message.replace(",", ", ") in error and len(error) < 700


def test_another_registered_network_is_named(tmp_path, capsys):
    small = {
        entry.source: expanded(0, entry.shape, (0,) * len(entry.shape)) for entry in plan(create_model("vim_small"))
    }
    torch_writer.save(tmp_path / "x.pth", {"model": small, "padding": np.zeros(25_000_000, np.float32)})
    assert convert("--model", "vim_tiny", "--checkpoint", tmp_path / "x.pth", "--dry_run") == 1
    assert "its tensors are those of vim_small or vim_small_stride8 (convert: --model)" in capsys.readouterr().err


def test_a_searched_network_is_not_taken_for_one_without_a_search(tmp_path, capsys):
    """Options that fit the shapes would leave the directions wrong."""
    weights = {
        entry.source: expanded(0, entry.shape, (0,) * len(entry.shape))
        for entry in plan(create_model("local_vim_tiny", num_classes=7))
    }
    torch_writer.save(tmp_path / "x.pth", {"model": weights, "padding": np.zeros(10_000_000, np.float32)})
    assert convert("--model", "local_vim_small", "--checkpoint", tmp_path / "x.pth", "--dry_run") == 1
    error = capsys.readouterr().err
    assert "its tensors are those of local_vim_tiny (convert: --model)" in error and "embed_dim=" not in error


def test_what_a_file_does_not_tell_is_said(tmp_path, capsys):
    assert convert(*VIM, "--dry_run") == 0
    assert "assumed (not recorded in the file): class_token is 'middle' (--option class_token=...)" in (
        capsys.readouterr().out
    )
    told = ["class_token=head", "merge=sum", "input_normalization=True"]
    assert convert(*VIM, "--dry_run", *(part for option in told for part in ("--option", option))) == 0
    assert "assumed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            "v2m_tiny",
            {"class_token": None},
            ["input_normalization is False", "merge is 'mean'", "pool is 'mean'", "routing is 'four_corners'"],
        ),
        (
            "local_vim_tiny",
            {},
            [
                "directions are those of local_vim_tiny",
                "input_normalization is False",
                "pool is 'mean'",
                "vertical_reverse is 'correct'",
            ],
        ),
        ("local_vmamba_search", {}, ["input_normalization is False", "vertical_reverse is 'correct'"]),
        ("srvm_tiny", {"input_normalization": True}, ["class_token is 'middle'", "merge is 'mean'"]),
    ],
)
def test_every_assumption_that_changes_results_is_named(name, options, expected):
    notes = assumptions(create_model(name, **options), options)
    assert [note.partition(" (--option ")[0] for note in sorted(notes)] == expected


def test_a_table_of_as_many_positions_is_taken_to_be_square(tmp_path, capsys):
    """Resizes 4×4 patches to 2×8."""
    positions = np.random.default_rng(0).normal(size=(1, 17, 48)).astype(np.float32)
    file = changed(tmp_path / "x.pth", lambda state_dict: state_dict.update(pos_embed=positions))
    wide = [*VIM[:2], "--checkpoint", file, *VIM_OPTIONS[:-1], "24x72"]
    assert convert(*wide, "--output", tmp_path / "resized") == 0
    assert "4x4 patches (taken to be square) in the checkpoint, 2x8 wanted" in capsys.readouterr().out
    assert convert(*wide, "--source_size", "24x72", "--output", tmp_path / "kept") == 0
    assert "wanted" not in capsys.readouterr().out
    resized, kept = (load_model(tmp_path / x).variables["params"]["position_embedding"] for x in ("resized", "kept"))
    np.testing.assert_array_equal(kept, positions)
    assert np.abs(resized - positions).max() > 0.1


def test_the_name_that_has_the_grid_of_the_file_is_told(tmp_path, capsys):
    arguments = [*VIM[:4], "--option", "embed_dim=48", "--option", "depth=4", "--image_size", "64", "--dry_run"]
    assert convert(*arguments) == 0
    assert "4x4 wanted: the position embedding is resized (mode correct); with stride 8, as vim_tiny_stride8 has" in (
        capsys.readouterr().out
    )


def test_a_terminal_that_lacks_a_character_does_not_end_a_conversion(tmp_path, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", output)
    assert convert(*VIM, "--output", tmp_path / "视觉") == 0
    assert export("--checkpoint", tmp_path / "视觉", "--output", tmp_path / "视觉.safetensors") == 0
    output.flush()
    assert rb"\u89c6\u89c9, checksum" in output.buffer.getvalue()


def test_a_full_disk_is_an_error_of_one_line(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert convert(*VIM, "--output", tmp_path / "vim") == 0
    monkeypatch.setattr(Path, "write_bytes", full)
    assert export("--checkpoint", tmp_path / "vim", "--output", tmp_path / "x.safetensors") == 1
    assert convert(*VIM, "--output", tmp_path / "again") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: [Errno 28] No space left on device: ") for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["vim"]


def test_an_export_has_the_rights_that_new_files_have(tmp_path):
    assert convert(*VIM, "--output", tmp_path / "vim") == 0
    before = os.umask(0o027)
    try:
        assert export("--checkpoint", tmp_path / "vim", "--output", tmp_path / "x.safetensors") == 0
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_help_lists_the_architectures(capsys):
    with pytest.raises(SystemExit):
        convert("--help")
    printed = capsys.readouterr().out
    assert all(name in printed for name in list_models())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"class_token": "head"}, "class_token is 'middle'"),
        ({"merge": "sum"}, "merge is 'mean'"),
        ({"input_normalization": True}, "input_normalization is False"),
    ],
)
def test_a_network_that_differs_in_more_than_shapes_is_refused(override, message, tmp_path):
    assert convert(*VIM, "--output", tmp_path / "vim") == 0
    model = load_model(tmp_path / "vim").model
    with pytest.raises(ValueError, match=f"vim holds a different network: {message} there"):
        load_variables(tmp_path / "vim", model.copy(**override), adapt=True)


def test_another_network_is_refused(tmp_path):
    assert convert(*SR, "--output", tmp_path / "sr") == 0
    with pytest.raises(ValueError, match="holds a SRResNet, but the model is a Vim"):
        load_variables(tmp_path / "sr", create_model("vim_tiny"))


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert convert(*VIM, "--output", tmp_path / "vim", "--dry_run") == 0
    assert "nothing written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*VIM[:2], "--checkpoint", FILES / "malicious.pth"], "asks for posix.system"),
        (["--model", "vim_tny", *VIM[2:]], "error: --model: there is no network 'vim_tny', did you mean vim_tiny"),
        ([*VIM, "--option", "depht=4"], "depht: vim_tiny has no such option"),
        ([*VIM, "--option", "depth=many"], "depth: 'many' is not valid"),
        ([*VIM, "--option", "rope=false"], "rope: 'false' is not valid"),
        ([*VIM, "--sr_checkpoint", SR_FILE], "is not needed: it is for an srvm_* model"),
        ([*VIM, "--source_size", "64x32"], "is for 49 patches, not for 7x3; say"),
        ([*VIM, "--option", "depth=5"], "missing (17): layers.4"),
        ([*VIM, "--key", "state_dict"], "no state dict named 'state_dict'"),
        ([*VIM, "--image_size", "8"], "image_size"),
        ([*SR[:2], *VIM[2:4]], "vim_style.pth: the weights do not fit SRResNet: missing"),
    ],
)
def test_errors_are_one_line_and_write_nothing(arguments, message, tmp_path, capsys):
    assert convert(*arguments, "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_existing_output_is_kept(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert convert(*VIM, "--output", tmp_path / "out") == 1
    assert "exists: name another directory" in capsys.readouterr().err
    assert convert(*VIM) == 1
    assert "--dry_run" in capsys.readouterr().err


def test_an_interrupted_conversion_writes_nothing(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(format, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(*VIM, "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_errors(tmp_path, capsys):
    assert export("--checkpoint", tmp_path, "--output", tmp_path / "x.pth") == 1
    assert "must end in .safetensors" in capsys.readouterr().err
    assert export("--checkpoint", tmp_path / "no", "--output", tmp_path / "x.safetensors") == 1
    assert "no such workdir or converted checkpoint" in capsys.readouterr().err
    assert convert(*SR, "--output", tmp_path / "sr") == 0
    assert export("--checkpoint", tmp_path / "sr", "--output", tmp_path / "x.safetensors", "--part", "sr") == 1
    assert "holds a SRResNet, which has no such part" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
    (tmp_path / "x.safetensors").write_text("precious")
    assert export("--checkpoint", tmp_path / "sr", "--output", tmp_path / "x.safetensors") == 1
    assert "exists: name another file" in capsys.readouterr().err


def test_as_a_command_without_pytorch(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "weight_convert.convert", *VIM, "--output", tmp_path / "vim"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"written to {tmp_path / 'vim'}, checksum " in result.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "jax" in imported
    assert not imported & {"torch", "tensorflow"}
    vim = load_model(tmp_path / "vim")
    assert vim.predict(jnp.zeros((1, 64, 64, 3))).shape == (1, 10)


def test_a_bicubic_student_keeps_its_low_resolution(tmp_path):
    arguments = ["--model", "srvm_tiny", "--checkpoint", FILES / "vim_style.pth", *VIM_OPTIONS]
    bicubic = [*arguments, "--option", "sr=bicubic", "--option", "scale=2"]
    assert convert(*bicubic, "--output", tmp_path / "student") == 0
    assert load_model(tmp_path / "student").low_resolution == 32
