"""ViMD student (SRVM-Net), 56-pixel pictures: CUB-200-2011 (200 bird species, 5,994 training and 5,794 test pictures).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/student_cub.py --workdir workdir/student_cub \\
              --config.teacher.init=workdir/teacher_cub \\
              --config.sr.init=SRResNet_x4-ImageNet-6dd5216c.pth.tar \\
              --config.student.init=vim_t_midclstok_ft_78p3acc.pth
Data        TFDS (`pip install vimd-jax[tfds]`), or a folder: --config.dataset.directory=DIR
Network     SRResNet x4 (frozen), then Vim-tiny, stride 8, 224 pixels; the teacher is the same Vim on the true picture
Recipes     configs/student_cub.py is the paper's, configs/student_cub.py:released the public script's;
            recipes.py explains how they differ
Published   top-1 80.08 % best epoch, 79.86 % last (the authors' logs, run cedfdeed: 300 epochs on
            from a finished plain student; plain student 77.98 %); chosen on the test set
Measured    not yet
"""

from configs import recipes


def get_config(recipe: str = "paper"):
    config = recipes.student(recipe)
    config.dataset.name = "cub"
    return config
