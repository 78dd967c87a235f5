"""ViMD student (SRVM-Net), 56-pixel pictures: MIT Indoor 67 (67 rooms, 5,360 training and 1,340 test pictures).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/student_mit67.py --workdir workdir/student_mit67 \\
              --config.dataset.directory=DIR --config.teacher.init=workdir/teacher_mit67 \\
              --config.sr.init=SRResNet_x4-ImageNet-6dd5216c.pth.tar \\
              --config.student.init=vim_t_midclstok_ft_78p3acc.pth
Data        a folder: --config.dataset.directory=DIR
Network     SRResNet x4 (frozen), then Vim-tiny, stride 8, 224 pixels; the teacher is the same Vim on the true picture
Recipes     configs/student_mit67.py is the paper's, configs/student_mit67.py:released the public script's;
            recipes.py explains how they differ
Published   the figure could not be found
Measured    not yet
"""

from configs import recipes


def get_config(recipe: str = "paper"):
    config = recipes.student(recipe)
    config.dataset.name = "mit67"
    return config
