"""UperNet on EfficientVMamba-base on ADE20K.

Paper       EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba, 2024, https://arxiv.org/abs/2403.09977
Command     python -m vimd_jax.train --config configs/upernet_efficient_vmamba_base_ade20k.py \\
              --workdir workdir/upernet_efficient_vmamba_base --config.dataset.directory=DIR \\
              --config.segmenter.init=CLASSIFIER
Recipe      batch 16; no configuration is published, the rate of stochastic depth is VMamba-tiny's; data and the rest of
            it: ade20k.py
Published   mIoU 46.5, with scales and mirroring 47.3 (paper)
Measured    not yet
"""

from vimd_jax.configs import ade20k


def get_config():
    return ade20k.mmseg("upernet_efficient_vmamba_base", drop_path_rate=0.2)
