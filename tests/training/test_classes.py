"""Class names of a checkpoint beside those of the data."""

import jax.numpy as jnp
import pytest
from golden_models import random_variables

from vimd_jax.checkpoints.format import save_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.models import create_model
from vimd_jax.training import classes


def test_numbered_names_are_those_of_a_conversion_only_in_their_order(tmp_path):
    """Folders called "class 1", "class 10", "class 2" are names like any other."""
    model = create_model("vim_tiny", num_classes=3, image_size=16, patch_size=8, stride=8, embed_dim=8, depth=1)
    variables = random_variables(model, jnp.zeros((1, 16, 16, 3)))
    save_model(tmp_path / "converted", TrainedModel(model, variables, ("class 0", "class 1", "class 2")))
    save_model(tmp_path / "folders", TrainedModel(model, variables, ("class 1", "class 10", "class 2")))
    names = ("class 1", "class 2", "class 10")
    assert classes.in_order(variables, tmp_path / "converted", names) is variables
    turned = classes.in_order(variables, tmp_path / "folders", names)["params"]["head"]["bias"]
    assert list(turned) == list(variables["params"]["head"]["bias"][[0, 2, 1]])
    with pytest.raises(ValueError, match="is for other classes"):
        classes.in_order(variables, tmp_path / "folders", ("crow", "jay", "owl"))
