"""UperNet on Vim-tiny on ADE20K.

Paper       Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model, ICML 2024
Command     python -m vimd_jax.train --config configs/upernet_vim_tiny_ade20k.py \\
              --workdir workdir/upernet_vim_tiny --config.dataset.directory=DIR \\
              --config.segmenter.init=CLASSIFIER
Recipe      batch 32 (4 GPUs of 8), learning rate 2e-4, layer decay 0.92; data and the rest of it: ade20k.py
Published   mIoU 41.0 (paper), whose classifier without class token is not public
Measured    not yet
"""

from vimd_jax.configs import ade20k


def get_config():
    return ade20k.vim("upernet_vim_tiny", learning_rate=2e-4, weight_decay=0.1, layer_decay=0.92)
