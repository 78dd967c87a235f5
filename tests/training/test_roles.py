"""The weights that a stage starts from, as its config says."""

import jax
import numpy as np
import pytest
import torch_writer
from tiny import tiny_config

from vimd_jax.training.roles import build_networks, initial_variables, zeros
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
