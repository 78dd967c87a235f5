"""ViMD student (SRVM-Net), 56-pixel pictures: Oxford-IIIT Pet (37 breeds, 3,680 training and 3,669 test pictures).

Paper       Vision Mamba Distillation for Low-resolution Fine-grained Image Classification, IEEE SPL 2025
Command     python -m vimd_jax.train --config configs/student_pets.py --workdir workdir/student_pets \\
              --config.teacher.init=workdir/teacher_pets \\
              --config.sr.init=SRResNet_x4-ImageNet-6dd5216c.pth.tar \\
              --config.student.init=vim_t_midclstok_ft_78p3acc.pth
Data        TFDS (`pip install vimd-jax[tfds]`), or a folder: --config.dataset.directory=DIR
Network     SRResNet x4 (frozen), then Vim-tiny, stride 8, 224 pixels; the teacher is the same Vim on the true picture
Recipes     configs/student_pets.py is the paper's, configs/student_pets.py:released the public script's;
            recipes.py explains how they differ
Published   top-1 92.12 % best epoch, 91.33 % last (the authors' logs, run 891eeb36: 200 epochs on
            from a finished plain student); chosen on the test set
Measured    not yet
"""

from configs import recipes


def get_config(recipe: str = "paper"):
    config = recipes.student(recipe)
    config.dataset.name = "pets"
    return config
