"""ViMD teacher (HRVM-Net): CUB-200-2011 (200 bird species, 5,994 training and 5,794 test images).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/teacher_cub.py --workdir workdir/teacher_cub \\
              --config.teacher.init=vim_t_midclstok_ft_78p3acc.pth
Data        TFDS (`pip install 'vimd-jax[tfds]'`), or a folder: --config.dataset.directory=DIR
Network     Vim-tiny (stride 8, 224x224)
            ("logged" began from vim_t_midclstok_76p1acc.pth instead)
Recipes     configs/teacher_cub.py follows the paper, configs/teacher_cub.py:logged the authors' logs, see recipes.py
Published   top-1 84.47 % at the best epoch, chosen on the test set (the authors' logs, run 5a13d94f: 300 epochs from
            the 76.1 % ImageNet weights with RandAugment, mixup, cutmix and random erasing)
Measured    not yet
"""

from vimd_jax.configs import recipes


def get_config(recipe: str = "paper"):
    config = recipes.teacher(recipe)
    config.dataset.name = "cub"
    return config
