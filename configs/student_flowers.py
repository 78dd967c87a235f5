"""ViMD student (SRVM-Net), 56-pixel pictures: Oxford Flowers 102 (102 species, 1,020 training and 6,149 test pictures).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/student_flowers.py --workdir workdir/student_flowers \\
              --config.teacher.init=workdir/teacher_flowers \\
              --config.sr.init=SRResNet_x4-ImageNet-6dd5216c.pth.tar \\
              --config.student.init=vim_t_midclstok_ft_78p3acc.pth
Data        TFDS (`pip install vimd-jax[tfds]`), or a folder: --config.dataset.directory=DIR
Network     SRResNet x4 (frozen), then Vim-tiny, stride 8, 224 pixels; the teacher is the same Vim on the true picture
Recipes     configs/student_flowers.py is the paper's, configs/student_flowers.py:released the public script's;
            recipes.py explains how they differ
Published   the figure could not be found
Measured    not yet
"""

from configs import recipes


def get_config(recipe: str = "paper"):
    config = recipes.student(recipe)
    config.dataset.name = "flowers"
    return config
