"""The two commands, and the directory between them."""

import hashlib
import subprocess
import sys

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vimd_jax import load_model
from vimd_jax.checkpoints import network
from vimd_jax.checkpoints.adapt import load_variables
from vimd_jax.checkpoints.network import read_description
from vimd_jax.models import create_model
from weight_convert import convert as convert_command
from weight_convert import export as export_command
from weight_convert import load_torch_checkpoint

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


def test_srresnet_there_and_back_with_its_batch_counters(tmp_path):
    assert convert(*SR, "--output", tmp_path / "sr") == 0
    assert export("--checkpoint", tmp_path / "sr", "--output", tmp_path / "sr.safetensors") == 0
    expected = load_torch_checkpoint(SR_FILE)
    assert expected["conv2.1.num_batches_tracked"] == 7
    assert_same_tensors(tmp_path / "sr.safetensors", expected)


def test_srvm_from_two_files_and_back(tmp_path, capsys):
    options = [*VIM_OPTIONS, "--option", "sr_channels=16", "--option", "sr_num_blocks=3"]
    arguments = ["--model", "srvm_tiny", "--checkpoint", FILES / "vim_style.pth", *options]
    assert convert(*arguments, "--output", tmp_path / "x") == 1
    assert "missing (49): sr.conv1.0.bias" in capsys.readouterr().err
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
    for half, model in (("sr", student.model.sr), ("classifier", student.model.classifier)):
        for source in (tmp_path / "srvm", tmp_path / "both.safetensors"):
            params = load_variables(source, model)["params"]
            jax.tree.map(np.testing.assert_array_equal, params, student.variables["params"][half])


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
    """The directory remembers its grid; the number of tokens alone would not tell."""
    assert convert(*VIM[:-1], "64x96", "--output", tmp_path / "wide") == 0
    tall = create_model("vim_tiny", embed_dim=48, depth=4, stride=8, image_size=(96, 64), num_classes=10)
    with pytest.raises(ValueError, match="7x11 patches in the checkpoint, 11x7 wanted$"):
        load_variables(tmp_path / "wide", tall)
    resized = load_variables(tmp_path / "wide", tall, adapt=True)["params"]["position_embedding"]
    assert np.abs(resized - load_model(tmp_path / "wide").variables["params"]["position_embedding"]).max() > 0.1


def test_a_file_trained_on_images_that_are_not_square(tmp_path):
    """A state dict does not tell its grid; --source_size does, and gives what the directory in between gives."""
    assert convert(*VIM[:-1], "64x96", "--output", tmp_path / "wide") == 0
    assert export("--checkpoint", tmp_path / "wide", "--output", tmp_path / "wide.safetensors") == 0
    file = [*VIM[:2], "--checkpoint", tmp_path / "wide.safetensors", *VIM_OPTIONS]
    assert convert(*file, "--source_size", "64x96", "--output", tmp_path / "square") == 0
    square = load_model(tmp_path / "square")
    resized = load_variables(tmp_path / "wide", square.model, adapt=True)
    jax.tree.map(np.testing.assert_array_equal, resized, square.variables)


def test_classes_may_be_an_option_too(tmp_path):
    assert convert(*VIM, "--option", "num_classes=3", "--output", tmp_path / "vim") == 0
    assert load_model(tmp_path / "vim").model.num_classes == 3


def test_numbers_that_are_not_finite_are_pointed_out(tmp_path, capsys):
    state_dict = dict(load_torch_checkpoint(FILES / "vim_style.pth"))
    state_dict["head.bias"] = np.full(10, np.nan, np.float32)
    save_file(state_dict, tmp_path / "x.safetensors")
    assert convert(*VIM[:2], "--checkpoint", tmp_path / "x.safetensors", *VIM_OPTIONS, "--dry_run") == 0
    assert "warning: 1 variables hold numbers that are not finite, first params/head/bias" in capsys.readouterr().out


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
    with pytest.raises(ValueError, match=f"vim holds another network: {message} there"):
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
        ([*VIM, "--sr_checkpoint", SR_FILE], "is not needed: it is the other half"),
        ([*VIM, "--source_size", "64x32"], "is for 49 patches, not for 7x3; say"),
        ([*VIM, "--option", "depth=5"], "missing (17): layers.4"),
        ([*VIM, "--key", "state_dict"], "no state dict named 'state_dict'"),
        ([*VIM, "--image_size", "8"], "image_size"),
        ([*SR[:2], *VIM[2:4]], "vim_style.pth: the weights do not fit SRResNet: missing"),
    ],
)
def test_errors_are_one_line_and_leave_nothing_behind(arguments, message, tmp_path, capsys):
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


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(network, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(*VIM, "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_errors(tmp_path, capsys):
    assert export("--checkpoint", tmp_path, "--output", tmp_path / "x.pth") == 1
    assert "must end in .safetensors" in capsys.readouterr().err
    assert export("--checkpoint", tmp_path / "no", "--output", tmp_path / "x.safetensors") == 1
    assert "no such workdir, converted checkpoint or PyTorch file" in capsys.readouterr().err
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
