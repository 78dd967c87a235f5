"""The result of a direction search: what is read from a supernet, and the config that trains the final network."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest

from vimd_jax import search
from vimd_jax.checkpoints.format import save_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.config import given_options
from vimd_jax.configs import load_config, small_classifier
from vimd_jax.models import create_model
from vimd_jax.models.network import variable_shapes
from vimd_jax.models.scan_order import DIRECTIONS
from vimd_jax.training.roles import build_networks


def supernet(name, weights, **options):
    """Zeros, but for the weights of the directions, (layers, 8)."""
    from flax.traverse_util import unflatten_dict

    model, rows = create_model(name, num_classes=2, image_size=32, **options), iter(weights)
    leaves = {}
    for path, leaf in sorted(variable_shapes(model).items()):
        leaves[path] = np.zeros(leaf.shape, leaf.dtype)
        if path.endswith("direction_weights"):
            leaves[path] = np.stack([next(rows) for _ in range(leaf.shape[0])]).astype(np.float32)
    return TrainedModel(model, unflatten_dict(leaves, sep="/"), ("a", "b"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("local_vim_search", {"embed_dim": 16, "depth": 4}),
        ("local_vmamba_search", {"dims": (8, 16), "depths": (1, 3)}),
    ],
)
def test_probabilities_are_read_in_the_order_of_the_layers(name, options):
    weights = np.random.default_rng(0).normal(size=(4, 8))
    found = search.direction_probabilities(supernet(name, weights, **options).variables)
    expected = np.exp(weights) / np.exp(weights).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_four_most_probable_directions_in_their_order():
    probabilities = np.array([[0.3, 0.01, 0.2, 0.02, 0.25, 0.03, 0.04, 0.15], np.full(8, 0.125)])
    assert search.most_probable(probabilities) == (("h", "v", "w2", "w7_flip"), DIRECTIONS[:4])


def test_the_config_trains_the_final_network(tmp_path, monkeypatch):
    depth = small_classifier.OPTIONS["local_vim_search"]["depth"]
    weights = np.random.default_rng(1).normal(size=(depth, 8))
    save_model(tmp_path / "net", supernet("local_vim_search", weights, embed_dim=16, depth=depth))
    arguments = ["--base=configs/small_classifier.py:local_vim_tiny", f"--output={tmp_path}/found.py"]
    monkeypatch.setattr(sys, "argv", ["search", f"--workdir={tmp_path}/net", *arguments])
    search.main()
    config = load_config(f"{tmp_path}/found.py")
    directions = search.most_probable(search.direction_probabilities({"params": {"x": {"direction_weights": weights}}}))
    assert given_options(config.classifier)["directions"] == directions
    assert build_networks(config, "abc").trained.directions == directions
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "step", [7, '"""\nopen("/tmp/x")\n"""', "'+open('x')+'", "\n\nimport os", {"a": 1}, None], ids=repr
)
def test_nothing_of_a_checkpoint_becomes_code(step):
    """The text is that of the same file without a step, but for the number."""
    directions, base, workdir = (("h", "v"),), "configs/small_classifier.py:local_vim_tiny", Path('a"""b\n')
    text = search.config_text(directions, base, "classifier", workdir, step)
    assignments = {
        name.id: ast.literal_eval(value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
        for name, value in zip(node.targets[0].elts, node.value.elts)
    }
    expected = {"BASE": base, "ROLE": "classifier", "SUPERNET": str(workdir), "STEP": 7 if step == 7 else None}
    assert assignments == expected
    assert text.replace("None", "7") == search.config_text(directions, base, "classifier", workdir, 7)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("configs/nothing.py", "neither a file nor the name of a config"),
        ("configs/quickstart.py", "has no network 'classifier': name one with --role"),
    ],
)
def test_a_base_that_cannot_be_meant_is_named(base, message):
    with pytest.raises(ValueError, match=message):
        search.load_base(base, "classifier")


def test_a_network_that_searches_nothing_is_named(tmp_path, monkeypatch, capsys):
    save_model(tmp_path, supernet("vim_tiny", [], embed_dim=16, depth=1))
    arguments = [f"--workdir={tmp_path}", "--base=configs/small_classifier.py", f"--output={tmp_path}/found.py"]
    monkeypatch.setattr(sys, "argv", ["search", *arguments])
    with pytest.raises(SystemExit) as ended:
        search.main()
    assert ended.value.code == 1 and "searches no directions" in capsys.readouterr().err
