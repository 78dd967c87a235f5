"""The networks by name: `create_model("vim_tiny_stride8", num_classes=200)`.

One module per family, from general to special: layers, positions, scan_order and mamba are parts; isotropic is the
trunk of vim, local_vim and v2m, hierarchical that of vmamba, vmamba2, local_vmamba and efficient_vmamba; srresnet
restores images; srvm is a classifier behind it, the student of ViMD. A family lists its names in `MODELS`, and registry
makes networks of these names.
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
