"""ViMD student (SRVM-Net) for 56x56 images: Stanford Dogs (120 breeds, 12,000 training and 8,580 test images).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/student_dogs.py --workdir workdir/student_dogs \\
              --config.teacher.init=workdir/teacher_dogs \\
              --config.sr.init=SRResNet_x4-ImageNet-6dd5216c.pth.tar \\
              --config.student.init=vim_t_midclstok_ft_78p3acc.pth
Data        TFDS (`pip install 'vimd-jax[tfds]'`), or a folder: --config.dataset.directory=DIR
Recipes     "paper", and "released" (--config configs/student_dogs.py:released): see recipes.py
Published   top-1 83.90 % at the best epoch, chosen on the test set; 83.38 % at the last (the authors' logs, run
            be0495fe, which is the released script; 84.18 % with logits distillation, run c56d8812)
Measured    not yet
"""

from vimd_jax.configs import recipes


def get_config(recipe: str = "paper"):
    return recipes.student(recipe, "dogs")
