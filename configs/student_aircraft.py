"""ViMD student (SRVM-Net) for 56x56 images: FGVC-Aircraft (100 variants, 6,667 training and 3,333 test images).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/student_aircraft.py --workdir workdir/student_aircraft \\
              --config.dataset.directory=DIR --config.teacher.init=workdir/teacher_aircraft \\
              --config.sr.init=SRResNet_x4-ImageNet-6dd5216c.pth.tar \\
              --config.student.init=vim_t_midclstok_ft_78p3acc.pth
Data        a folder: --config.dataset.directory=DIR
Recipes     "paper", and "released" (--config configs/student_aircraft.py:released): see recipes.py
Published   top-1 83.17 % at the best epoch, chosen on the test set; 82.54 % at the last (the authors' logs, run
            d07c876c, stopped after 148 of 200 epochs); not one of the paper's seven datasets
Measured    not yet
"""

from vimd_jax.configs import recipes


def get_config(recipe: str = "paper"):
    return recipes.student(recipe, "aircraft")
