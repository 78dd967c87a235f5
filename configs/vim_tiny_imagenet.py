"""Vim-tiny on ImageNet-1k, from scratch.

Paper       Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model, ICML 2024
Command     python -m vimd_jax.train --config configs/vim_tiny_imagenet.py \\
              --workdir workdir/vim_tiny --config.dataset.directory=DIR --config.dataset.num_workers=16
Data        a folder: DIR/train/<synset>/*.JPEG, DIR/val/<synset>/*.JPEG; or prepared by TFDS, without `directory`
Recipe      batch 1,024 (8 GPUs of 128), learning rate 1e-3 there; see imagenet.py
Published   top-1 76.1 %, top-5 93.0 % (README of hustvl/Vim)
Measured    not yet
"""

from vimd_jax.configs import imagenet


def get_config():
    return imagenet.deit("vim_tiny", batch_size=1024, learning_rate=5e-4, weight_decay=0.1, drop_path_rate=0.0)
