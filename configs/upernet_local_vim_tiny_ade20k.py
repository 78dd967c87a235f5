"""UperNet on LocalVim-tiny on ADE20K.

Paper       LocalMamba: Visual State Space Model with Windowed Selective Scan, 2024, https://arxiv.org/abs/2403.09338
Command     python -m vimd_jax.train --config configs/upernet_local_vim_tiny_ade20k.py \\
              --workdir workdir/upernet_local_vim_tiny --config.dataset.directory=DIR \\
              --config.segmenter.init=CLASSIFIER
Recipe      batch 16; data and the rest of it: ade20k.py
Published   mIoU 43.4, with scales and mirroring 44.4 (paper), of images that are no squares with their scans scrambled
Measured    not yet
"""

from vimd_jax.configs import ade20k


def get_config():
    return ade20k.mmseg("upernet_local_vim_tiny", drop_path_rate=0.1)
