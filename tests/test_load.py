"""Variables for a network: of another number of classes, another grid of patches, a part of another; found by name."""

import golden
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_writer
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from torch_writer import Call, Global

from vimd_jax import load
from vimd_jax.checkpoints.format import save_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.errors import CheckpointError
from vimd_jax.load import load_model, load_variables
from vimd_jax.models import create_model
from vimd_jax.models.network import join, variable_shapes
from vimd_jax.models.published import PUBLISHED
from vimd_jax.models.srresnet import SRResNet
from vimd_jax.models.srvm import SRVM
from vimd_jax.models.vim import Vim
from weight_convert import convert_state_dict, export_state_dict, resize_position_embedding

SMALL = Vim(num_classes=5, image_size=32, stride=8, embed_dim=16, depth=2, state_size=4)  # a grid of 3×3


def random_table(tokens: int) -> np.ndarray:
    return np.random.default_rng(tokens).normal(size=(1, tokens, 6)).astype(np.float32)


@pytest.mark.parametrize("case", golden.cases("c06*"))
def test_reference_mode_is_the_published_code(case):
    io, grid = golden.tensors(case), golden.meta(case)["constructor"]["new_grid"]
    resized = resize_position_embedding(io["pos_embed_checkpoint"], grid, "reference")
    assert golden.relative_error(resized, io["pos_embed_new"]) <= 1e-5


def test_correct_mode_keeps_the_class_token_and_its_place():
    table = random_table(14 * 14 + 1)
    resized = resize_position_embedding(table, 27)
    assert resized.shape == (1, 730, 6)
    np.testing.assert_array_equal(resized[0, 364], table[0, 98])


def test_correct_mode_changes_no_row_on_the_same_grid():
    for grid in ((4, 4), (3, 5)):
        table = random_table(grid[0] * grid[1] + 1)
        np.testing.assert_array_equal(resize_position_embedding(table, grid, grid=grid), table)


def test_correct_mode_moves_positions_with_the_image():
    """A ramp down the image stays that ramp away from the edges, to a sixth of a row: the kernel ripples."""
    rows = (np.arange(8) + 0.5) / 8
    ramp = np.insert(np.repeat(rows, 8), 32, 0.0)[None, :, None].astype(np.float32)
    resized = np.asarray(resize_position_embedding(ramp, (16, 12)))[0, :, 0]
    grid = np.delete(resized, 96).reshape(16, 12)
    np.testing.assert_allclose(grid[3:-3], np.repeat((np.arange(16) + 0.5)[3:-3, None] / 16, 12, axis=1), atol=0.01)
    assert resized[96] == 0


def test_correct_mode_treats_rows_and_columns_alike():
    table = random_table(3 * 5 + 1)
    patches = np.delete(table, 7, axis=1).reshape(3, 5, 6).swapaxes(0, 1).reshape(1, 15, 6)
    turned = np.insert(patches, 7, table[:, 7], axis=1)
    resized = np.asarray(resize_position_embedding(table, (6, 7), grid=(3, 5)))
    resized_turned = np.asarray(resize_position_embedding(turned, (7, 6), grid=(5, 3)))
    turned_back = np.delete(resized_turned, 21, axis=1).reshape(7, 6, 6).swapaxes(0, 1).reshape(1, 42, 6)
    np.testing.assert_allclose(np.delete(resized, 21, axis=1), turned_back, atol=1e-6)


@pytest.mark.parametrize(
    ("class_token", "tokens", "kept"), [("head", 10, {0: 0}), ("double", 11, {0: 0, 10: 17}), (None, 9, {})]
)
def test_other_class_tokens(class_token, tokens, kept):
    table = random_table(tokens)
    resized = resize_position_embedding(table, (4, 4), class_token=class_token)
    assert resized.shape == (1, 16 + tokens - 9, 6)
    for old, new in kept.items():
        np.testing.assert_array_equal(resized[0, new], table[0, old])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "bilinear"}, "mode: 'bilinear' is unknown"),
        ({"mode": "reference", "class_token": "double"}, "not defined for class_token 'double'"),
        ({"class_token": None}, "table: shape .* does not hold"),
        ({"grid": (2, 5)}, "table: shape .* does not hold 2x5 patches"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        resize_position_embedding(random_table(10), 4, **arguments)


@pytest.fixture
def logged(monkeypatch) -> list[str]:
    lines = []
    monkeypatch.setattr(load.log, "info", lambda line, *values: lines.append(line % values))
    return lines


@pytest.fixture
def small_file(tmp_path):
    """SMALL with random weights, as a .pth file."""
    shapes = jax.eval_shape(SMALL.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = jax.tree.map(lambda x: np.random.default_rng(x.size).random(x.shape, np.float32), shapes)
    torch_writer.save(tmp_path / "small.pth", {"model": export_state_dict(variables, SMALL)})
    return tmp_path / "small.pth", variables


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_the_same_network_is_loaded_unchanged(small_file, logged):
    path, variables = small_file
    assert_trees_equal(load_variables(path, SMALL, adapt=True), variables)
    assert logged == []


def test_another_number_of_classes_starts_a_new_head(small_file, logged):
    path, variables = small_file
    model = SMALL.copy(num_classes=7)
    params = load_variables(path, model, adapt=True)["params"]
    init = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    np.testing.assert_allclose(params["head"]["kernel"], init["head"]["kernel"], rtol=1e-6)
    assert params["head"]["bias"].shape == (7,)
    del params["head"]
    assert_trees_equal(params, {name: leaf for name, leaf in variables["params"].items() if name != "head"})
    assert [line.split(": ", 1)[1] for line in logged] == [
        "5 classes in the checkpoint, 7 wanted: the head is initialised anew and needs training"
    ]


@pytest.mark.parametrize("overrides", [{"image_size": 48}, {"stride": 4}, {"image_size": (32, 64)}])
def test_another_grid_resizes_the_positions(overrides, small_file, logged):
    path, variables = small_file
    model = SMALL.copy(**overrides)
    params = load_variables(path, model, adapt=True)["params"]
    expected = resize_position_embedding(variables["params"]["position_embedding"], model.grid)
    np.testing.assert_array_equal(params.pop("position_embedding"), expected)
    assert_trees_equal(params, {name: x for name, x in variables["params"].items() if name != "position_embedding"})
    assert len(logged) == 1
    assert "3x3 patches (taken to be square) in the checkpoint, {}x{} wanted".format(*model.grid) in logged[0]
    assert ("stride 8, as vim_tiny_stride8 has" in logged[0]) == ("stride" in overrides)
    published = load_variables(path, model, adapt=True, position_mode="reference")["params"]["position_embedding"]
    assert np.abs(published - expected).max() > 0.01


@pytest.mark.parametrize("overrides", [{"num_classes": 7}, {"image_size": 48}])
def test_no_difference_is_accepted_without_adapting(overrides, small_file, logged):
    with pytest.raises(ValueError, match="small.pth does not fit the network: .* in the checkpoint, .* wanted$"):
        load_variables(small_file[0], SMALL.copy(**overrides))
    assert_trees_equal(load_variables(small_file[0], SMALL), small_file[1])
    assert logged == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"embed_dim": 32}, "wrong shape"),
        ({"embed_dim": 32, "num_classes": 7, "image_size": 48}, "wrong shape"),
        ({"depth": 3}, "missing .*layers.2.mixer.A_log"),
        ({"depth": 1}, "unexpected .*layers.1.mixer.A_log"),
        ({"class_token": None}, r"unexpected \(1\): cls_token"),
        ({"state_size": 5}, "wrong shape .*A_log"),
    ],
)
def test_no_other_difference_is_accepted(overrides, message, small_file):
    with pytest.raises(ValueError, match=message):
        load_variables(small_file[0], SMALL.copy(**overrides), adapt=True)


def test_half_of_srvm_can_be_fitted_too(tmp_path, small_file, logged):
    sr = SRResNet(scale=2, channels=4, num_blocks=1)
    shapes = jax.eval_shape(sr.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    sr_weights = export_state_dict(jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes), sr)
    weights = {"sr": sr_weights, "classifier": export_state_dict(small_file[1], SMALL)}
    torch_writer.save(tmp_path / "both.pth", {"model": weights})
    model = SRVM(sr=sr, classifier=SMALL.copy(num_classes=3, image_size=40))
    params = load_variables(tmp_path / "both.pth", model, adapt=True)["params"]
    assert params["classifier"]["head"]["kernel"].shape == (16, 3)
    assert params["classifier"]["position_embedding"].shape == (1, 17, 16)
    assert_trees_equal(params["sr"], convert_state_dict(sr_weights, sr)["params"])
    assert len(logged) == 2


SEGMENTER = create_model(
    "upernet_vim_tiny",
    **{"num_classes": 3, "image_size": (32, 48), "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 2},
    **{"state_size": 4, "head_channels": 4, "auxiliary_channels": 4},
)
CLASSIFIER = SEGMENTER.backbone.clone(num_classes=5, class_token="middle", image_size=32)


def leaves(variables) -> dict[str, np.ndarray]:
    return flatten_dict(variables, sep="/")


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_segmenter_starts_from_a_classifier(tmp_path, form):
    """The trunk is the classifier's, rows of class tokens are taken out where they stand, and the rest is new."""
    variables = golden_models.random_variables(CLASSIFIER, jnp.zeros((1, 32, 32, 3)))
    path = tmp_path / "classifier.safetensors"
    if form == "file":
        save_file(export_state_dict(variables, CLASSIFIER), path)
    else:
        path = tmp_path / "classifier"
        save_model(path, TrainedModel(CLASSIFIER, variables, tuple("abcde"), 0))
    found = leaves(load_variables(path, SEGMENTER, adapt=True))
    assert found.keys() == variable_shapes(SEGMENTER).keys()
    for name, leaf in leaves(variables).items():
        if name.startswith(("params/layers/", "params/patch_embed/")):
            np.testing.assert_array_equal(found[name.replace("/", "/backbone/", 1)], leaf, err_msg=name)
    patches = np.delete(variables["params"]["position_embedding"], 8, axis=1)
    expected = resize_position_embedding(patches, (4, 6), class_token=None)
    np.testing.assert_allclose(found["params/backbone/position_embedding"], expected, atol=1e-6)
    assert np.all(np.asarray(found["batch_stats/decode_head/fusion_norm/var"]) == 1)


def test_a_segmenter_of_layer_norms_starts_from_a_classifier_without(tmp_path):
    options = {"image_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "directions": (("h", "v"),)}
    segmenter = create_model("upernet_local_vim_tiny", head_channels=4, auxiliary_channels=0, **options)
    classifier = create_model("local_vim_tiny", num_classes=5, **options)
    variables = golden_models.random_variables(classifier, jnp.zeros((1, 16, 16, 3)))
    save_file(export_state_dict(variables, classifier), tmp_path / "classifier.safetensors")
    found = load_variables(tmp_path / "classifier.safetensors", segmenter, adapt=True)["params"]["backbone"]
    np.testing.assert_array_equal(found["layers"]["norm"]["scale"], variables["params"]["layers"]["norm"]["scale"])
    assert not np.any(found["layers"]["norm"]["bias"])


def test_a_segmenter_starts_from_no_other_trunk(tmp_path):
    other = CLASSIFIER.clone(depth=3)
    variables = golden_models.random_variables(other, jnp.zeros((1, 32, 32, 3)))
    save_model(tmp_path / "other", TrainedModel(other, variables, tuple("abcde"), 0))
    with pytest.raises(ValueError, match="not the trunk of the segmenter's Vim, .* variables differ: params/backbone/"):
        load_variables(tmp_path / "other", SEGMENTER, adapt=True)


def test_a_segmenter_starts_from_that_of_a_student(tmp_path):
    variables = golden_models.random_variables(SEGMENTER, jnp.zeros((1, 32, 48, 3)))
    student = SRVM(sr=None, classifier=SEGMENTER)
    save_model(tmp_path / "x", TrainedModel(student, join({"classifier": variables}), tuple("abc"), 8))
    assert_trees_equal(load_variables(tmp_path / "x", SEGMENTER, adapt=True), variables)


def test_weights_are_found_by_name(small_file, tmp_path, monkeypatch):
    """Published files that were saved in the folder for downloads."""
    path, variables = small_file
    entry = PUBLISHED["vim_tiny_stride8"]._replace(file="https://example.org/weights/small%20vim.pth")
    monkeypatch.setitem(PUBLISHED, "vim_tiny_stride8", entry)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="small%20vim.pth is downloaded by hand: save it"):
        load_variables("pretrained", SMALL)
    (tmp_path / "vimd_jax" / "weights").mkdir(parents=True)
    path.rename(tmp_path / "vimd_jax" / "weights" / "small vim.pth")
    options = {"num_classes": 5, "image_size": 32, "stride": 8, "embed_dim": 16, "depth": 2, "state_size": 4}
    assert_trees_equal(load_model("pretrained:vim_tiny_stride8", options=options).variables, variables)
    assert_trees_equal(load_variables("pretrained:vim_tiny_stride8", SMALL), variables)


def test_a_home_directory_is_understood(small_file, monkeypatch):
    path, variables = small_file
    monkeypatch.setenv("HOME", str(path.parent))
    assert_trees_equal(load_variables("~/small.pth", SMALL), variables)
    with pytest.raises(FileNotFoundError, match="nothing.pth: no such workdir"):
        load_model("~/nothing.pth")


def test_a_part_of_a_folder_fills_such_a_network(tmp_path, small_file):
    """A student's classifier starts a teacher, whatever composite it is in."""
    student = SRVM(sr=None, classifier=SMALL)
    save_model(tmp_path / "x", TrainedModel(student, join({"classifier": small_file[1]}), tuple("abcde"), 8))
    assert_trees_equal(load_variables(tmp_path / "x", SMALL), small_file[1])
    with pytest.raises(ValueError, match="holds a SRVM, but the model is a SRResNet"):
        load_variables(tmp_path / "x", SRResNet())


def test_a_segmenter_of_mmengine_is_read(tmp_path):
    """Its file holds objects of that library, which stay inert; the number of classes is the file's."""
    variables = golden_models.random_variables(SEGMENTER, jnp.zeros((1, 32, 48, 3)))
    history = Call((Global("mmengine.logging.history_buffer HistoryBuffer"), (np.zeros(3), np.ones(3), 1000)))
    file = {
        "meta": {"epoch": 1, "dataset_meta": {"classes": ("sky", "tree", "road")}},
        "state_dict": export_state_dict(variables, SEGMENTER),
        "message_hub": {"log_scalars": {"train/loss": history}},
        "optimizer": {"state": {0: {"step": np.zeros(())}}},
        "param_schedulers": [{"begin": 0}],
    }
    torch_writer.save(tmp_path / "iter_160000.pth", file)
    options = {name: value for name, value in SEGMENTER.to_options().items() if name != "num_classes"}
    trained = load.load_model(tmp_path / "iter_160000.pth", "upernet_vim_tiny", options=options)
    assert trained.model.num_classes == 3
    for path, leaf in leaves(variables).items():
        np.testing.assert_array_equal(leaves(trained.variables)[path], leaf, err_msg=path)
