"""The networks of small_classifier.py, trained with the augmentations of the ImageNet recipes.

Command     python -m vimd_jax.train --config configs/small_augmented.py:vim_tiny --workdir workdir/augmented \\
              --config.dataset.directory=DIR
Data        a folder: DIR/train/<class>/*.jpg, DIR/test/<class>/*.jpg
Recipe      that of small_classifier.py with RandAugment, random erasing, mixup and cutmix as in imagenet.py, and a
            moving average of the weights
Measured    docs/benchmarks.md
"""

from vimd_jax.configs import small_classifier


def get_config(model: str = "vim_tiny"):
    config = small_classifier.get_config(model)
    config.dataset.augment.rand_augment = "rand-m9-mstd0.5-inc1"
    config.dataset.augment.erasing_probability = 0.25
    config.mixing.mixup_alpha = 0.2
    config.mixing.cutmix_alpha = 1.0
    config.ema_decay = 0.99
    return config
