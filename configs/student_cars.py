"""ViMD student (SRVM-Net) for 56x56 images: Stanford Cars (196 models, 8,144 training and 8,041 test images).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/student_cars.py --workdir workdir/student_cars \\
              --config.teacher.init=workdir/teacher_cars \\
              --config.sr.init=SRResNet_x4-ImageNet-6dd5216c.pth.tar \\
              --config.student.init=vim_t_midclstok_ft_78p3acc.pth
Data        TFDS (`pip install 'vimd-jax[tfds]'`), or a folder: --config.dataset.directory=DIR
Recipes     "paper", and "released" (--config configs/student_cars.py:released): see recipes.py
Published   top-1 88.87 % at the best epoch, chosen on the test set; 88.15 % at the last (the authors' logs, run
            0883d0d9: 200 epochs from a fully trained student without distillation)
Measured    not yet
"""

from vimd_jax.configs import recipes


def get_config(recipe: str = "paper"):
    return recipes.student(recipe, "cars")
