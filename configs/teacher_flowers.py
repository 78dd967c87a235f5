"""ViMD teacher (HRVM-Net): Oxford Flowers 102 (102 species, 2,040 training and 6,149 test images).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/teacher_flowers.py --workdir workdir/teacher_flowers \\
              --config.teacher.init=vim_t_midclstok_ft_78p3acc.pth
Data        TFDS (`pip install 'vimd-jax[tfds]'`), or a folder: --config.dataset.directory=DIR. The 2,040 are the
            official training and validation splits of 1,020 images each: it is not known on which of them the paper
            trained. A folder with only the 1,020 training images is accepted too.
Published   no figure found (not in the authors' logs)
Measured    not yet
"""

from vimd_jax.configs import recipes


def get_config(recipe: str = "paper"):
    return recipes.teacher(recipe, "flowers")
