"""The recipes by which the published networks were trained on ImageNet-1k, shared by *_imagenet.py and *_search.py.

                        deit (Vim, V2M)                             local_mamba (LocalMamba, EfficientVMamba)
    schedule            timm's, one epoch late; warm-up 5 epochs    warm-up 20 epochs in steps of one, then cosine
    learning rate       per 512 images, times batch / 512           independent of the batch size
    end, start          1e-5, 1e-6                                  1e-6, 1e-7
    images              a third of them per epoch, each three       every image once per epoch
                        times in a row
    RandAugment         rand-m9-mstd0.5-inc1                        local-m9-mstd0.5 (four operations more)
    mixup, cutmix       0.8, 1.0                                    0.2, 1.0; both drawn for every 128 images
    both                300 epochs, AdamW, label smoothing 0.1, random erasing 0.25, no clipping, images normalised by
                        ImageNet's mean and deviation, evaluation on the centre 224 of 256 pixels

The deit scripts also keep an average of the weights (0.99996), but neither evaluate nor publish it; it is omitted here.

The batch size is global: it is split among the devices. `--config.batch_size` also scales the learning rate of a deit
recipe (config.schedule.reference_batch_size; the first line of the log states the result), but not that of a
local_mamba recipe, as published. `--config.accumulation_steps` and `remat=True` save memory.
"""

from ml_collections import ConfigDict

from vimd_jax.config import default_config


def deit(model: str, batch_size: int, learning_rate: float, weight_decay: float, drop_path_rate: float) -> ConfigDict:
    """The recipe of Vim's and V2M's training scripts, which is DeiT's."""
    config = _imagenet(model, batch_size, weight_decay, drop_path_rate)
    config.dataset.repeats = 3
    config.dataset.augment.rand_augment = "rand-m9-mstd0.5-inc1"
    config.mixing.mixup_alpha = 0.8
    config.schedule.name = "timm_epoch"
    config.schedule.learning_rate = learning_rate
    config.schedule.reference_batch_size = 512
    config.schedule.min_learning_rate = 1e-5
    config.schedule.warmup_learning_rate = 1e-6
    config.schedule.warmup_epochs = 5
    return config


def local_mamba(model: str, batch_size: int = 1024, learning_rate: float = 1e-3) -> ConfigDict:
    """The recipe of LocalMamba's training toolbox, with which EfficientVMamba's published weights were also trained."""
    config = _imagenet(model, batch_size, weight_decay=0.04, drop_path_rate=0.1)
    config.dataset.augment.rand_augment = "local-m9-mstd0.5"
    config.mixing.mixup_alpha = 0.2
    config.schedule.name = "staircase"
    config.schedule.learning_rate = learning_rate
    config.schedule.min_learning_rate = 1e-6
    config.schedule.warmup_learning_rate = 1e-7
    config.schedule.warmup_epochs = 20
    return config


def _imagenet(model: str, batch_size: int, weight_decay: float, drop_path_rate: float) -> ConfigDict:
    config = default_config("classifier")
    config.classifier.name = model
    config.classifier.input_normalization = True
    config.classifier.drop_path_rate = drop_path_rate
    config.batch_size = batch_size
    config.dataset.name = "imagenet"
    config.dataset.num_classes = 1000
    config.dataset.eval_crop = 0.875
    config.dataset.augment.erasing_probability = 0.25
    config.mixing.cutmix_alpha = 1.0
    config.mixing.group_size = 128  # images of one GPU in the originals
    config.optimizer.weight_decay = weight_decay
    config.schedule.num_epochs = 300
    config.selection = "test"  # the validation images of ImageNet, as published
    config.dataset.validation_fraction = 0.0
    return config
