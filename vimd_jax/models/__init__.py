"""The networks by name: `create_model("vim_tiny_stride8", num_classes=200)`.

One module per network: vim.py (the classifier), srresnet.py (super-resolution), srvm.py (one after the other, the
student of ViMD). A name is a builder with its defaults; another family is another few lines in `_BUILDERS`.
"""

import difflib
import fnmatch
import inspect
import numbers
from collections.abc import Callable
from functools import partial
from types import UnionType
from typing import Any, get_args, get_origin

from flax import linen as nn

from vimd_jax.models.srresnet import SRResNet
from vimd_jax.models.srvm import SRVM
from vimd_jax.models.vim import Vim


def _srvm(
    classifier: Callable[..., Vim],
    sr: str = "srresnet",
    scale: int = 4,
    sr_channels: int = 64,
    sr_num_blocks: int = 16,
    **overrides: Any,
) -> SRVM:
    """SRVM-Net; `sr` is "srresnet" or "bicubic", the other overrides are those of the classifier."""
    if sr not in ("srresnet", "bicubic"):
        raise ValueError(f'sr: {sr!r} is unknown, choose "srresnet" or "bicubic"')
    network = SRResNet(scale, sr_channels, sr_num_blocks) if sr == "srresnet" else None
    return SRVM(sr=network, classifier=classifier(**overrides))


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "vim_tiny": partial(Vim, embed_dim=192),
    "vim_tiny_stride8": partial(Vim, embed_dim=192, stride=8),
    "vim_small": partial(Vim, embed_dim=384),
    "vim_small_stride8": partial(Vim, embed_dim=384, stride=8),
    "vim_base": partial(Vim, embed_dim=768),
    "srresnet_x2": partial(SRResNet, scale=2),
    "srresnet_x4": partial(SRResNet, scale=4),
    "srresnet_x8": partial(SRResNet, scale=8),
    "srvm_tiny": partial(_srvm, partial(Vim, embed_dim=192, stride=8)),
}


def create_model(name: str, **overrides: Any) -> nn.Module:
    """The network of that name, as a Flax Linen module.

    Args:
      name: one of `list_models()`.
      **overrides: fields of the module that shall differ from the name's defaults; for srvm_* those of its classifier
        and sr ("srresnet" or "bicubic"), scale, sr_channels, sr_num_blocks.

    Raises:
      ValueError: no such network, override, or value.
    """
    if name not in _BUILDERS:
        close = difflib.get_close_matches(name, _BUILDERS, n=3) or list_models()
        raise ValueError(f"name: no network is called {name!r}, did you mean {' or '.join(close)}?")
    allowed = _overrides(_BUILDERS[name])
    for override, value in overrides.items():
        if override not in allowed:
            raise ValueError(f"{override}: {name} has no such option, choose from {', '.join(sorted(allowed))}")
        if not _fits(value, kind := allowed[override]):
            raise ValueError(f"{override}: {value!r} is no {kind.__name__ if isinstance(kind, type) else kind}")
    return _BUILDERS[name](**overrides)


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` knows and that match a shell pattern such as "vim_*", sorted."""
    return sorted(fnmatch.filter(_BUILDERS, pattern))


def _overrides(builder: Callable[..., nn.Module]) -> dict[str, Any]:
    """Name → annotation of what a builder takes."""
    kinds = {name: parameter.annotation for name, parameter in inspect.signature(builder).parameters.items()}
    if "overrides" in kinds:  # _srvm hands them to its classifier
        kinds = _overrides(builder.args[0]) | kinds
    return {name: kinds[name] for name in kinds if name not in {"parent", "name", "overrides", "classifier"}}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated kind; whole numbers are floats too, True and False are no numbers."""
    if isinstance(kind, UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        return isinstance(value, tuple | list) and len(value) == len(parts) and all(map(_fits, value, parts))
    if isinstance(value, bool):
        return kind in (bool, Any)
    return kind is Any or isinstance(value, {int: numbers.Integral, float: numbers.Real}.get(kind, kind))
