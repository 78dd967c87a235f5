"""Vim-base on ImageNet-1k, from scratch.

Paper       Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model, ICML 2024
Command     python -m vimd_jax.train --config configs/vim_base_imagenet.py \\
              --workdir workdir/vim_base --config.dataset.directory=DIR --config.dataset.num_workers=16
Data        a folder: DIR/train/<synset>/*.JPEG, DIR/val/<synset>/*.JPEG; or prepared by TFDS, without `directory`
Recipe      that of Vim-small, which is our choice; see imagenet.py
Published   top-1 81.9 %, top-5 95.8 % (README of hustvl/Vim), by an unpublished script
Measured    not yet
"""

from vimd_jax.configs import imagenet


def get_config():
    return imagenet.deit("vim_base", batch_size=512, learning_rate=1e-3, weight_decay=0.05, drop_path_rate=0.05)
