"""ViMD in miniature: SR network, teacher and distilled student, in a few minutes on two CPU cores.

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/quickstart.py --workdir workdir/quickstart
            python -m vimd_jax.train --config configs/quickstart.py:baseline --workdir workdir/baseline
            The second trains the plain low-resolution classifier: bicubic up-sampling, no SR network, no teacher.
Data        synthetic birds, generated on the spot
Network     Vim, 4 layers of 64 channels, 8-pixel patches of 64-pixel images; SRResNet x4, 16 channels, 2 blocks
Measured    docs/reproduction.md
"""

from ml_collections import ConfigDict

from vimd_jax.config import STAGES, default_config

SR = {"channels": 16, "num_blocks": 2}
VIM = {
    "name": "vim_tiny",
    "embed_dim": 64,
    "depth": 4,
    "patch_size": 8,
    "stride": 8,
    "input_normalization": True,
}


def get_config(run: str = "all"):
    if run == "baseline":
        return baseline()
    if run != "all":
        raise ValueError(f'The run is {run!r}: choose "all" or "baseline".')
    stages = {"sr": sr(), "teacher": teacher(), "student": student()}
    return ConfigDict({"order": tuple(stages), "stages": stages})


def sr():
    config = _small("sr")
    config.batch_size = 4
    config.optimizer.weight_decay = 0.0
    config.schedule.learning_rate = 3e-3
    config.schedule.num_epochs = 4
    return config


def teacher():
    return _small("teacher")


def student():
    config = _small("student")
    config.sr.init = "{workdir}/../sr"
    config.teacher.init = "{workdir}/../teacher"
    # The authors initialise teacher and student from one pretrained Vim; here only the teacher is pretrained.
    config.student.init = "{workdir}/../teacher"
    config.schedule.num_epochs = 10
    return config


def baseline():
    config = _small("student")
    config.sr.name = "bicubic"
    config.loss.logits_weight = 0.0
    config.loss.hidden_weight = 0.0
    return config


def _small(stage):
    config = default_config(stage)
    config.batch_size = 32
    config.dataset.name = "synthetic"
    config.dataset.synthetic_train_size = 1600
    config.dataset.high_resolution = 64
    config.dataset.low_resolution = 16
    config.dataset.crop_scale = (0.7, 1.0)
    for role in STAGES[stage]:
        config[role].update(SR if role == "sr" else VIM)
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0
    config.schedule.learning_rate = 2e-3
    config.schedule.warmup_epochs = 2
    config.schedule.num_epochs = 14
    return config
