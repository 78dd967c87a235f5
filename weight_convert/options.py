"""Which network a PyTorch file is for: options from a command line, and the number of classes from its head."""

import argparse
import ast
from typing import Any

from flax import linen as nn

from vimd_jax.models import create_model


def parse_option(text: str) -> tuple[str, Any]:
    """`NAME=VALUE` of a command line, VALUE as Python writes it or else a string, as a type for argparse."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def create_model_for(
    state_dict: dict[str, Any], name: str, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of that name and its options: those given and, unless they say, as many classes as the head has.

    Args:
      state_dict: as `load_torch_checkpoint` returns it.
      name: one of `vimd_jax.models.list_models()`.
      options: fields of the network.

    Raises:
      ValueError: no such network, option or value.
    """
    model = create_model(name, **options)
    bias = state_dict.get("head.bias", state_dict.get("classifier.head.bias"))
    counts = hasattr(getattr(model, "classifier", model), "num_classes")
    if bias is None or not counts or "num_classes" in options:
        return model, options
    options = options | {"num_classes": bias.size}
    return create_model(name, **options), options
