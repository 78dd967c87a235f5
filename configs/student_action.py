"""ViMD student (SRVM-Net) for 56x56 images: Stanford 40 Actions (40 actions, 4,000 training and 5,532 test images).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/student_action.py --workdir workdir/student_action \\
              --config.dataset.directory=DIR --config.teacher.init=workdir/teacher_action \\
              --config.sr.init=SRResNet_x4-ImageNet-6dd5216c.pth.tar \\
              --config.student.init=vim_t_midclstok_ft_78p3acc.pth
Data        a folder: --config.dataset.directory=DIR
Network     frozen SRResNet x4, then Vim-tiny (stride 8, 224x224); the teacher is the same Vim on the original images
Recipes     configs/student_action.py follows the paper, configs/student_action.py:released the authors' public script;
            recipes.py explains the differences
Published   no figure found (not in the authors' logs)
Measured    not yet
"""

from vimd_jax.configs import recipes


def get_config(recipe: str = "paper"):
    config = recipes.student(recipe)
    config.dataset.name = "action"
    return config
