"""EfficientVMamba-small on ImageNet-1k, from scratch.

Paper       EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba, 2024, https://arxiv.org/abs/2403.09977
Command     python -m vimd_jax.train --config configs/efficient_vmamba_small_imagenet.py \\
              --workdir workdir/efficient_vmamba_small --config.dataset.directory=DIR --config.dataset.num_workers=16
Data        a folder: DIR/train/<synset>/*.JPEG, DIR/val/<synset>/*.JPEG; or prepared by TFDS, without `directory`
Recipe      batch 2,048 (16 GPUs of 128), learning rate 2e-3, clipping at 1, average 0.9999, as in the authors' logs;
            their published settings score lower. See imagenet.py
Published   top-1 78.7 % (paper)
Measured    not yet
"""

from vimd_jax.configs import imagenet


def get_config():
    config = imagenet.local_mamba("efficient_vmamba_small", batch_size=2048, learning_rate=2e-3)
    config.optimizer.clip_norm = 1.0
    config.ema_decay = 0.9999
    return config
