"""ViMD student (SRVM-Net) for 56x56 images: CUB-200-2011 (200 bird species, 5,994 training and 5,794 test images).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/student_cub.py --workdir workdir/student_cub \\
              --config.teacher.init=workdir/teacher_cub \\
              --config.sr.init=SRResNet_x4-ImageNet-6dd5216c.pth.tar \\
              --config.student.init=vim_t_midclstok_ft_78p3acc.pth
Data        TFDS (`pip install 'vimd-jax[tfds]'`), or a folder: --config.dataset.directory=DIR
Recipes     "paper", and "released" (--config configs/student_cub.py:released): see recipes.py
Published   top-1 80.08 % at the best epoch, chosen on the test set; 79.86 % at the last (the authors' logs, run
            cedfdeed: 300 epochs from a fully trained student without distillation, which had 77.98 %)
Measured    not yet
"""

from vimd_jax.configs import recipes


def get_config(recipe: str = "paper"):
    return recipes.student(recipe, "cub")
