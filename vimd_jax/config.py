"""Every setting of a run, with its default and its meaning. The files in configs/ start from these and change a few.

The configs are `ml_collections.ConfigDict`s: a misspelt field or a value of the wrong type is an error, and every field
can be changed on the command line, as in `--config.schedule.num_epochs=10`.
"""

from ml_collections import ConfigDict, config_dict

STAGES = ("sr", "teacher", "student")

# Fields that may differ between a run and its continuation, because they change no number of the run.
CHANGEABLE = ("dataset.num_workers", "log_every_steps", "checkpoint_every_steps", "eval_batch_size")


def default_config(stage: str) -> ConfigDict:
    """The settings of one training stage: "sr", "teacher" or "student".

    The defaults are the recipe of the ViMD paper (Chen et al., IEEE SPL 2025) for 56x56 pictures, where the paper and
    the authors' logs tell it.
    """
    if stage not in STAGES:
        raise ValueError(f"config.stage is {stage!r}: choose one of {', '.join(STAGES)}.")
    config = ConfigDict()
    config.stage = stage
    config.seed = 0
    config.batch_size = 16  # pictures a step, over all devices and hosts
    config.eval_batch_size = 64
    config.dataset = _dataset()
    config.sr = _super_resolution()
    config.teacher = _classifier()  # HRVM-Net: trained in stage "teacher", frozen in stage "student"
    config.student = _classifier()  # the classifier half of SRVM-Net
    config.loss = _loss()
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
            "name": "folder",  # "folder", "synthetic", or cub, cars, dogs, pets, flowers, mit67, action, aircraft
            "directory": "",  # holds train|val|test/<class>/*.jpg; empty: read through TFDS, where TFDS has the dataset
            "num_classes": 0,  # 0: as many as the data has; otherwise checked
            "high_resolution": 224,  # pixels, what the teacher sees
            "low_resolution": 56,  # pixels, what the student sees
            "validation_fraction": 0.1,  # of the training pictures, held out (where the folder has no val/ of its own)
            "crop_scale": (0.08, 1.0),  # share of the picture's area that a random-resized crop takes
            "flip": True,
            "eval_crop": 1.0,  # share of the picture's short side that the evaluation view keeps
            "repeats": 1,  # times each picture is drawn in a row; 3 is the published repeated augmentation
            "on_error": "stop",  # an unreadable picture: "stop", or "skip" and count
            "num_workers": 0,  # input processes; 0: a thread of the training process
            "synthetic_classes": 8,
            "synthetic_train_size": 2000,
            "synthetic_test_size": 500,
        }
    )


def _super_resolution() -> ConfigDict:
    return ConfigDict(
        {
            "name": "srresnet_x4",  # or srresnet_x2, srresnet_x8, or "bicubic": no network
            "channels": 64,
            "num_blocks": 16,
            "init": "",  # a workdir, a converted checkpoint, or a .pth / .safetensors file
        }
    )


def _classifier() -> ConfigDict:
    """A Vim: see `vimd_jax.models.vim.Vim`. Fields left at None keep the value of the named variant; "none" is None."""
    return ConfigDict(
        {
            "name": "vim_tiny_stride8",
            "init": "",  # a workdir, a converted checkpoint, or a .pth / .safetensors file; empty: from scratch
            "embed_dim": config_dict.placeholder(int),
            "depth": config_dict.placeholder(int),
            "patch_size": config_dict.placeholder(int),
            "stride": config_dict.placeholder(int),
            "state_size": config_dict.placeholder(int),
            "class_token": config_dict.placeholder(str),
            "pool": config_dict.placeholder(str),
            "merge": config_dict.placeholder(str),
            "bimamba_type": config_dict.placeholder(str),
            "norm": config_dict.placeholder(str),
            "layer_scale": config_dict.placeholder(float),
            "rope": config_dict.placeholder(bool),
            "paired_layers": config_dict.placeholder(bool),
            "flip_tokens": config_dict.placeholder(bool),
            "drop_path_rate": 0.0,
            "input_normalization": False,  # subtract ImageNet's mean and divide by its deviation first
            "dtype": "float32",  # of the matrix products: "bfloat16" halves memory; weights and scan stay float32
            "remat": False,  # recompute activations in the backward pass: less memory, more time
        }
    )


def _loss() -> ConfigDict:
    return ConfigDict(
        {
            "label_smoothing": 0.1,
            "logits_weight": 1.0,  # alpha of the paper; 0 switches the term off
            "temperature": 4.0,
            "hidden_weight": 20.0,  # beta of the paper; 0 switches the term off
            "hidden_layers": "all",  # or "last", or layer numbers as in "5,11,23"
            "hidden_normalize": True,  # scale each token to unit length first
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
