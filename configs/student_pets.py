"""ViMD student (SRVM-Net) for 56x56 images: Oxford-IIIT Pet (37 breeds, 3,680 training and 3,669 test images).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/student_pets.py --workdir workdir/student_pets \\
              --config.teacher.init=workdir/teacher_pets \\
              --config.sr.init=SRResNet_x4-ImageNet-6dd5216c.pth.tar \\
              --config.student.init=vim_t_midclstok_ft_78p3acc.pth
Data        TFDS (`pip install 'vimd-jax[tfds]'`), or a folder: --config.dataset.directory=DIR
Recipes     "paper", and "released" (--config configs/student_pets.py:released): see recipes.py
Published   top-1 92.12 % at the best epoch, chosen on the test set; 91.33 % at the last (the authors' logs, run
            891eeb36: 200 epochs from a fully trained student without distillation)
Measured    not yet
"""

from vimd_jax.configs import recipes


def get_config(recipe: str = "paper"):
    return recipes.student(recipe, "pets")
