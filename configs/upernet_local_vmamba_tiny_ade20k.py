"""UperNet on LocalVMamba-tiny on ADE20K.

Paper       LocalMamba: Visual State Space Model with Windowed Selective Scan, 2024, https://arxiv.org/abs/2403.09338
Command     python -m vimd_jax.train --config configs/upernet_local_vmamba_tiny_ade20k.py \\
              --workdir workdir/upernet_local_vmamba_tiny --config.dataset.directory=DIR \\
              --config.segmenter.init=CLASSIFIER
Recipe      batch 16; data and the rest of it: ade20k.py
Published   mIoU 47.9, with scales and mirroring 49.1 (paper)
Measured    not yet
"""

from vimd_jax.configs import ade20k


def get_config():
    return ade20k.mmseg("upernet_local_vmamba_tiny", drop_path_rate=0.1)
