"""ViMD student (SRVM-Net) for 56x56 images: MIT Indoor 67 (67 scene categories, 5,360 training and 1,340 test images).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/student_mit67.py --workdir workdir/student_mit67 \\
              --config.dataset.directory=DIR --config.teacher.init=workdir/teacher_mit67 \\
              --config.sr.init=SRResNet_x4-ImageNet-6dd5216c.pth.tar \\
              --config.student.init=vim_t_midclstok_ft_78p3acc.pth
Data        a folder: --config.dataset.directory=DIR
Recipes     "paper", and "released" (--config configs/student_mit67.py:released): see recipes.py
Published   no figure found (not in the authors' logs)
Measured    not yet
"""

from vimd_jax.configs import recipes


def get_config(recipe: str = "paper"):
    return recipes.student(recipe, "mit67")
