"""Every setting of a run, with its default and its meaning. The files in configs/ start from these and change a few.

The configs are `ml_collections.ConfigDict`s: a misspelt field or a value of the wrong type is an error, and every field
can be changed on the command line, as in `--config.schedule.num_epochs=10`.
"""

from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

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

# What the numbers of a run may be. Those of a dataset, a batch or a network are checked where these are made.
_RANGES = {
    "at least 1": (lambda x: x >= 1, ("eval_every_epochs", "log_every_steps", "checkpoint_every_steps")),
    "at least 0": (
        lambda x: x >= 0,
        (
            *("seed", "optimizer.weight_decay", "loss.logits_weight", "loss.hidden_weight"),
            *("mixing.mixup_alpha", "mixing.cutmix_alpha"),
            *("schedule.learning_rate", "schedule.min_learning_rate", "schedule.warmup_learning_rate"),
        ),
    ),
    "at least 0 and below 1": (
        lambda x: 0 <= x < 1,
        ("ema_decay", "loss.label_smoothing", "loss.target_threshold", "optimizer.b1", "optimizer.b2"),
    ),
    "from 0 to 1": (lambda x: 0 <= x <= 1, ("mixing.probability", "mixing.switch_probability")),
    "above 0": (lambda x: x > 0, ("loss.temperature", "optimizer.eps", "optimizer.clip_norm")),
}

# Fields that may differ between a run and its continuation, because they change no number of the run.
CHANGEABLE = ("dataset.num_workers", "log_every_steps", "checkpoint_every_steps", "eval_batch_size")


def default_config(stage: str) -> ConfigDict:
    """The settings of one training stage, see `STAGES`.

    The defaults are the recipe of the ViMD paper (Chen et al., IEEE SPL 2025) for 56x56 images, where the paper and
    the authors' logs state it.
    """
    if stage not in STAGES:
        raise ValueError(f"config.stage is {stage!r}: choose one of {', '.join(STAGES)}.")
    config = ConfigDict()
    config.stage = stage
    config.seed = 0
    config.batch_size = 16  # images a step, over all devices and hosts
    config.eval_batch_size = 64
    config.dataset = _dataset()
    for role in STAGES[stage]:
        config[role] = _network(role)
    config.loss = _loss(stage)
    config.mixing = _mixing(stage)
    config.optimizer = _optimizer()
    config.schedule = _schedule()
    config.ema_decay = 0.0  # > 0 keeps an exponential moving average of the weights, evaluates it and saves it as best
    config.selection = "validation"  # what picks the best checkpoint: "validation", or "test" (the published habit)
    config.eval_every_epochs = 1
    config.log_every_steps = 50
    config.checkpoint_every_steps = 500  # a checkpoint is also written after every evaluation
    return config.lock()


def _dataset() -> ConfigDict:
    return ConfigDict(
        {
            "name": "folder",  # or "synthetic", cub, cars, dogs, pets, flowers, mit67, action, aircraft, imagenet
            "directory": "",  # contains train|val|test/<class>/*.jpg; empty: read through TFDS, if TFDS has the dataset
            "num_classes": 0,  # 0: as many as the data has; otherwise checked
            "high_resolution": 224,  # pixels, what a classifier sees and a teacher teaches
            "low_resolution": 56,  # pixels, what a student sees
            "validation_fraction": 0.1,  # of the training images, held out (if the folder has no val/ of its own)
            "crop_scale": (0.08, 1.0),  # share of the image's area that a random-resized crop takes
            "flip": True,
            "augment": {
                "rand_augment": "",  # in timm's notation, as "rand-m9-mstd0.5-inc1"; empty: off
                "three_augment": False,  # greyscale, solarisation or blur, as in DeiT III
                "color_jitter": 0.0,  # largest relative change of brightness, contrast and saturation; 0: off
                "erasing_probability": 0.0,  # of random erasing
                "erasing_mode": "pixel",  # fills the box: "pixel" noise, a random colour "rand", the mean "const"
                "erasing_count": 1,  # largest number of boxes
            },
            "eval_crop": 1.0,  # share of the image's short side that the evaluation view keeps
            "repeats": 1,  # times each image is drawn in a row; 3 is the published repeated augmentation
            "on_error": "stop",  # an unreadable image: "stop", or "skip" and count
            "reduced_decoding": False,  # decode a JPEG at 1/2, 1/4 or 1/8 scale where the training crop is that large
            "num_workers": 0,  # input processes; 0: a thread of the training process
            "synthetic_classes": 8,
            "synthetic_train_size": 2000,
            "synthetic_test_size": 500,
        }
    )


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


def check_ranges(config: ConfigDict) -> None:
    """Raises ValueError, naming the field, if a number of a stage is none that a run can have."""
    for words, (fits, fields) in _RANGES.items():
        for field in fields:
            section, _, name = field.rpartition(".")
            value = (config[section] if section else config).get(name)
            if value is not None and not fits(value):
                raise ValueError(f"config.{field} is {value}: it must be {words}.")


def given_options(section: ConfigDict) -> dict[str, Any]:
    """The options of a network's section that are set."""
    fields = {name: section[name] for name in section if name not in ("name", "init") and section[name] is not None}
    return {name: None if value == "none" else value for name, value in fields.items()}


def _loss(stage: str) -> ConfigDict:
    if stage == "sr":
        return ConfigDict()
    labels = {
        "label_loss": "cross_entropy",  # or "binary_cross_entropy": every class a yes or no of its own, as in DeiT III
        "label_smoothing": 0.1,
        "target_threshold": config_dict.placeholder(float),  # of binary_cross_entropy: labels above it count as 1
    }
    if stage != "student":
        return ConfigDict(labels)
    return ConfigDict(
        {
            **labels,
            "logits_weight": 1.0,  # alpha of the paper; 0 switches the term off
            "temperature": 4.0,
            "hidden_weight": 20.0,  # beta of the paper; 0 switches the term off
            "hidden_layers": "all",  # or "last", or layer numbers as in "5,11,23"
            "hidden_normalize": True,  # scale each token to unit length first
        }
    )


def _mixing(stage: str) -> ConfigDict:
    if stage == "sr":
        return ConfigDict()
    return ConfigDict(
        {
            "mixup_alpha": 0.0,  # > 0: mixup, its weights from Beta(alpha, alpha)
            "cutmix_alpha": 0.0,  # > 0: cutmix, likewise
            "probability": 1.0,  # share of the batches that are mixed
            "switch_probability": 0.5,  # share of these that cutmix gets where both are on
        }
    )


def _optimizer() -> ConfigDict:
    return ConfigDict(
        {
            "weight_decay": 1e-8,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "clip_norm": config_dict.placeholder(float),  # None: gradients are not clipped
            "decay_state_matrix": True,  # A_log is decayed, as published
        }
    )


def _schedule() -> ConfigDict:
    return ConfigDict(
        {
            "name": "cosine",  # or "timm_epoch", the originals' schedule with its one-epoch lag
            "learning_rate": 5e-5,
            "min_learning_rate": 1e-6,
            "warmup_learning_rate": 1e-6,
            "warmup_epochs": 5,
            "num_epochs": 250,
        }
    )
