"""ViMD teacher (HRVM-Net): FGVC-Aircraft (100 variants, 6,667 training and 3,333 test images).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/teacher_aircraft.py --workdir workdir/teacher_aircraft \\
              --config.dataset.directory=DIR --config.teacher.init=vim_t_midclstok_ft_78p3acc.pth
Data        a folder: --config.dataset.directory=DIR
Published   no figure found (not in the authors' logs)
Measured    not yet
"""

from vimd_jax.configs import recipes


def get_config(recipe: str = "paper"):
    return recipes.teacher(recipe, "aircraft")
