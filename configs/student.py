"""ViMD student (SRVM-Net), 56-pixel images, for a dataset of your own.

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/student.py --workdir workdir/student \\
              --config.dataset.directory=DIR --config.teacher.init=workdir/teacher \\
              --config.sr.init=SRResNet_x4-ImageNet-6dd5216c.pth.tar \\
              --config.student.init=vim_t_midclstok_ft_78p3acc.pth
Data        a folder: DIR/train/<class>/*.jpg, DIR/test/<class>/*.jpg
Network     SRResNet x4 (frozen), then Vim-tiny, stride 8, 224 pixels; the teacher is the same Vim on the original image
Recipes     configs/student.py is the paper's, configs/student.py:released the public script's; see recipes.py
Measured    speed and memory: docs/benchmarks.md
"""

from vimd_jax.configs import recipes


def get_config(recipe: str = "paper"):
    return recipes.student(recipe)
