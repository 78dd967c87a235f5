"""UperNet on Vim-small on ADE20K.

Paper       Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model, ICML 2024
Command     python -m vimd_jax.train --config configs/upernet_vim_small_ade20k.py \\
              --workdir workdir/upernet_vim_small --config.dataset.directory=DIR \\
              --config.segmenter.init=CLASSIFIER
Recipe      batch 32 (4 GPUs of 8), learning rate 1e-4, layer decay 0.95; data and the rest of it: ade20k.py
Published   mIoU 44.9 (paper)
Measured    not yet
"""

from vimd_jax.configs import ade20k


def get_config():
    return ade20k.vim("upernet_vim_small", learning_rate=1e-4, weight_decay=0.05, layer_decay=0.95)
