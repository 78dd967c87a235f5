"""Every setting of a run, with its default, its possible values and its meaning. The files in configs/ change a few.

The configs are `ml_collections.ConfigDict`s: a misspelt field or a value of the wrong type is an error, and every field
can be changed on the command line, as in `--config.schedule.num_epochs=10`. `python -m vimd_jax.config` lists them.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator
from operator import getitem
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from ml_collections import ConfigDict, config_dict

from kernels.scan.api import IMPLEMENTATIONS
from vimd_jax.models import model_options
from vimd_jax.settings import ABOVE_0, ANY, BELOW_1, SHARE, SHARE_OR_0, SHARES, SIZE, Rule, Setting, at_least, one_of
from vimd_jax.tasks.classification import CLASSIFICATION
from vimd_jax.tasks.distillation import distilled
from vimd_jax.tasks.restoration import RESTORATION
from vimd_jax.tasks.segmentation import SEGMENTATION
from vimd_jax.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Stage:
    """One kind of training run.

    Attributes:
      task: what is learned.
      trained: the role of the network that is trained, which is also the name of the stage.
      restorer: the role of the frozen network that enlarges the images before; "" where they are read as they are.
      teacher: the role of the frozen network that teaches; "" where none does.
    """

    task: Task
    trained: str
    restorer: str = ""
    teacher: str = ""

    def __iter__(self) -> Iterator[str]:
        """The roles of the stage's networks, which each have a section of its config."""
        return (role for role in (self.restorer, self.teacher, self.trained) if role)


STAGES = {
    stage.trained: stage
    for stage in (
        Stage(RESTORATION, trained="sr"),
        Stage(CLASSIFICATION, trained="classifier"),
        Stage(CLASSIFICATION, trained="teacher"),  # HRVM-Net of ViMD
        Stage(distilled(CLASSIFICATION), trained="student", restorer="sr", teacher="teacher"),  # SRVM-Net of ViMD
        Stage(SEGMENTATION, trained="segmenter"),
        Stage(distilled(SEGMENTATION), trained="segmenter_student", restorer="sr", teacher="segmenter"),  # ours
    )
}

# Options that a run derives from its other settings.
DERIVED = ("num_classes", "image_size", "scale", "bn_axis_name")

# Fields of a network's section that are no options of the network.
_NO_OPTION = ("name", "init", "init_key", "init_position_mode")

# The defaults are the recipe of the ViMD paper (Chen et al., IEEE SPL 2025) for 56x56 images, where the paper and the
# authors' logs state it.
_SETTINGS = {
    "seed": Setting(
        0,
        Rule("from 0 to 4294967295", lambda x: 0 <= x < 2**32),
        "decides the initial weights, the order of the images and their augmentation",
    ),
    "batch_size": Setting(16, at_least(1), "images a step, over all devices and hosts"),
    "accumulation_steps": Setting(
        1,
        at_least(1),
        "parts that a device computes its share of a batch in, one after the other, to save memory; batch statistics "
        "are those of a part, and stochastic depth then depends on the number of devices",
    ),
    "eval_batch_size": Setting(64, at_least(1), "the same in an evaluation", changeable=True),
    "ema_decay": Setting(
        0.0, BELOW_1, "above 0 keeps an exponential moving average of all variables, evaluates and saves it"
    ),
    "ema_warmup": Setting(
        False, ANY, "the average of step t, from 1, has the decay min(ema_decay, (1 + t) / (10 + t))"
    ),
    "continue_from": Setting(
        "",
        ANY,
        "workdir of a finished run: begin with its last state, optimizer and step included, to train for more epochs",
        changeable=True,
    ),
    "selection": Setting(
        "validation", one_of("validation", "test"), 'split that picks the best network; "test" is the published habit'
    ),
    "scan_implementation": Setting(
        "",
        one_of("", *IMPLEMENTATIONS.names),
        "of the selective scan in all networks; empty: the fastest",
    ),
    "eval_every_epochs": Setting(1, at_least(1), "epochs between evaluations"),
    "log_every_steps": Setting(50, at_least(1), "steps between lines of the log", changeable=True),
    "checkpoint_every_steps": Setting(
        500, at_least(1), "steps between checkpoints; every evaluation is followed by one too", changeable=True
    ),
    "dataset.name": Setting(
        "folder",
        ANY,
        "folder, list, label_maps, hugging_face, array_record, synthetic, cub, cars, dogs, pets, flowers, mit67, "
        "action, aircraft or imagenet; or module:function, a source of your own",
    ),
    "dataset.directory": Setting(
        "",
        ANY,
        "contains train|val|test/<class>/*.jpg, or is what the format asks for; empty: read through TFDS, if TFDS has "
        "the dataset",
        changeable=True,
    ),
    "dataset.value_range": Setting(
        (),
        Rule("empty or two numbers, the smaller first", lambda x: len(x) == 0 or (len(x) == 2 and x[0] < x[1])),
        "values of grey images of more than 8 bits that become black and white, as (0, 4095); empty: those of 16 bits",
    ),
    "dataset.num_classes": Setting(0, at_least(0), "0: as many as the data has; otherwise checked"),
    "dataset.high_resolution": Setting(
        224, SIZE, "pixels, what a classifier sees and a teacher teaches; or (height, width)", kind=object
    ),
    "dataset.low_resolution": Setting(56, SIZE, "pixels, what a student sees; or (height, width)", kind=object),
    "dataset.validation_fraction": Setting(
        0.1, BELOW_1, "of the training images, held out if the folder has no val/ of its own"
    ),
    "dataset.crop_scale": Setting((0.08, 1.0), SHARES, "share of the image's area that a random-resized crop takes"),
    "dataset.flip": Setting(True, ANY, "mirror half of the training images"),
    "dataset.augment.rand_augment": Setting(
        "",
        ANY,
        'RandAugment in timm\'s notation, as "rand-m9-mstd0.5-inc1", or LocalMamba\'s, "local-m9-mstd0.5"; empty: off',
    ),
    "dataset.augment.three_augment": Setting(False, ANY, "greyscale, solarisation or blur, as in DeiT III"),
    "dataset.augment.color_jitter": Setting(
        0.0, at_least(0), "largest relative change of brightness, contrast and saturation"
    ),
    "dataset.augment.erasing_probability": Setting(0.0, SHARE_OR_0, "of random erasing"),
    "dataset.augment.erasing_mode": Setting(
        "pixel", one_of("pixel", "rand", "const"), 'filled with noise, a random colour "rand", or the mean "const"'
    ),
    "dataset.augment.erasing_count": Setting(1, at_least(1), "largest number of boxes"),
    "dataset.reduced_decoding": Setting(
        False, ANY, "decode a JPEG at 1/2, 1/4 or 1/8 scale where the training crop is that large"
    ),
    "dataset.eval_crop": Setting(1.0, SHARE, "share of the image's short side that the evaluation view keeps"),
    "dataset.repeats": Setting(
        1, at_least(1), "times each image is drawn in a row; 3 is the published repeated augmentation"
    ),
    "dataset.sampling": Setting(
        "uniform",
        one_of("uniform", "balanced"),
        'every training image once an epoch, or "balanced": images of every class equally often',
    ),
    "dataset.on_error": Setting(
        "stop", one_of("stop", "skip"), 'an unreadable image: "stop", or "skip" and count', changeable=True
    ),
    "dataset.num_workers": Setting(
        0, at_least(0), "input processes; 0: a thread of the training process", changeable=True
    ),
    "dataset.synthetic_classes": Setting(8, at_least(1), "of the synthetic birds"),
    "dataset.synthetic_train_size": Setting(2000, at_least(1), "training images of the synthetic birds"),
    "dataset.synthetic_test_size": Setting(500, at_least(1), "test images of the synthetic birds"),
    "optimizer.weight_decay": Setting(1e-8, at_least(0), "of AdamW"),
    "optimizer.b1": Setting(0.9, BELOW_1, "of AdamW"),
    "optimizer.b2": Setting(0.999, BELOW_1, "of AdamW"),
    "optimizer.eps": Setting(1e-8, ABOVE_0, "of AdamW"),
    "optimizer.clip_norm": Setting(float, at_least(0), "largest global norm of the gradients; none or 0: any"),
    "optimizer.layer_decay": Setting(
        1.0, SHARE, "factor of the learning rate from each layer to the one before it; 1: off"
    ),
    "optimizer.layer_decay_of": Setting(
        "layers",
        one_of("layers", "embeddings"),
        '"embeddings": of these alone, the published mistake of Vim\'s segmenters',
    ),
    "optimizer.freeze": Setting(
        "", ANY, 'regular expression of parameters that are not trained, as "^(patch_embed|position)"; empty: none'
    ),
    "optimizer.decay_state_matrix": Setting(True, ANY, "weight decay shrinks A_log too, as published"),
    "schedule.name": Setting(
        "cosine",
        one_of("cosine", "timm_epoch", "staircase", "poly", "poly_mmcv"),
        "timm_epoch: Vim's with its one-epoch lag; staircase: LocalMamba's, whose warm-up rises once an epoch; poly: "
        "MMSegmentation's; poly_mmcv: of Vim's segmenters",
    ),
    "schedule.learning_rate": Setting(5e-5, at_least(0), "at the peak"),
    "schedule.reference_batch_size": Setting(
        0, at_least(0), "above 0: learning_rate is for this batch size, and multiplied by batch_size / it"
    ),
    "schedule.min_learning_rate": Setting(1e-6, at_least(0), "at the end"),
    "schedule.warmup_learning_rate": Setting(1e-6, at_least(0), "at the start"),
    "schedule.warmup_epochs": Setting(5, at_least(0), "epochs until the peak"),
    "schedule.num_epochs": Setting(250, at_least(1), "of the whole run"),
    "schedule.warmup_steps": Setting(0, at_least(0), "with num_steps: steps until the peak"),
    "schedule.num_steps": Setting(0, at_least(0), "above 0: steps of the whole run, instead of num_epochs"),
    "schedule.power": Setting(1.0, ABOVE_0, "of poly and poly_mmcv"),
}


def settings(stage: str) -> dict[str, Setting]:
    """The settings of a stage by their dotted names, apart from the sections of its networks."""
    return {**_SETTINGS, **STAGES[stage].task.settings}


def default_config(stage: str) -> ConfigDict:
    """The settings of one training stage, see `STAGES`, at their defaults."""
    if stage not in STAGES:
        raise ValueError(f"config.stage is {stage!r}: choose one of {', '.join(STAGES)}.")
    config = ConfigDict({"stage": stage})
    for name, setting in settings(stage).items():
        *sections, field = name.split(".")
        section = config
        for part in sections:
            if part not in section:
                section[part] = {}
            section = section[part]
        default = setting.default
        if isinstance(default, type):
            section[field] = config_dict.placeholder(default)
        else:
            section[field] = config_dict.FieldReference(default, field_type=setting.kind or type(default))
    for role in STAGES[stage]:
        config[role] = _network(role)
    return config.lock()


def check_settings(config: ConfigDict) -> None:
    """Raises ValueError, naming the field, if a setting of a stage has a value that it may not have."""
    for name, setting in settings(config.stage).items():
        value = functools.reduce(getitem, name.split("."), config)
        finite = not isinstance(value, float) or math.isfinite(value)
        if value is not None and not (finite and setting.rule.fits(value)):
            raise ValueError(f"config.{name} is {value!r}: it must be {setting.rule.words}.")


def _network(role: str) -> ConfigDict:
    """A name of `list_models()`, where its weights come from, and its options: see the network's class.

    There is a field for every option of every network that could stand here; one that the named network does not have
    is an error. Fields left at None keep the network's own value; "none" is None.
    """
    task = STAGES[role].task
    kinds = {
        option: kind
        for name in task.networks
        for option, kind in model_options(name).items()
        if option not in DERIVED and kind is not None  # an option that can only be None
    }
    section = ConfigDict({option: config_dict.placeholder(_flag_type(kind)) for option, kind in sorted(kinds.items())})
    section.name = task.network  # of a restorer also "bicubic": no network
    section.init = ""  # a workdir, a converted checkpoint, a .pth / .safetensors file or hf://…; empty: from scratch
    section.init_key = ""  # of a PyTorch file, as "model_ema"; empty: where the weights usually are
    section.init_position_mode = "correct"  # how positions are resized for another grid; or "reference", as published
    return section


def _flag_type(kind: Any) -> type:
    """The type that a command line reads for an option; object is any value, as Python writes it."""
    if isinstance(kind, UnionType) or get_origin(kind) not in (None, tuple, Literal):
        kinds = [part for part in get_args(kind) if part is not NoneType]
        return object if any(get_origin(part) is tuple for part in kinds) else _flag_type(kinds[0])
    if get_origin(kind) is Literal:
        return type(get_args(kind)[0])
    return get_origin(kind) or {Any: str}.get(kind, kind)


def given_options(section: ConfigDict) -> dict[str, Any]:
    """The options of a network's section that are set."""
    fields = {name: section[name] for name in section if name not in _NO_OPTION and section[name] is not None}
    return {name: None if value == "none" else value for name, value in fields.items()}


def main(stages: list[str]) -> None:
    """Prints the settings of the named stages, or of all: default, meaning, possible values."""
    if unknown := set(stages) - set(STAGES):
        sys.exit(f"error: there is no stage {unknown.pop()!r}: choose from {', '.join(STAGES)}")
    for name, setting in {n: x for stage in stages or STAGES for n, x in settings(stage).items()}.items():
        value = "none" if isinstance(setting.default, type) else repr(setting.default)
        rule = f" ({setting.rule.words})" if setting.rule.words else ""
        print(f"config.{name} = {value}\n    {setting.meaning}{rule}")
    print(
        f"config.NETWORK.name, .{', .'.join(_NO_OPTION[1:])} and the options of that network, for {', '.join(STAGES)}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
