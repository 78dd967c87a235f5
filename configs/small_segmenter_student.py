"""ViMD for label maps: a student that restores a quarter of the resolution and segments it, taught at the full one.

Paper       ours, in the spirit of Vision Mamba Distillation for Low-resolution Fine-grained Image Classification
            (IEEE SPL 2025), which classifies
Command     python -m vimd_jax.train --config configs/small_segmenter_student.py --workdir workdir/segmenter_student \\
              --config.directory=DIR
            Its stages are an SR network, the teacher, three students (seeds 0 to 2), and the control of each, which
            differs in that nobody teaches it.
Data        as in small_segmenter.py; the SR network learns from the images alone
Networks    the teacher is that of small_segmenter.py, the student the same network behind an SRResNet x4; they train
            for 15 and 10 epochs
Loss        that of the label maps, the divergence from the teacher's class scores of every place, and the distance of
            the maps that the heads read
Measured    docs/segmentation.md
"""

from ml_collections import ConfigDict, config_dict

from vimd_jax.config import default_config
from vimd_jax.configs import small_segmenter

SR = {"channels": 16, "num_blocks": 4}


def get_config(model: str = "upernet_vim_tiny"):
    stages = {"sr": sr(), "teacher": teacher(model)}
    for seed in range(3):
        stages |= {f"student_{seed}": student(model, seed), f"control_{seed}": control(model, seed)}
    config = ConfigDict({"order": tuple(stages), "stages": stages})
    config.directory = config_dict.FieldReference("")  # of all stages
    for stage in stages:
        config.stages[stage].dataset.directory = config.get_ref("directory")
    return config


def sr():
    config = default_config("sr")
    config.batch_size = 4
    config.eval_every_epochs = 4
    config.sr.update(SR)
    config.dataset.name = "label_maps"
    config.dataset.high_resolution = small_segmenter.CROP
    config.dataset.low_resolution = small_segmenter.CROP // 4
    config.optimizer.weight_decay = 0.0
    config.schedule.learning_rate = 2e-3
    config.schedule.warmup_epochs = 1
    config.schedule.num_epochs = 12
    return config


def teacher(model: str):
    config = small_segmenter.get_config(model)
    config.schedule.num_epochs = 15
    return config


def student(model: str, seed: int):
    config = small_segmenter.small(default_config("segmenter_student"), model, ("segmenter", "segmenter_student"))
    config.seed = seed
    config.eval_every_epochs = 10
    config.sr.update(SR)
    config.sr.init = "{workdir}/../sr"
    config.segmenter.init = "{workdir}/../teacher"
    config.loss.hidden_weight = 1.0
    config.schedule.num_epochs = 10
    return config


def control(model: str, seed: int):
    config = student(model, seed)
    config.loss.logits_weight = 0.0
    config.loss.hidden_weight = 0.0
    return config
