"""The base class of every registered network, a Flax module whose dataclass fields are its options, and of composites.

The fields are the only place where an option is declared. Configs, `--option`, `create_model`, the checks and their
messages all derive from them.
"""

import dataclasses
from collections.abc import Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
import typeguard
from flax import linen as nn
from flax.traverse_util import flatten_dict

from vimd_jax.models.layers import portable

# Options of how a network is computed. The others define the network, and are saved in a checkpoint.
COMPUTATION = ("dtype", "remat", "bn_axis_name", "drop_path_rate")


class Network(nn.Module):
    """A module whose options are checked when it is created.

    Attributes:
      num_classes: number of scores for each image; 0 for none.
      image_size: side, or (height, width), in pixels of the images that it is meant for; None if any size will do.
      grid: (rows, columns) of patches that its position table is made for; None if it has none.
      class_token: position of its class tokens among the patches; None if it has none.
      scale: factor by which it enlarges images before, or instead of, reading them.
      dense: whether it scores every pixel, by a method `segment`, rather than the image.

    Raises:
      ValueError: an option has a wrong type or value; the message starts with the option's name.
    """

    # Defaults for networks without a field or property of that name.
    num_classes = 0
    image_size = None
    grid = None
    class_token = None
    scale = 1
    dense = False

    def __post_init__(self):
        if hasattr(self, "dtype"):
            self.dtype = _floating_point(self.dtype)
        super().__post_init__()
        for option, kind in options_of(type(self)).items():
            _check(option, getattr(self, option), kind)

    @property
    def parts(self) -> dict[str, "Network"]:
        """The networks that a composite is made of, by the name of their sub-tree of variables; empty for others."""
        fields = {name: getattr(self, name) for name in options_of(type(self))}
        return {name: value for name, value in fields.items() if isinstance(value, Network)}

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) in pixels of valid images for `init`."""
        return square(self.image_size or 16)

    @classmethod
    def option_types(cls, chosen: dict[str, Any]) -> dict[str, Any]:
        """Name → type of the options of `from_options`; for some networks they depend on the options chosen."""
        return options_of(cls)

    @classmethod
    def from_options(cls, **options: Any) -> "Network":
        """The network with these options."""
        return cls(**options)

    def to_options(self) -> dict[str, Any]:
        """The options, except `COMPUTATION`, with which `from_options` recreates this network; values for JSON."""
        return {option: getattr(self, option) for option in options_of(type(self)) if option not in COMPUTATION}

    @staticmethod
    def decays(path: tuple[str, ...]) -> bool:
        """True if weight decay applies to the parameter at this path, as in the authors' training.

        Vim's rule: kernels and state matrices decay; biases, scales, D, class tokens and positions do not.
        """
        return path[-1].endswith("kernel") or path[-1].startswith("A_log")


class Composite(Network):
    """A network made of networks: each is a field, and its variables are the sub-tree of that field's name."""

    def decays(self, path: tuple[str, ...]) -> bool:
        """See `Network`; each part follows its own rule."""
        return self.parts[path[0]].decays(path[1:])


def join(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The variables of a composite from those of its parts, by name."""
    collections = sorted({collection for variables in parts.values() for collection in variables})
    return {
        collection: {name: variables[collection] for name, variables in parts.items() if collection in variables}
        for collection in collections
    }


def part(variables: dict[str, Any], name: str) -> dict[str, Any]:
    """The variables of one part of a composite."""
    return {collection: tree[name] for collection, tree in variables.items() if name in tree}


def options_of(network: type) -> dict[str, Any]:
    """Name → type of the options of a class of networks."""
    return {f.name: f.type for f in dataclasses.fields(network) if f.init and f.name not in ("parent", "name")}


def _check(option: str, value: Any, kind: Any) -> None:
    try:
        typeguard.check_type(value, kind)
        fits = not isinstance(value, bool) or kind in (bool, Any)  # Python counts True as an integer
    except typeguard.TypeCheckError:
        fits = False
    if not fits:
        raise ValueError(f"{option}: {value!r} is not valid, expected {_in_words(kind)}")
    least = 0 if option == "num_classes" else 1
    if isinstance(value, int) and int in (kind, *get_args(kind)) and value < least:
        raise ValueError(f"{option}: {value} is not valid, expected at least {least}")
    if option == "drop_path_rate" and not 0 <= value < 1:
        raise ValueError(f"drop_path_rate: {value} is not valid, expected a probability from 0 to below 1")


def _in_words(kind: Any) -> str:
    """A type as a message names it: "int", "'mean' or 'sum'", "int or tuple[int, int]"."""
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return " or ".join(map(_in_words, get_args(kind)))
    if kind in (None, type(None)):
        return "None"
    return kind.__name__ if type(kind) is type else str(kind)


def _floating_point(dtype: Any) -> np.dtype:
    try:
        dtype, given = jnp.dtype(dtype), dtype
    except TypeError:
        given = dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype: {given!r} is not supported, expected float32 or bfloat16")
    return dtype


def from_plain(value: Any) -> Any:
    """An option's value from JSON, a config or a command line: tuples for lists, Python's numbers for NumPy's."""
    if isinstance(value, tuple | list):
        return tuple(from_plain(part) for part in value)
    return value.item() if isinstance(value, np.generic) else value


def check_layers(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The numbers of the chosen layers, of all for None; ValueError if there are none or one is not below `count`."""
    layers = tuple(range(count)) if layers is None else tuple(layers)
    if not layers or not set(layers) <= set(range(count)):
        raise ValueError(f"layers: {layers} is not valid, expected numbers from 0 to {count - 1}")
    return layers


def input_images(model: Network) -> jax.ShapeDtypeStruct:
    """A batch of one image as `model.init` expects it."""
    return jax.ShapeDtypeStruct((1, *model.input_size, 3), jnp.float32)


def variable_shapes(model: Network) -> dict[str, jax.ShapeDtypeStruct]:
    """Path → shape and dtype of every leaf of `model.init`, computed without running the model."""
    with portable(True):  # the shortest to trace; the variables are the same
        return flatten_dict(jax.eval_shape(lambda x: model.init(jax.random.key(0), x), input_images(model)), sep="/")


def square(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width), from a side or from such a pair."""
    return (size, size) if isinstance(size, int) else tuple(size)
