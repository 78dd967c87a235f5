"""UperNet on VMamba-tiny, second release on ADE20K.

Paper       VMamba: Visual State Space Model, NeurIPS 2024, https://arxiv.org/abs/2401.10166
Command     python -m vimd_jax.train --config configs/upernet_vmamba2_tiny_ade20k.py \\
              --workdir workdir/upernet_vmamba2_tiny --config.dataset.directory=DIR \\
              --config.segmenter.init=CLASSIFIER
Recipe      batch 16; data and the rest of it: ade20k.py
Published   mIoU 48.3, with scales and mirroring 48.6 (authors' table)
Measured    not yet
"""

from vimd_jax.configs import ade20k


def get_config():
    return ade20k.mmseg("upernet_vmamba2_tiny", drop_path_rate=0.2)
