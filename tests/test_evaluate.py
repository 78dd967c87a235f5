import logging

import jax
import jax.numpy as jnp

from vimd_jax import evaluate
from vimd_jax.checkpoints.format import save_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.config import default_config
from vimd_jax.models import create_model


def test_a_checkpoint_is_measured_on_its_own_view(tmp_path, caplog):
    model = create_model("vim_tiny", num_classes=2, image_size=32, embed_dim=8, depth=1)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    save_model(tmp_path / "best", TrainedModel(model, variables, ("a", "b"), low_resolution=8, crop=0.5))
    config = default_config("student")
    with caplog.at_level(logging.INFO):
        own = evaluate.with_view_of(tmp_path, config)
    assert (own.dataset.eval_crop, own.dataset.low_resolution) == (0.5, 8)
    assert (config.dataset.eval_crop, config.dataset.low_resolution) == (1.0, 56)
    assert "eval_crop 0.5 instead of 1.0, low_resolution 8 instead of 56" in caplog.text
    assert evaluate.with_view_of(tmp_path / "best", own) is own
    assert evaluate.with_view_of(tmp_path / "file.pth", config) is config
