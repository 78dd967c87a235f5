"""The networks by name: `create_model("vim_tiny_stride8", num_classes=200)`.

One module per family, from general to special: layers, positions, scan_order and mamba are building blocks; isotropic
is the trunk of vim, local_vim and v2m, hierarchical that of vmamba, vmamba2, local_vmamba, efficient_vmamba; srresnet
restores images; srvm is srresnet followed by a classifier, the student of ViMD; segmenter predicts label maps from a
classifier's trunk, with necks and heads. A family lists its names in `MODELS`; registry creates networks by name.
"""

from vimd_jax.models import segmenter, srvm
from vimd_jax.models.registry import (
    CLASSIFIERS,
    MODELS,
    SR_NETWORKS,
    create_model,
    describe,
    list_models,
    model_options,
)

SEGMENTERS = segmenter.MODELS
MODELS.update(srvm.MODELS | SEGMENTERS)

__all__ = [
    "CLASSIFIERS",
    "MODELS",
    "SEGMENTERS",
    "SR_NETWORKS",
    "create_model",
    "describe",
    "list_models",
    "model_options",
]
