"""SRResNet x4: restores 224-pixel images from 56-pixel ones; trained on pairs, pixel loss.

Paper       Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial Network, CVPR 2017 (SRResNet)
Command     python -m vimd_jax.train --config configs/sr.py --workdir workdir/sr --config.dataset.directory=DIR
Data        any folder of class folders (the classes do not matter), or a dataset by name
Network     SRResNet, 64 channels, 16 residual blocks, 1,547,350 parameters
Published   ViMD does not train it: it takes SRResNet_x4-ImageNet-6dd5216c.pth.tar, which --config.sr.init loads too
Measured    not yet
"""

from vimd_jax.config import default_config


def get_config():
    config = default_config("sr")
    config.dataset.crop_scale = (0.3, 1.0)
    config.optimizer.weight_decay = 0.0
    config.schedule.learning_rate = 2e-4
    config.schedule.warmup_epochs = 1
    config.schedule.num_epochs = 50
    return config
