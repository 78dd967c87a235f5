"""The two recipes of ViMD, shared by teacher_*.py and student_*.py.

"paper" (default) is the method as the paper describes it; "released" is exactly the authors' public script. They differ
more than their names suggest:

                        paper                                       released
    logits              KL divergence, T = 4, weight 1              none (the line is commented out)
    hidden states       all layers, tokens scaled to unit length,   last layer only (a loop overwrites its sum), tokens
                        weight 20                                   not scaled, weight 5
    learning rate       warm-up, then cosine decay; the peak is     1.6e-8 after batch scaling, below its own floor of
                        our choice, since the paper's is not known  1e-5: it falls for 5 epochs, then rises to the end
    images              every image once per epoch                  a third of them, each three times in a row
    best checkpoint     chosen on 10 % of the training images       chosen on the test images
    both                the student is a frozen SRResNet x4, then Vim-tiny (stride 8, 224 pixels); the teacher is the
                        same Vim on the original images; batch 16, 250 epochs, AdamW, label smoothing 0.1, weight
                        decay 1e-8, no clipping, float32

The authors' logs call the released script an ablation arm ("KD0.0"); on Stanford Dogs it is as good as the full method.
"""

from ml_collections import ConfigDict

from vimd_jax.config import default_config


def student(recipe: str, dataset: str = "folder") -> ConfigDict:
    """SRVM-Net by the recipe "paper" or "released"."""
    config = default_config("student")
    config.dataset.name = dataset
    if recipe == "released":
        config.loss.logits_weight = 0.0
        config.loss.hidden_weight = 5.0
        config.loss.hidden_layers = "last"
        config.loss.hidden_normalize = False
        config.schedule.name = "timm_epoch"
        config.schedule.learning_rate = 5e-7 * 16 / 512
        config.schedule.min_learning_rate = 1e-5
        config.schedule.warmup_learning_rate = 1e-5
        config.dataset.repeats = 3
        config.dataset.validation_fraction = 0.0
        config.selection = "test"
    elif recipe != "paper":
        raise ValueError(f'The recipe is {recipe!r}: choose "paper" or "released".')
    return config


def teacher(recipe: str, dataset: str = "folder") -> ConfigDict:
    """HRVM-Net by the recipe "paper" or "logged".

    The released teacher script cannot start (it imports a class that does not exist). "logged" is the recipe in the
    authors' logs of the teacher that reached 84.47 % on CUB: 300 epochs with RandAugment, mixup, cutmix and random
    erasing.
    """
    config = default_config("teacher")
    config.dataset.name = dataset
    if recipe == "logged":
        config.dataset.augment.rand_augment = "rand-m9-mstd0.5-inc1"
        config.dataset.augment.erasing_probability = 0.25
        config.dataset.repeats = 3
        config.dataset.validation_fraction = 0.0
        config.selection = "test"
        config.mixing.mixup_alpha = 0.8
        config.mixing.cutmix_alpha = 1.0
        config.schedule.name = "timm_epoch"
        config.schedule.learning_rate = 5e-6
        config.schedule.reference_batch_size = 512
        config.schedule.min_learning_rate = 1e-5
        config.schedule.warmup_learning_rate = 1e-5
        config.schedule.num_epochs = 300
    elif recipe != "paper":
        raise ValueError(f'The recipe is {recipe!r}: choose "paper" or "logged".')
    return config
