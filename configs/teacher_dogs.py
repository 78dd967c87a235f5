"""ViMD teacher (HRVM-Net): Stanford Dogs (120 breeds, 12,000 training and 8,580 test images).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/teacher_dogs.py --workdir workdir/teacher_dogs \\
              --config.teacher.init=vim_t_midclstok_ft_78p3acc.pth
Data        TFDS (`pip install 'vimd-jax[tfds]'`), or a folder: --config.dataset.directory=DIR
Published   no figure found (not in the authors' logs)
Measured    not yet
"""

from vimd_jax.configs import recipes


def get_config(recipe: str = "paper"):
    return recipes.teacher(recipe, "dogs")
