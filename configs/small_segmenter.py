"""A small segmenter of any family, from scratch, at a size that a CPU trains in minutes.

Command     python -m vimd_jax.train --config configs/small_segmenter.py:upernet_vim_tiny --workdir workdir/segmenter \\
              --config.dataset.directory=DIR
Data        DIR/images/train|val|test/*.jpg with label maps of the same names in DIR/annotations/train|val|test/*.png;
            as set here CamVid's 11 classes, the value 11 being void (python -m vimd_jax.data.prepare camvid ...)
Networks    crops of 96 pixels; 4 layers of 64 channels, or 4 stages of 24 to 192 channels; UperNet of 48 channels
Measured    docs/segmentation.md
"""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from vimd_jax.config import default_config

ISOTROPIC = {"embed_dim": 64, "depth": 4, "patch_size": 8, "stride": 8}
CROP = 96  # pixels
HIERARCHICAL = {"dims": (24, 48, 96, 192), "depths": (1, 1, 2, 1)}
WINDOWS = {"directions": (("h", "h_flip", "w2", "w2_flip"),)}  # of every layer
OPTIONS = {
    "upernet_vim_tiny": ISOTROPIC,
    "upernet_local_vim_tiny": ISOTROPIC | WINDOWS,
    "upernet_v2m_tiny": ISOTROPIC,
    "upernet_vmamba_tiny": HIERARCHICAL,
    "upernet_local_vmamba_tiny": HIERARCHICAL | WINDOWS,
    "upernet_efficient_vmamba_tiny": HIERARCHICAL,
}


def get_config(model: str = "upernet_vim_tiny"):
    return small(default_config("segmenter"), model)


def small(config: ConfigDict, model: str, roles: Sequence[str] = ("segmenter",)) -> ConfigDict:
    """A stage with small networks in these roles, for CamVid."""
    if model not in OPTIONS:
        raise ValueError(f"The network is {model!r}: choose one of {', '.join(OPTIONS)}.")
    for role in roles:
        config[role].update({"name": model, "head_channels": 48, "auxiliary_channels": 48} | OPTIONS[model])
    config.batch_size = 16
    config.eval_batch_size = 8
    config.eval_every_epochs = 5
    config.dataset.name = "label_maps"
    config.dataset.classes = str(Path(__file__).with_name("camvid_classes.txt"))
    config.dataset.ignored_values = "11"
    config.dataset.high_resolution = CROP
    config.dataset.low_resolution = CROP // 4
    config.dataset.size_limits = (240, 180)
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.schedule.name = "poly"
    config.schedule.learning_rate = 1e-3
    config.schedule.min_learning_rate = 0.0
    config.schedule.warmup_epochs = 2
    config.schedule.num_epochs = 30
    return config
