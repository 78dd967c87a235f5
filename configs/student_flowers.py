"""ViMD student (SRVM-Net) for 56x56 images: Oxford Flowers 102 (102 species, 2,040 training and 6,149 test images).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/student_flowers.py --workdir workdir/student_flowers \\
              --config.teacher.init=workdir/teacher_flowers \\
              --config.sr.init=SRResNet_x4-ImageNet-6dd5216c.pth.tar \\
              --config.student.init=vim_t_midclstok_ft_78p3acc.pth
Data        TFDS (`pip install 'vimd-jax[tfds]'`), or a folder: --config.dataset.directory=DIR. The 2,040 are the
            official training and validation splits of 1,020 images each: it is not known on which of them the paper
            trained. A folder with only the 1,020 training images is accepted too.
Recipes     "paper", and "released" (--config configs/student_flowers.py:released): see recipes.py
Published   no figure found (not in the authors' logs)
Measured    not yet
"""

from vimd_jax.configs import recipes


def get_config(recipe: str = "paper"):
    return recipes.student(recipe, "flowers")
