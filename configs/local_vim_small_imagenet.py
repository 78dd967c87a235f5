"""LocalVim-small on ImageNet-1k, from scratch, with the published directions.

Paper       LocalMamba: Visual State Space Model with Windowed Selective Scan, 2024, https://arxiv.org/abs/2403.09338
Command     python -m vimd_jax.train --config configs/local_vim_small_imagenet.py \\
              --workdir workdir/local_vim_small --config.dataset.directory=DIR --config.dataset.num_workers=16
Data        a folder: DIR/train/<synset>/*.JPEG, DIR/val/<synset>/*.JPEG; or prepared by TFDS, without `directory`
Recipe      batch 1,024 (8 GPUs of 128), learning rate 1e-3; see imagenet.py
Published   top-1 81.2 % (paper), 81.1 % in a second training (README of hunto/LocalMamba)
Measured    not yet
"""

from vimd_jax.configs import imagenet
from vimd_jax.models.local_vim import SEARCHED


def get_config():
    config = imagenet.local_mamba("local_vim_small")
    config.classifier.directions = SEARCHED  # the paper's; the name alone is the network that the code makes
    return config
