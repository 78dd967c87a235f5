"""ViMD student (SRVM-Net), 56-pixel pictures: Stanford Cars (196 models, 8,144 training and 8,041 test pictures).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/student_cars.py --workdir workdir/student_cars \\
              --config.teacher.init=workdir/teacher_cars \\
              --config.sr.init=SRResNet_x4-ImageNet-6dd5216c.pth.tar \\
              --config.student.init=vim_t_midclstok_ft_78p3acc.pth
Data        TFDS (`pip install vimd-jax[tfds]`), or a folder: --config.dataset.directory=DIR
Network     SRResNet x4 (frozen), then Vim-tiny, stride 8, 224 pixels; the teacher is the same Vim on the true picture
Recipes     configs/student_cars.py is the paper's, configs/student_cars.py:released the public script's;
            recipes.py explains how they differ
Published   top-1 88.87 % best epoch, 88.15 % last (the authors' logs, run 0883d0d9: 200 epochs on
            from a finished plain student); chosen on the test set
Measured    not yet
"""

from configs import recipes


def get_config(recipe: str = "paper"):
    config = recipes.student(recipe)
    config.dataset.name = "cars"
    return config
