"""Vim on ImageNet-1k: evaluation of a converted checkpoint.

Paper       Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model, ICML 2024
Command     python -m weight_convert.convert --model vim_tiny --checkpoint vim_t_midclstok_76p1acc.pth \\
              --output weights/vim_tiny --option input_normalization=True
            python -m vimd_jax.evaluate --config configs/vim_imagenet.py:vim_tiny --workdir workdir/vim_tiny \\
              --checkpoint weights/vim_tiny --config.dataset.directory=DIR
Data        a folder DIR/val/<synset>/*.JPEG of the 50,000 validation images; or prepared by TFDS, without `directory`
View        short side to 256 pixels, centre crop of 224, ImageNet normalisation
Published   top-1 / top-5: vim_tiny 76.1 / 93.0, vim_tiny_stride8 78.3 / 94.2, vim_small 80.5 / 95.1,
            vim_small_stride8 81.6 / 95.4, vim_base 81.9 / 95.8 (README of hustvl/Vim)
Measured    not yet

To label images with class names: `python -m vimd_jax.predict --checkpoint weights/vim_tiny --crop 0.875 --classes
configs/imagenet_classes.txt IMAGE`. The names are the first WordNet lemma of each ILSVRC-2012 synset, in the order of
the synset numbers.
"""

from vimd_jax.config import default_config


def get_config(model: str = "vim_tiny"):
    config = default_config("classifier")
    config.classifier.name = model
    config.classifier.input_normalization = True
    config.dataset.name = "imagenet"
    config.dataset.num_classes = 1000
    config.dataset.eval_crop = 0.875
    return config
