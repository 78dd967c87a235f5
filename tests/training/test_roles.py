"""The weights that a stage starts from, as its config says."""

import jax
import numpy as np
import pytest
import torch_writer
from tiny import tiny_config

from vimd_jax import load
from vimd_jax.training import roles
from vimd_jax.training.roles import build_networks, check_sources_of_weights, initial_variables, zeros
from weight_convert import export_state_dict


@pytest.mark.parametrize("key", ["model", "model_ema"])
def test_weights_of_a_chosen_key(tmp_path, key):
    config = tiny_config("classifier")
    networks = build_networks(config, "abcd")
    entries = {}
    for value, name in enumerate(("model", "model_ema"), 1):
        variables = jax.tree.map(lambda x: np.full_like(x, value), zeros(networks.trained))  # noqa: B023
        entries[name] = export_state_dict(variables, networks.trained)
    torch_writer.save(tmp_path / "weights.pth", entries)
    config.classifier.update({"init": str(tmp_path / "weights.pth"), "init_key": key})
    variables, frozen = initial_variables(config, networks, tmp_path)
    assert {float(x.max()) for x in jax.tree.leaves(variables)} == {{"model": 1.0, "model_ema": 2.0}[key]}
    assert frozen == {}


def test_weights_by_name(tmp_path, monkeypatch):
    """Are those of the network's own architecture."""
    config = tiny_config("classifier", classifier__init="pretrained")
    networks, asked = build_networks(config, "abcd"), []
    weights = jax.tree.map(np.ones_like, zeros(networks.trained))
    torch_writer.save(tmp_path / "weights.pth", {"model": export_state_dict(weights, networks.trained)})

    def resolve(name, architecture):
        asked.append((name, architecture))
        return tmp_path / "weights.pth"

    for module in (roles, load):
        monkeypatch.setattr(module, "resolve", resolve)
    check_sources_of_weights(config, networks, tmp_path, set())
    variables, _ = initial_variables(config, networks, tmp_path)
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(variables))
    assert {name for name, _ in asked} == {"pretrained", "pretrained:vim_tiny"}


def test_a_name_that_nothing_is_published_under_is_refused_at_the_start(tmp_path):
    config = tiny_config("classifier", classifier__init="pretrained:vim_tinny")
    with pytest.raises(ValueError, match="no weights are published for 'vim_tinny'"):
        check_sources_of_weights(config, build_networks(config, "abcd"), tmp_path, set())
