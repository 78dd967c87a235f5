"""The networks by name, as `vimd_jax.models` offers them.

Composites create their parts by name, so their modules import this one; `vimd_jax.models` adds them to `MODELS`.
"""

import difflib
import fnmatch
from collections.abc import Callable
from functools import partial
from typing import Any

from vimd_jax.models import efficient_vmamba, local_vim, local_vmamba, srresnet, v2m, vim, vmamba, vmamba2
from vimd_jax.models.network import Network, from_plain
from vimd_jax.models.published import PUBLISHED

_ISOTROPIC = vim.MODELS | local_vim.MODELS | v2m.MODELS
_HIERARCHICAL = vmamba.MODELS | vmamba2.MODELS | local_vmamba.MODELS | efficient_vmamba.MODELS
CLASSIFIERS = _ISOTROPIC | _HIERARCHICAL
SR_NETWORKS = srresnet.MODELS

# Name → a class of networks, or such a class with the options that the name stands for.
MODELS: dict[str, Callable[..., Network]] = CLASSIFIERS | SR_NETWORKS


def create_model(name: str, **options: Any) -> Network:
    """The network of that name, as a Flax Linen module.

    Args:
      name: one of `list_models()`.
      **options: fields of the module that differ from the name's defaults. For srvm_*: those of its classifier, the
        classifier's name, and sr ("srresnet" or "bicubic"), scale, sr_channels, sr_num_blocks. For upernet_*: those of
        its backbone and of `Segmenter.from_options`.

    Raises:
      ValueError: no such network or option, or an invalid value; the message, one line, names the valid ones.
    """
    allowed = model_options(name, **options)
    for option in options:
        if option not in allowed:
            raise ValueError(f"{option}: {name} has no such option, choose from {', '.join(sorted(allowed))}")
    kind, defaults = _kind_and_defaults(name)
    return kind.from_options(**defaults | {option: from_plain(value) for option, value in options.items()})


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """The names that `create_model` knows and that match a shell pattern such as "vim_*", sorted.

    Args:
      pattern: of the names.
      pretrained: only those with published weights, `load_model("pretrained:<name>")`.
    """
    names = sorted(fnmatch.filter(MODELS, pattern))
    return [name for name in names if name in PUBLISHED and PUBLISHED[name].file] if pretrained else names


def model_options(name: str, **chosen: Any) -> dict[str, Any]:
    """Name → type of the options of a network; those of a composite depend on which parts are chosen."""
    if name not in MODELS:
        close = difflib.get_close_matches(str(name), MODELS, n=3) or list_models()
        raise ValueError(f"name: there is no network {name!r}, did you mean {' or '.join(close)}?")
    kind, defaults = _kind_and_defaults(name)
    return kind.option_types(defaults | chosen)


def describe(model: Network) -> dict[str, Any]:
    """Describes a network for JSON: {"architecture": its name, "options": every option that changes a result}.

    `create_model(architecture, **options)` recreates it. Options of `network.COMPUTATION` are left out.
    """
    options = model.to_options()

    def differing(name: str) -> int:
        defaults = _kind_and_defaults(name)[1]
        same = (option in options and options[option] == value for option, value in defaults.items())
        return -sum(same)

    names = [name for name in MODELS if _kind_and_defaults(name)[0] is type(model)]
    return {"architecture": min(names, key=differing), "options": options}


def _kind_and_defaults(name: str) -> tuple[type[Network], dict[str, Any]]:
    builder = MODELS[name]
    return (builder.func, builder.keywords) if isinstance(builder, partial) else (builder, {})
