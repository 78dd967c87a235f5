"""The quickstart on your own pictures: SR network, teacher and student from scratch, small enough for a CPU.

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/small.py --workdir workdir/small --config.directory=DIR
Data        a folder: DIR/train/<class>/*.jpg, DIR/test/<class>/*.jpg
Network     Vim, 6 layers of 96 channels, 8-pixel patches of 96-pixel pictures; SRResNet x4, 16 channels, 2 blocks
Measured    see the README
"""

from ml_collections import config_dict

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.directory = config_dict.FieldReference("")  # of all stages
    for stage in config.order:
        _real_pictures(config.stages[stage])
        config.stages[stage].dataset.directory = config.get_ref("directory")
    config.stages.sr.schedule.num_epochs = 2
    return config


def _real_pictures(config):
    config.dataset.name = "folder"
    config.dataset.high_resolution = 96
    config.dataset.low_resolution = 24
    config.dataset.crop_scale = (0.4, 1.0)
    for classifier in (config.teacher, config.student):
        classifier.embed_dim = 96
        classifier.depth = 6
    config.schedule.num_epochs = 20
