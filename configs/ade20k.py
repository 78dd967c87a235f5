"""The recipes of the published segmenters on ADE20K, shared by upernet_*_ade20k.py.

Data        DIR/images/train|val/*.jpg and DIR/annotations/train|val/*.png with 0 for no label and 1 to 150 for the
            classes: python -m vimd_jax.data.prepare ade20k ADEChallengeData2016.zip DIR
Start       --config.segmenter.init=CHECKPOINT of the classifier whose trunk is the backbone; its head is left out, its
            positions are resized

                        mmseg (LocalVim, LocalVMamba, VMamba, EfficientVMamba)  vim (Vim)
    batch, steps        16, 160,000                                             32, 60,000
    learning rate       6e-5, 1,500 steps of warm-up, then linearly to 0        1e-4 or 2e-4, the warm-up multiplies it
    layer decay         none                                                    0.92 or 0.95
    inference           whole images                                            windows of 512 pixels, 341 apart
    both                images fitted into 2048x512, scaled by 0.5 to 2, crops of 512 pixels in which no class has 75 %,
                        mirroring, photometric distortion; AdamW; the loss is the mean over all pixels, labelled or not

The batch is global. Another one does not change the learning rate, unless --config.schedule.reference_batch_size says
which batch it is for. On less memory: --config.accumulation_steps, --config.segmenter.remat=True.
Scales and mirroring at test time: --config.inference.flip=True
--config.inference.scales="(0.5,0.75,1.0,1.25,1.5,1.75)".
"""

from pathlib import Path

from ml_collections import ConfigDict

from vimd_jax.config import default_config


def mmseg(model: str, drop_path_rate: float) -> ConfigDict:
    """The recipe of LocalMamba's and VMamba's segmenters, which EfficientVMamba's paper names too."""
    config = _ade20k(model, drop_path_rate)
    config.batch_size = 16
    config.eval_every_epochs = 13  # about 16,000 steps
    config.optimizer.weight_decay = 0.01
    config.schedule.name = "poly"
    config.schedule.learning_rate = 6e-5
    config.schedule.warmup_learning_rate = 6e-11
    config.schedule.num_steps = 160_000
    return config


def vim(model: str, learning_rate: float, weight_decay: float, layer_decay: float) -> ConfigDict:
    """The recipe of Vim's segmenters; as published, optimizer.layer_decay_of is "embeddings"."""
    config = _ade20k(model, drop_path_rate=0.1)
    config.batch_size = 32
    config.eval_every_epochs = 2  # about 1,000 steps as published
    config.optimizer.weight_decay = weight_decay
    config.optimizer.layer_decay = layer_decay
    config.schedule.name = "poly_mmcv"
    config.schedule.learning_rate = learning_rate
    config.schedule.warmup_learning_rate = 1e-6 * learning_rate
    config.schedule.num_steps = 60_000
    config.inference.mode = "slide"
    config.inference.window = 512
    config.inference.stride = 341
    return config


def _ade20k(model: str, drop_path_rate: float) -> ConfigDict:
    config = default_config("segmenter")
    config.segmenter.name = model
    config.segmenter.input_normalization = True
    config.segmenter.drop_path_rate = drop_path_rate
    config.eval_batch_size = 1
    config.loss.pixel_mean = "all"
    config.dataset.name = "label_maps"
    config.dataset.classes = str(Path(__file__).with_name("ade20k_classes.txt"))
    config.dataset.label_values = "1..150"
    config.dataset.ignored_values = "0"
    config.dataset.high_resolution = 512
    config.dataset.low_resolution = 128
    config.dataset.size_limits = (2048, 512)
    config.schedule.min_learning_rate = 0.0
    config.schedule.warmup_steps = 1500
    config.selection = "test"  # the validation images of ADE20K, as published
    config.dataset.validation_fraction = 0.0
    return config
