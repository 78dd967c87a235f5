"""ViMD teacher (HRVM-Net) for a dataset of your own.

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/teacher.py --workdir workdir/teacher \\
              --config.dataset.directory=DIR --config.teacher.init=vim_t_midclstok_ft_78p3acc.pth
Data        a folder: DIR/train/<class>/*.jpg, DIR/test/<class>/*.jpg
Network     Vim-tiny, stride 8, 224 pixels
Measured    speed and memory: docs/benchmarks.md
"""

from vimd_jax.configs import recipes


def get_config(recipe: str = "paper"):
    return recipes.teacher(recipe)
