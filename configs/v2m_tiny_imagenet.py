"""V2M-tiny on ImageNet-1k, from scratch.

Paper       V2M: Visual 2-Dimensional Mamba for Image Representation Learning, 2024, https://arxiv.org/abs/2410.10382
Command     python -m vimd_jax.train --config configs/v2m_tiny_imagenet.py \\
              --workdir workdir/v2m_tiny --config.dataset.directory=DIR --config.dataset.num_workers=16
Data        a folder: DIR/train/<synset>/*.JPEG, DIR/val/<synset>/*.JPEG; or prepared by TFDS, without `directory`
Recipe      batch 512 (8 GPUs of 64), learning rate 5e-4 there; see imagenet.py
Published   top-1 76.2 % (paper)
Measured    not yet
"""

from vimd_jax.configs import imagenet


def get_config():
    return imagenet.deit("v2m_tiny", batch_size=512, learning_rate=5e-4, weight_decay=0.1, drop_path_rate=0.0)
