"""Vim-tiny on ImageNet-1k, fine-tuned at stride 8: four times as many tokens from overlapping patches.

Paper       Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model, ICML 2024
Command     python -m vimd_jax.train --config configs/vim_tiny_stride8_finetune.py --workdir workdir/vim_stride8 \\
              --config.classifier.init=workdir/vim_tiny --config.dataset.directory=DIR
Start       the workdir of vim_tiny_imagenet.py, or vim_t_midclstok_76p1acc.pth; its positions are resized
Data        as vim_tiny_imagenet.py
Recipe      batch 1,024, 30 epochs at a constant learning rate of 1e-5 (start, peak and end); see imagenet.py
Published   top-1 78.3 %, top-5 94.2 % (README of hustvl/Vim)
Measured    not yet
"""

from vimd_jax.configs import imagenet


def get_config():
    config = imagenet.deit(
        "vim_tiny_stride8", batch_size=1024, learning_rate=5e-6, weight_decay=1e-8, drop_path_rate=0.0
    )
    config.schedule.warmup_learning_rate = 1e-5
    config.schedule.num_epochs = 30
    return config
