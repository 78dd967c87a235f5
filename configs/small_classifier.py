"""A small network of any family, trained on labels alone from scratch, at a size for a CPU.

Command     python -m vimd_jax.train --config configs/small_classifier.py:local_vim_tiny --workdir workdir/local_vim \\
              --config.dataset.directory=DIR
Data        a folder: DIR/train/<class>/*.jpg, DIR/test/<class>/*.jpg
Networks    64-pixel images; 4 layers of 64 channels, or 4 stages of 24 to 192 channels
Search      local_vim_search is the supernet of LocalVim's search, at half the width; see vimd_jax/search.py
Measured    docs/benchmarks.md
"""

from vimd_jax.config import default_config

ISOTROPIC = {"embed_dim": 64, "depth": 4, "patch_size": 8, "stride": 8}
HIERARCHICAL = {"dims": (24, 48, 96, 192), "depths": (1, 1, 2, 1)}
WINDOWS = {"directions": (("h", "h_flip", "w2", "w2_flip"),)}  # in every layer
OPTIONS = {
    "vim_tiny": ISOTROPIC,
    "local_vim_tiny": ISOTROPIC | WINDOWS,
    "local_vim_search": ISOTROPIC | {"embed_dim": 32},
    "v2m_tiny": ISOTROPIC,
    "vmamba_tiny": HIERARCHICAL,
    "local_vmamba_tiny": HIERARCHICAL | WINDOWS,
    "efficient_vmamba_tiny": HIERARCHICAL,
}


def get_config(model: str = "vim_tiny"):
    if model not in OPTIONS:
        raise ValueError(f"The network is {model!r}: choose one of {', '.join(OPTIONS)}.")
    config = default_config("classifier")
    config.classifier.update({"name": model} | OPTIONS[model])
    config.batch_size = 32
    config.dataset.high_resolution = 64
    config.dataset.low_resolution = 16
    config.dataset.crop_scale = (0.4, 1.0)
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0
    config.schedule.learning_rate = 1e-3
    config.schedule.warmup_epochs = 2
    config.schedule.num_epochs = 30
    return config
