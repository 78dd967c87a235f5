"""The networks by name: `create_model("vim_tiny_stride8", num_classes=200)`.

One module per family, from general to special: layers, positions, scan_order and mamba are parts; isotropic is the
trunk of vim, local_vim and v2m, hierarchical that of vmamba, vmamba2, local_vmamba and efficient_vmamba; srresnet
restores images; srvm is a classifier behind it, the student of ViMD. A family lists its names in `MODELS`.
"""

import difflib
import fnmatch
import inspect
from functools import partial
from typing import Any, Literal

from flax import linen as nn

from vimd_jax.models import efficient_vmamba, local_vim, local_vmamba, srresnet, v2m, vim, vmamba, vmamba2
from vimd_jax.models.network import COMPUTATION, from_plain, options_of
from vimd_jax.models.srresnet import SRResNet
from vimd_jax.models.srvm import SRVM

_ISOTROPIC = vim.MODELS | local_vim.MODELS | v2m.MODELS
_HIERARCHICAL = vmamba.MODELS | vmamba2.MODELS | local_vmamba.MODELS | efficient_vmamba.MODELS
CLASSIFIERS = _ISOTROPIC | _HIERARCHICAL
SR_NETWORKS = srresnet.MODELS


def _srvm(
    sr: Literal["srresnet", "bicubic"] = "srresnet",
    scale: int = 4,
    sr_channels: int = 64,
    sr_num_blocks: int = 16,
    classifier: str = "vim_tiny_stride8",
    **options: Any,
) -> SRVM:
    if sr not in ("srresnet", "bicubic"):
        raise ValueError(f'sr: {sr!r} is not valid, expected "srresnet" or "bicubic"')
    if classifier not in CLASSIFIERS:
        raise ValueError(f"classifier: {classifier!r} is not a classifier, choose one of {', '.join(CLASSIFIERS)}")
    network = SRResNet(scale, sr_channels, sr_num_blocks) if sr == "srresnet" else None
    return SRVM(sr=network, classifier=create_model(classifier, **options))


MODELS = CLASSIFIERS | SR_NETWORKS | {"srvm_tiny": _srvm}


def create_model(name: str, **options: Any) -> nn.Module:
    """The network of that name, as a Flax Linen module.

    Args:
      name: one of `list_models()`.
      **options: fields of the module that differ from the name's defaults. For srvm_* those of its classifier, the
        classifier's name, and sr ("srresnet" or "bicubic"), scale, sr_channels, sr_num_blocks.

    Raises:
      ValueError: no such network or option, or a value that is not valid; one line that says what is.
    """
    allowed = model_options(name, classifier=options.get("classifier", "vim_tiny_stride8"))
    for option in options:
        if option not in allowed:
            raise ValueError(f"{option}: {name} has no such option, choose from {', '.join(sorted(allowed))}")
    return MODELS[name](**{option: from_plain(value) for option, value in options.items()})


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` knows and that match a shell pattern such as "vim_*", sorted."""
    return sorted(fnmatch.filter(MODELS, pattern))


def model_options(name: str, classifier: str = "vim_tiny_stride8") -> dict[str, Any]:
    """Name → type of the options of a network; of srvm_* with that classifier."""
    if name not in MODELS:
        close = difflib.get_close_matches(str(name), MODELS, n=3) or list_models()
        raise ValueError(f"name: there is no network {name!r}, did you mean {' or '.join(close)}?")
    if MODELS[name] is not _srvm:
        return options_of(_class_of(MODELS[name]))
    classifier = classifier if classifier in CLASSIFIERS else "vim_tiny_stride8"  # an error when it is made
    parameters = inspect.signature(_srvm).parameters
    own = {option: parameters[option].annotation for option in parameters if option != "options"}
    return own | model_options(classifier)


def describe(model: nn.Module) -> dict[str, Any]:
    """What a network is: {"architecture": its name, "options": every option that decides a number}, fit for JSON.

    `create_model(architecture, **options)` makes it again. Left out is how it is computed (`network.COMPUTATION`).
    """
    if isinstance(model, SRVM):
        inner, sr = describe(model.classifier), model.sr
        own = {"sr": "bicubic"}
        if sr is not None:
            own = {"sr": "srresnet", "scale": sr.scale, "sr_channels": sr.channels, "sr_num_blocks": sr.num_blocks}
        options = own | {"classifier": inner["architecture"]} | inner["options"]
        return {"architecture": "srvm_tiny", "options": options}
    options = {option: getattr(model, option) for option in options_of(type(model)) if option not in COMPUTATION}

    def differing(name: str) -> int:
        defaults = getattr(MODELS[name], "keywords", {})
        return sum(options[option] != value for option, value in defaults.items()) - len(defaults)

    names = [name for name, builder in MODELS.items() if _class_of(builder) is type(model)]
    return {"architecture": min(names, key=differing), "options": options}


def _class_of(builder: Any) -> Any:
    return builder.func if isinstance(builder, partial) else builder
