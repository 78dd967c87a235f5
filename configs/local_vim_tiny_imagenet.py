"""LocalVim-tiny on ImageNet-1k, from scratch, with the published directions.

Paper       LocalMamba: Visual State Space Model with Windowed Selective Scan, 2024, https://arxiv.org/abs/2403.09338
Command     python -m vimd_jax.train --config configs/local_vim_tiny_imagenet.py \\
              --workdir workdir/local_vim_tiny --config.dataset.directory=DIR --config.dataset.num_workers=16
Data        a folder: DIR/train/<synset>/*.JPEG, DIR/val/<synset>/*.JPEG; or prepared by TFDS, without `directory`
Recipe      batch 1,024 (8 GPUs of 128), learning rate 1e-3; see imagenet.py
Published   top-1 76.2 % (paper)
Measured    not yet
"""

from vimd_jax.configs import imagenet


def get_config():
    return imagenet.local_mamba("local_vim_tiny")
