"""The format of a network on disk: what is written is read, and what is not right is refused in one line."""

import contextlib
import dataclasses
import json
from pathlib import Path

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vimd_jax.checkpoints import description, format
from vimd_jax.checkpoints.format import save_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.errors import CheckpointError
from vimd_jax.load import load_model, load_variables
from vimd_jax.models import create_model, describe, list_models, model_options

VIM = {"num_classes": 3, "image_size": 32, "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 2}
MODELS = {
    "vim": create_model("vim_tiny", merge="sum", pool="last", class_token=None, input_normalization=True, **VIM),
    "srresnet": create_model("srresnet_x4", channels=4, num_blocks=1),
    "srvm": create_model("srvm_tiny", sr_channels=4, sr_num_blocks=1, **VIM),
    "bicubic": create_model("srvm_tiny", sr="bicubic", **VIM),
    "hierarchical": create_model("efficient_vmamba_tiny", num_classes=3, image_size=32, dims=8, depths=(1, 1)),
    "upernet": create_model("upernet_vim_tiny", head_channels=8, auxiliary_channels=4, **VIM),
}


def trained(kind: str) -> TrainedModel:
    model = MODELS[kind]
    size = 8 if kind.startswith("s") else 32
    variables = golden_models.random_variables(model, jnp.zeros((1, size, size, 3)))
    names = () if kind == "srresnet" else ("crow", "owl", "größter Specht")
    low = 8 if kind in ("srresnet", "srvm", "bicubic") else 0
    value_range = (0, 4095) if kind == "vim" else ()
    return TrainedModel(model, variables, names, low, 0.875, {"step": 7, "score": 61.5}, value_range)


@pytest.fixture
def vim(tmp_path) -> Path:
    save_model(tmp_path / "vim", trained("vim"))
    return tmp_path / "vim"


def change(folder: Path, **fields) -> None:
    """Changes the description as one who wants to: with a checksum that is right."""
    path = folder / "network.json"
    content = json.loads(path.read_text()) | fields
    del content["description_checksum"]
    path.write_text(json.dumps(content | {"description_checksum": description.digest(content)}))


def assert_refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_written_is_read(kind, tmp_path):
    written = trained(kind)
    checksum = save_model(tmp_path / "new" / "folder", written)
    read = load_model(tmp_path / "new" / "folder")
    assert read.model == written.model
    jax.tree.map(np.testing.assert_array_equal, read.variables, written.variables)
    for field in ("class_names", "low_resolution", "crop", "provenance", "value_range", "image_size"):
        assert getattr(read, field) == getattr(written, field), field
    assert checksum == json.loads((tmp_path / "new" / "folder" / "network.json").read_text())["checksum"]


def test_a_workdir_gives_its_best_network(vim, tmp_path):
    vim.rename(tmp_path / "best")
    assert load_model(tmp_path).class_names == load_model(tmp_path / "best").class_names


def test_the_next_network_takes_the_place_of_the_last(vim):
    better = trained("vim")
    better = dataclasses.replace(better, variables=jax.tree.map(lambda x: x + 1, better.variables))
    save_model(vim, better)
    assert sorted(path.suffix for path in vim.iterdir()) == [".json", ".safetensors"]
    jax.tree.map(np.testing.assert_array_equal, load_model(vim).variables, better.variables)


@pytest.mark.parametrize("moment", ["save", "sealed"])
def test_an_interrupted_write_leaves_the_last_network(vim, moment, monkeypatch):
    before = load_model(vim)
    better = dataclasses.replace(before, variables=jax.tree.map(lambda x: x + 1, before.variables))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"{format.__name__}.{moment}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(vim, better)
    monkeypatch.undo()
    assert sorted(path.suffix for path in vim.iterdir()) == [".json", ".safetensors"]
    jax.tree.map(np.testing.assert_array_equal, load_model(vim).variables, before.variables)


def test_whoever_may_read_the_description_may_read_the_variables(vim):
    modes = {path.suffix: path.stat().st_mode for path in vim.iterdir()}
    assert modes[".safetensors"] == modes[".json"]


def test_damage_is_noticed(vim):
    file = next(vim.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)
    assert_refused(vim, f"{file.name} is damaged, its checksum differs")
    file.write_bytes(content[:-40])
    assert_refused(vim, "is damaged")
    file.unlink()
    assert_refused(vim, "is damaged")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"checksum": "0" * 64}, "checksum differs"),
        ({"checksum": "0"}, "has checksum '0', expected a SHA-256"),
        ({"format": "vimd_jax network 9"}, "has the format 'vimd_jax network 9', but this version reads"),
        ({"class_names": ["owl"]}, "names 1 classes, but the network has 3"),
        ({"architecture": "vim_huge"}, "is damaged .*'vim_huge'"),
        ({"options": {"num_classes": 3, "depth": 2}}, "describes a different network than its variables are of"),
        ({"options": {"depth": "two"}}, "is damaged .*depth: 'two'"),
        ({"options": None}, "network.json has options None, expected options of a network by name"),
        ({"options": {"depth": {}}}, "has options.depth {}, expected a number up to"),
        ({"options": {"embed_dim": 2**63}}, "has options.embed_dim 9223372036854775808, expected a number up to"),
        ({"options": {"depth": 10**6}}, "is damaged .a network with .* steps in its scans of an image, more than"),
        ({"options": {"image_size": 10**6}}, "is damaged .a network with .* pixels in an image, more than"),
        ({"class_names": "owl"}, "has class_names 'owl', expected a list of names"),
        ({"class_names": ["owl", "jay", "owl"]}, r"has class_names .*, expected a list of names, each once"),
        ({"class_names": {"owl": 1}}, "has class_names .*expected a list of names"),
        ({"class_names": ["\x1b[2J", 3]}, r"has class_names \['.x1b.2J', 3\], expected"),
        ({"view": {"low_resolution": 0, "crop": "x"}}, "has view.crop 'x', expected a number above 0 and up to 1"),
        ({"view": {"low_resolution": 0, "crop": float("nan")}}, "has view.crop nan, expected"),
        ({"view": {"low_resolution": -5, "crop": 1.0}}, "has view.low_resolution -5, expected 0, or the side or"),
        (
            {"view": {"low_resolution": 0, "crop": 1.0, "value_range": [9, 3]}},
            r"has view.value_range \[9, 3\], expected",
        ),
        ({"view": {"low_resolution": 33, "crop": 1.0}}, "low resolution of 33, but the network reads 32"),
        ({"variables": "../x.safetensors"}, "has variables '../x.safetensors', expected the name of a file beside"),
        ({"architecture": ["vim_tiny"]}, "has architecture .*expected a name"),
        ({"anything": 1}, "has an unknown field 'anything'"),
        ({"view": {}}, "network.json is incomplete"),
    ],
    ids=str,
)
def test_a_description_that_is_not_right_is_refused(vim, fields, message):
    change(vim, **fields)
    assert_refused(vim, message)


def test_every_flipped_bit_of_a_description_is_noticed(vim):
    path = vim / "network.json"
    text, before = path.read_bytes(), format.read_description(vim)
    for bit in range(0, 8 * len(text), 7):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with contextlib.suppress(CheckpointError):
            assert format.read_description(vim) == before, bit  # another space between two fields


def test_an_edited_description_is_refused_and_class_names_have_another_way(vim, tmp_path):
    path = vim / "network.json"
    path.write_text(path.read_text().replace("crow", "rook"))
    assert_refused(vim, "network.json was changed since it was written.*rename classes: save_model")
    path.write_text(path.read_text().replace("rook", "crow"))
    save_model(tmp_path / "new", load_model(vim, class_names=["rook", "owl", "jay"]))
    assert load_model(tmp_path / "new").class_names == ("rook", "owl", "jay")


def test_folders_without_a_checksum_of_the_description_are_read(vim):
    """As version 1 wrote them; the checksum is that of the variables."""
    path, before = vim / "network.json", load_model(vim)
    content = json.loads(path.read_text())
    del content["description_checksum"]
    path.write_text(json.dumps(content | {"format": "vimd_jax network 1"}))
    assert_refused(vim, "its checksum differs")
    content["checksum"] = format.checksum_of(before.variables)
    path.write_text(json.dumps(content | {"format": "vimd_jax network 1"}))
    assert load_model(vim).class_names == before.class_names
    path.write_text(json.dumps(content))
    assert_refused(vim, "was changed since it was written")


@pytest.mark.parametrize("name", list_models())
def test_the_limits_leave_room_for_every_network(name):
    """At twice the published size, and for segmentation of larger images."""
    sizes = ({"image_size": 448}, {"image_size": (512, 1024)}) if "image_size" in model_options(name) else ({},)
    for options in sizes:
        model = create_model(name, **options)
        description.check_size(model)
        content = {"class_names": [], "view": {"low_resolution": 0, "crop": 1.0}, "provenance": {}}
        files = {"variables": f"variables-{'0' * 16}.safetensors", "checksum": "0" * 64}
        assert json.loads(description.sealed(describe(model) | content | files))["architecture"]


def test_networks_that_differ_in_their_options_alone_differ_in_their_checksum(tmp_path):
    network = trained("vim")
    other = dataclasses.replace(network, model=network.model.clone(merge="mean"))
    assert save_model(tmp_path / "a", network) != save_model(tmp_path / "b", other)
    assert save_model(tmp_path / "c", dataclasses.replace(network, provenance={})) == save_model(
        tmp_path / "a", network
    )


@pytest.mark.parametrize(
    "key", ["architecture", "options", "class_names", "view", "provenance", "variables", "checksum"]
)
def test_a_description_that_lacks_something_is_refused(vim, key):
    path = vim / "network.json"
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))
    assert_refused(vim, f"network.json is incomplete .*{key}")


def test_text_that_is_no_description_is_refused(vim):
    for text in ("", "{", "[]", '{"architecture": "vim_tiny"}'):
        (vim / "network.json").write_text(text)
        assert_refused(vim, "network.json is damaged")


def test_folders_of_earlier_versions_are_named(tmp_path):
    (tmp_path / "run" / "best" / "12").mkdir(parents=True)
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "provenance.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for folder in ("run", "converted"):
        with pytest.raises(FileNotFoundError, match="of an earlier version"):
            load_model(tmp_path / folder)
    with pytest.raises(FileNotFoundError, match="empty holds no network .*train or convert one first"):
        load_model(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere: no such workdir"):
        load_model(tmp_path / "nowhere")


def test_a_folder_knows_its_network(vim):
    with pytest.raises(ValueError, match="knows its network: leave out"):
        load_model(vim, "vim_tiny")
    with pytest.raises(ValueError, match="knows its network: leave out"):
        load_model(vim, options={"depth": 2})


def test_class_names_can_be_given(vim):
    assert load_model(vim, class_names=["a", "b", "c"]).class_names == ("a", "b", "c")
    with pytest.raises(ValueError, match="2 class names were given, but .*vim has 3 classes"):
        load_model(vim, class_names=["a", "b"])


@pytest.mark.parametrize(
    ("option", "there", "here"),
    [("merge", "'sum'", "'mean'"), ("pool", "'last'", "'mean'"), ("input_normalization", "True", "False")],
)
def test_it_fills_no_network_with_other_settings(vim, option, there, here):
    model = MODELS["vim"].clone(**{option: {"merge": "mean", "pool": "mean"}.get(option, False)})
    with pytest.raises(ValueError, match=f"holds a different network: {option} is {there} there, {here} in the model"):
        load_variables(vim, model, adapt=True)


def test_how_a_network_is_computed_may_differ(vim):
    model = MODELS["vim"].clone(dtype="bfloat16", remat=True, drop_path_rate=0.1)
    assert load_variables(vim, model)["params"]
