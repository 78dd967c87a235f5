"""ViMD student (SRVM-Net) for 56x56 images: Stanford 40 Actions (40 actions, 4,000 training and 5,532 test images).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/student_action.py --workdir workdir/student_action \\
              --config.dataset.directory=DIR --config.teacher.init=workdir/teacher_action \\
              --config.sr.init=SRResNet_x4-ImageNet-6dd5216c.pth.tar \\
              --config.student.init=vim_t_midclstok_ft_78p3acc.pth
Data        a folder: --config.dataset.directory=DIR
Recipes     "paper", and "released" (--config configs/student_action.py:released): see recipes.py
Published   no figure found (not in the authors' logs)
Measured    not yet
"""

from vimd_jax.configs import recipes


def get_config(recipe: str = "paper"):
    return recipes.student(recipe, "action")
