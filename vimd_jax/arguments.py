"""Arguments of a command line that several programs take; types for argparse."""

import argparse
import ast
from pathlib import Path
from typing import Any


def parse_option(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`, an option of a network: VALUE as Python writes it, or else a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def parse_path(text: str) -> Path:
    """A path, whose `~` is the home directory: no shell expands it in `--output=~/x`."""
    return Path(text).expanduser()
