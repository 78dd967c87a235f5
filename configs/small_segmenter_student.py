"""ViMD for label maps: a student that restores a quarter of the resolution and segments it, taught at the full one.

Paper       ours, in the spirit of Vision Mamba Distillation for Low-resolution Fine-grained Image Classification
            (IEEE SPL 2025), which classifies
Command     python -m vimd_jax.train --config configs/small_segmenter_student.py --workdir workdir/segmenter_student \\
              --config.dataset.directory=DIR --config.segmenter.init=TEACHER --config.sr.init=SR
Networks    the teacher is a run of small_segmenter.py, the student the same network behind an SRResNet x4
Loss        that of the label maps, the divergence from the teacher's class scores of every place, and the distance of
            the maps that the heads read
Measured    not yet
"""

from vimd_jax.config import default_config
from vimd_jax.configs import small_segmenter


def get_config(model: str = "upernet_vim_tiny"):
    roles = ("segmenter", "segmenter_student")
    config = small_segmenter.small(default_config("segmenter_student"), model, roles)
    config.sr.update({"channels": 16, "num_blocks": 4})
    config.loss.hidden_weight = 1.0
    return config
