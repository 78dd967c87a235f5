"""Every setting of a run, with its default, what it may be, and its meaning. The files in configs/ change a few.

The configs are `ml_collections.ConfigDict`s: a misspelt field or a value of the wrong type is an error, and every field
can be changed on the command line, as in `--config.schedule.num_epochs=10`. `python -m vimd_jax.config` lists them.
"""

import functools
import math
import sys
from collections.abc import Callable
from operator import getitem
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from ml_collections import ConfigDict, config_dict

from vimd_jax.models import CLASSIFIERS, SR_NETWORKS, model_options

# The stages of training, and the networks that each one has a section for.
STAGES = {
    "sr": ("sr",),  # a super-resolution network, on images
    "classifier": ("classifier",),  # any classifier, on labels
    "teacher": ("teacher",),  # the same, as HRVM-Net of ViMD
    "student": ("sr", "teacher", "student"),  # the classifier of SRVM-Net, on labels and what the teacher makes of them
}

# Options that a run derives from its other settings.
DERIVED = ("num_classes", "image_size", "scale", "bn_axis_name")


class Rule(NamedTuple):
    """What a setting may be: in words, and as a test."""

    words: str
    fits: Callable[[Any], bool]


def _at_least(low: int) -> Rule:
    return Rule(f"at least {low}", lambda x: x >= low)


def _one_of(*choices: str) -> Rule:
    return Rule(" or ".join(choices), lambda x: x in choices)


_ANY = Rule("", lambda x: True)
_ABOVE_0 = Rule("above 0", lambda x: x > 0)
_BELOW_1 = Rule("at least 0 and below 1", lambda x: 0 <= x < 1)
_SHARE_OR_0 = Rule("from 0 to 1", lambda x: 0 <= x <= 1)
_SHARE = Rule("above 0 and at most 1", lambda x: 0 < x <= 1)
_SHARES = Rule("two shares above 0 and at most 1, the smaller first", lambda x: len(x) == 2 and 0 < x[0] <= x[1] <= 1)


class Setting(NamedTuple):
    """One field of a config.

    Attributes:
      default: its value; a type stands for None, and is the type of other values.
      rule: what it may be.
      meaning: what it does.
      changeable: whether it may differ between a run and its continuation, because it changes no number of the run.
      stages: which stages have it.
    """

    default: Any
    rule: Rule
    meaning: str
    changeable: bool = False
    stages: tuple[str, ...] = tuple(STAGES)


_LABELLED = ("classifier", "teacher", "student")

# The defaults are the recipe of the ViMD paper (Chen et al., IEEE SPL 2025) for 56x56 images, where the paper and the
# authors' logs state it.
_SETTINGS = {
    "seed": Setting(
        0,
        Rule("from 0 to 4294967295", lambda x: 0 <= x < 2**32),
        "decides the initial weights, the order of the images and their augmentation",
    ),
    "batch_size": Setting(16, _at_least(1), "images a step, over all devices and hosts"),
    "accumulation_steps": Setting(
        1,
        _at_least(1),
        "parts that a device computes its share of a batch in, one after the other, to save memory; batch statistics "
        "are those of a part, and stochastic depth then depends on the number of devices",
    ),
    "eval_batch_size": Setting(64, _at_least(1), "the same in an evaluation", changeable=True),
    "ema_decay": Setting(
        0.0, _BELOW_1, "above 0 keeps an exponential moving average of all variables, evaluates and saves it"
    ),
    "selection": Setting(
        "validation", _one_of("validation", "test"), 'split that picks the best network; "test" is the published habit'
    ),
    "eval_every_epochs": Setting(1, _at_least(1), "epochs between evaluations"),
    "log_every_steps": Setting(50, _at_least(1), "steps between lines of the log", changeable=True),
    "checkpoint_every_steps": Setting(
        500, _at_least(1), "steps between checkpoints; every evaluation is followed by one too", changeable=True
    ),
    "dataset.name": Setting(
        "folder", _ANY, "folder, synthetic, cub, cars, dogs, pets, flowers, mit67, action, aircraft or imagenet"
    ),
    "dataset.directory": Setting(
        "",
        _ANY,
        "contains train|val|test/<class>/*.jpg; empty: read through TFDS, if TFDS has the dataset",
        changeable=True,
    ),
    "dataset.num_classes": Setting(0, _at_least(0), "0: as many as the data has; otherwise checked"),
    "dataset.high_resolution": Setting(224, _at_least(1), "pixels, what a classifier sees and a teacher teaches"),
    "dataset.low_resolution": Setting(56, _at_least(1), "pixels, what a student sees"),
    "dataset.validation_fraction": Setting(
        0.1, _BELOW_1, "of the training images, held out if the folder has no val/ of its own"
    ),
    "dataset.crop_scale": Setting((0.08, 1.0), _SHARES, "share of the image's area that a random-resized crop takes"),
    "dataset.flip": Setting(True, _ANY, "mirror half of the training images"),
    "dataset.augment.rand_augment": Setting(
        "",
        _ANY,
        'RandAugment in timm\'s notation, as "rand-m9-mstd0.5-inc1", or LocalMamba\'s, "local-m9-mstd0.5"; empty: off',
    ),
    "dataset.augment.three_augment": Setting(False, _ANY, "greyscale, solarisation or blur, as in DeiT III"),
    "dataset.augment.color_jitter": Setting(
        0.0, _at_least(0), "largest relative change of brightness, contrast and saturation"
    ),
    "dataset.augment.erasing_probability": Setting(0.0, _SHARE_OR_0, "of random erasing"),
    "dataset.augment.erasing_mode": Setting(
        "pixel", _one_of("pixel", "rand", "const"), 'filled with noise, a random colour "rand", or the mean "const"'
    ),
    "dataset.augment.erasing_count": Setting(1, _at_least(1), "largest number of boxes"),
    "dataset.reduced_decoding": Setting(
        False, _ANY, "decode a JPEG at 1/2, 1/4 or 1/8 scale where the training crop is that large"
    ),
    "dataset.eval_crop": Setting(1.0, _SHARE, "share of the image's short side that the evaluation view keeps"),
    "dataset.repeats": Setting(
        1, _at_least(1), "times each image is drawn in a row; 3 is the published repeated augmentation"
    ),
    "dataset.on_error": Setting(
        "stop", _one_of("stop", "skip"), 'an unreadable image: "stop", or "skip" and count', changeable=True
    ),
    "dataset.num_workers": Setting(
        0, _at_least(0), "input processes; 0: a thread of the training process", changeable=True
    ),
    "dataset.synthetic_classes": Setting(8, _at_least(1), "of the synthetic birds"),
    "dataset.synthetic_train_size": Setting(2000, _at_least(1), "training images of the synthetic birds"),
    "dataset.synthetic_test_size": Setting(500, _at_least(1), "test images of the synthetic birds"),
    "loss.label_loss": Setting(
        "cross_entropy",
        _one_of("cross_entropy", "binary_cross_entropy"),
        "the second makes every class a yes or no of its own, as in DeiT III",
        stages=_LABELLED,
    ),
    "loss.target_threshold": Setting(
        float, _BELOW_1, "of binary_cross_entropy: labels above it count as 1", stages=_LABELLED
    ),
    "mixing.mixup_alpha": Setting(
        0.0, _at_least(0), "above 0: mixup, its weights from Beta(alpha, alpha)", stages=_LABELLED
    ),
    "mixing.cutmix_alpha": Setting(0.0, _at_least(0), "above 0: cutmix, likewise", stages=_LABELLED),
    "mixing.probability": Setting(1.0, _SHARE_OR_0, "share of the batches that are mixed", stages=_LABELLED),
    "mixing.switch_probability": Setting(
        0.5, _SHARE_OR_0, "share of these that cutmix gets where both are on", stages=_LABELLED
    ),
    "mixing.group_size": Setting(
        0,
        _at_least(0),
        "images that are mixed by one draw, as the originals do for each GPU's share; 0: the whole batch",
        stages=_LABELLED,
    ),
    "loss.label_smoothing": Setting(0.1, _BELOW_1, "label mass spread over all classes", stages=_LABELLED),
    "loss.logits_weight": Setting(
        1.0, _at_least(0), "alpha of the paper; 0 switches the term off", stages=("student",)
    ),
    "loss.temperature": Setting(4.0, _ABOVE_0, "of the logits that are distilled", stages=("student",)),
    "loss.hidden_weight": Setting(
        20.0, _at_least(0), "beta of the paper; 0 switches the term off", stages=("student",)
    ),
    "loss.hidden_layers": Setting(
        "all", _ANY, 'layers that are distilled: "all", "last", or numbers as in "5,11,23"', stages=("student",)
    ),
    "loss.hidden_normalize": Setting(True, _ANY, "scale each token to unit length first", stages=("student",)),
    "loss.hidden_map": Setting(
        False,
        _ANY,
        "ours, not the paper's: a learned linear map from each layer of the student to the teacher's layer of the same "
        "relative depth, for networks of different shapes",
        stages=("student",),
    ),
    "optimizer.weight_decay": Setting(1e-8, _at_least(0), "of AdamW"),
    "optimizer.b1": Setting(0.9, _BELOW_1, "of AdamW"),
    "optimizer.b2": Setting(0.999, _BELOW_1, "of AdamW"),
    "optimizer.eps": Setting(1e-8, _ABOVE_0, "of AdamW"),
    "optimizer.clip_norm": Setting(float, _at_least(0), "largest global norm of the gradients; none or 0: any"),
    "optimizer.layer_decay": Setting(
        1.0, _SHARE, "factor of the learning rate from each layer to the one before it; 1: off"
    ),
    "optimizer.freeze": Setting(
        "", _ANY, 'regular expression of parameters that are not trained, as "^(patch_embed|position)"; empty: none'
    ),
    "optimizer.decay_state_matrix": Setting(True, _ANY, "weight decay shrinks A_log too, as published"),
    "schedule.name": Setting(
        "cosine",
        _one_of("cosine", "timm_epoch", "staircase"),
        "timm_epoch: Vim's with its one-epoch lag; staircase: LocalMamba's, whose warm-up rises once an epoch",
    ),
    "schedule.learning_rate": Setting(5e-5, _at_least(0), "at the peak"),
    "schedule.reference_batch_size": Setting(
        0, _at_least(0), "above 0: learning_rate is for this batch size, and multiplied by batch_size / it"
    ),
    "schedule.min_learning_rate": Setting(1e-6, _at_least(0), "at the end"),
    "schedule.warmup_learning_rate": Setting(1e-6, _at_least(0), "at the start"),
    "schedule.warmup_epochs": Setting(5, _at_least(0), "epochs until the peak"),
    "schedule.num_epochs": Setting(250, _at_least(1), "of the whole run"),
}


def settings(stage: str) -> dict[str, Setting]:
    """The settings of a stage by their dotted names, apart from the sections of its networks."""
    return {name: setting for name, setting in _SETTINGS.items() if stage in setting.stages}


def default_config(stage: str) -> ConfigDict:
    """The settings of one training stage, see `STAGES`, at their defaults."""
    if stage not in STAGES:
        raise ValueError(f"config.stage is {stage!r}: choose one of {', '.join(STAGES)}.")
    config = ConfigDict({"stage": stage, "loss": {}, "mixing": {}})
    for name, setting in settings(stage).items():
        *sections, field = name.split(".")
        section = config
        for part in sections:
            if part not in section:
                section[part] = {}
            section = section[part]
        default = setting.default
        section[field] = config_dict.placeholder(default) if isinstance(default, type) else default
    for role in STAGES[stage]:
        config[role] = _network(role)
    return config.lock()


def check_settings(config: ConfigDict) -> None:
    """Raises ValueError, naming the field, if a setting of a stage is not what it may be."""
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
    names = SR_NETWORKS if role == "sr" else CLASSIFIERS
    kinds = {
        option: kind
        for name in names
        for option, kind in model_options(name).items()
        if option not in DERIVED and kind is not None  # an option that can only be None
    }
    section = ConfigDict({option: config_dict.placeholder(_flag_type(kind)) for option, kind in sorted(kinds.items())})
    section.name = "srresnet_x4" if role == "sr" else "vim_tiny_stride8"  # for role "sr" also "bicubic": no network
    section.init = ""  # a workdir, a converted checkpoint, or a .pth / .safetensors file; empty: from scratch
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
    fields = {name: section[name] for name in section if name not in ("name", "init") and section[name] is not None}
    return {name: None if value == "none" else value for name, value in fields.items()}


def main(stages: list[str]) -> None:
    """Prints the settings of the named stages, or of all: default, what it may be, meaning."""
    if unknown := set(stages) - set(STAGES):
        sys.exit(f"error: there is no stage {unknown.pop()!r}: choose from {', '.join(STAGES)}")
    for name, (default, rule, meaning, _, used_by) in _SETTINGS.items():
        if set(stages or STAGES) & set(used_by):
            value = "none" if isinstance(default, type) else repr(default)
            print(f"config.{name} = {value}\n    {meaning}{f' ({rule.words})' if rule.words else ''}")
    print(
        "config.NETWORK.name, .init and the options of that network, NETWORK being classifier, teacher, student or sr"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
