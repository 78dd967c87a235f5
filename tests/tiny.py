"""The smallest run that is still a whole run: seconds a stage, synthetic images, a Vim of two layers."""

from ml_collections import ConfigDict

from vimd_jax.config import STAGES, default_config

VIM = {"name": "vim_tiny", "embed_dim": 16, "depth": 2, "patch_size": 8, "stride": 8}
UPERNET = VIM | {"name": "upernet_vim_tiny", "head_channels": 8, "auxiliary_channels": 8}


def tiny_config(stage: str, **changes) -> ConfigDict:
    """A config of one stage; `changes` are dotted fields with `__` for the dot, as in schedule__num_epochs=1."""
    config = default_config(stage)
    config.batch_size = 8
    config.eval_batch_size = 8
    config.log_every_steps = 1
    config.dataset.name = "synthetic"
    config.dataset.synthetic_classes = 4
    config.dataset.synthetic_train_size = 27
    config.dataset.synthetic_test_size = 10
    config.dataset.high_resolution = 32
    config.dataset.low_resolution = 8
    for role in STAGES[stage]:
        small = UPERNET if "segmenter" in role else VIM
        config[role].update({"channels": 4, "num_blocks": 1} if role == "sr" else small)
    config.schedule.learning_rate = 1e-3
    config.schedule.warmup_epochs = 1
    config.schedule.num_epochs = 2
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def get_config(stage: str) -> ConfigDict:
    """For the command line: `--config tests/tiny.py:teacher`, or `:two_stages`."""
    if stage == "two_stages":
        return ConfigDict({"order": ("first", "second"), "stages": dict.fromkeys(("first", "second"), long())})
    return tiny_config(stage)


def long() -> ConfigDict:
    """A run that does not end before it is stopped."""
    return tiny_config("classifier", schedule__num_epochs=2000)
