"""The quickstart on your own images: SR network, teacher and student from scratch, small enough for a CPU.

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/small.py --workdir workdir/small --config.directory=DIR
Data        a folder: DIR/train/<class>/*.jpg, DIR/test/<class>/*.jpg
Network     as in the quickstart: 64-pixel images restored from 16 pixels, Vim of 4 layers and 64 channels
Measured    docs/reproduction.md
"""

from ml_collections import config_dict

from vimd_jax.configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.directory = config_dict.FieldReference("")  # of all stages
    for stage in config.order:
        _photographs(config.stages[stage])
        config.stages[stage].dataset.directory = config.get_ref("directory")
    return config


def _photographs(config):
    config.dataset.name = "folder"
    config.dataset.crop_scale = (0.4, 1.0)
    for role in ("teacher", "student"):
        if role in config:
            config[role].input_normalization = False
    if config.stage == "student":
        config.student.init = ""
    config.optimizer.clip_norm = None
    config.schedule.warmup_epochs = 1
    if config.stage != "sr":
        config.schedule.learning_rate = 1e-3
        config.schedule.num_epochs = 20
