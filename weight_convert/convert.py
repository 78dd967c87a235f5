"""PyTorch checkpoint to a directory that training, evaluation and prediction load.

    python -m weight_convert.convert --model vim_tiny_stride8 --checkpoint vim_t_midclstok_ft_78p3acc.pth --output DIR
    python -m weight_convert.convert --model srresnet_x4 --checkpoint SRResNet_x4-ImageNet-6dd5216c.pth.tar --output DIR
    python -m weight_convert.convert --model srvm_tiny --checkpoint best_checkpoint.pth --output DIR \\
        --sr_checkpoint SRResNet_x4-ImageNet-6dd5216c.pth.tar

Every tensor of the file is used once and every variable of the model is filled once, or nothing is written.
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from vimd_jax.models import create_model
from weight_convert.checkpoint import checksum, file_sha256, save_converted
from weight_convert.finetune import FLEXIBLE, MODES, fit
from weight_convert.mapping import fill, flat_state_dict, plan, step_counters, variable_shapes
from weight_convert.torch_file import load_torch_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    flags = _parser().parse_args(arguments)
    try:
        _convert(flags)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m weight_convert.convert", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a name of vimd_jax.models.list_models()")
    parser.add_argument("--checkpoint", required=True, type=Path, help=".pth, .pth.tar or .safetensors")
    parser.add_argument(
        "--sr_checkpoint", type=Path, help="srvm_* only: its other half; --checkpoint is the classifier"
    )
    parser.add_argument("--output", type=Path, help="directory to write; must not exist")
    parser.add_argument("--num_classes", type=int, help="as in the checkpoint by default; otherwise the head is new")
    parser.add_argument("--image_size", type=_size, help="pixels, S or HEIGHTxWIDTH; resizes the position embedding")
    parser.add_argument(
        "--option", action="append", type=_option, default=[], metavar="NAME=VALUE", help="of the model"
    )
    parser.add_argument("--key", help='entry of the file, e.g. model_ema; default: "model" or "state_dict"')
    parser.add_argument("--position_mode", choices=MODES, default="correct", help="reference: resize as published")
    parser.add_argument("--dry_run", action="store_true", help="check and print, write nothing")
    return parser


def _size(text: str) -> int | tuple[int, int]:
    sides = tuple(int(side) for side in text.split("x"))
    return sides if len(sides) == 2 else int(text)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _convert(flags: argparse.Namespace) -> None:
    if flags.output is None and not flags.dry_run:
        raise ValueError("output: name the directory to write with --output, or only check with --dry_run")
    if flags.output is not None and flags.output.exists():
        raise ValueError(f"output: {flags.output} exists; name another directory or remove it")
    state_dict = load_torch_checkpoint(flags.checkpoint, key=flags.key)
    if flags.model.startswith("srvm") and "classifier.head.bias" not in state_dict:
        sr = {"sr": load_torch_checkpoint(flags.sr_checkpoint)} if flags.sr_checkpoint else {}
        state_dict = flat_state_dict({"classifier": state_dict} | sr)
    model, options = _create_model(flags, state_dict)
    leaves, changes = fit(fill(state_dict, model, FLEXIBLE), model, mode=flags.position_mode)
    variables = unflatten_dict(leaves, sep="/")
    counters = {name: state_dict[name].item() for name in step_counters(plan(model)) if name in state_dict}

    _print_table(model)
    print(f"{len(state_dict)} tensors read, each used once ({len(counters)} batch counters only noted)")
    for change in changes:
        print(change)
    print(f"{_parameter_count(leaves):,} parameters; checksum {checksum(variables)}")
    if flags.dry_run:
        print("dry run: nothing written")
        return
    files = [flags.checkpoint] + ([flags.sr_checkpoint] if flags.sr_checkpoint else [])
    provenance = {
        "library": f"vimd_jax {version('vimd-jax')}",
        "model": flags.model,
        "options": options,
        "sources": [{"file": file.name, "sha256": file_sha256(file)} for file in files],
        "key": flags.key,
        "changes": changes,
        "parameters": _parameter_count(leaves),
        "num_batches_tracked": counters,
    }
    save_converted(flags.output, variables, provenance)
    print(f"written to {flags.output}")


def _create_model(flags: argparse.Namespace, state_dict: dict[str, np.ndarray]) -> tuple[nn.Module, dict[str, Any]]:
    """The model and its options; without --num_classes, with as many classes as the head in the checkpoint has."""
    options = dict(flags.option)
    if flags.image_size is not None:
        options["image_size"] = flags.image_size
    if flags.num_classes is not None:
        options["num_classes"] = flags.num_classes
    try:
        model = create_model(flags.model, **options)
        bias = state_dict.get("head.bias", state_dict.get("classifier.head.bias"))
        if (
            flags.num_classes is None
            and bias is not None
            and hasattr(getattr(model, "classifier", model), "num_classes")
        ):
            options["num_classes"] = bias.size
            model = create_model(flags.model, **options)
    except TypeError as error:
        raise ValueError(f"option: a value of the wrong type among {options} ({error})") from error
    return model, options


def _print_table(model: nn.Module) -> None:
    """One row for each variable: the PyTorch names that fill it, its path and its shape."""
    shapes = variable_shapes(model)
    sources: dict[str, list[str]] = {}
    for entry in plan(model):
        sources.setdefault(entry.target, []).append(entry.source)
    for target, names in sources.items():
        name = names[0] if len(names) == 1 else names[0].replace(".0.", f".{{0..{len(names) - 1}}}.", 1)
        print(f"{name:50} → {target:50} {shapes[target].shape}")


def _parameter_count(leaves: dict[str, Any]) -> int:
    return sum(leaf.size for path, leaf in leaves.items() if path.startswith("params/"))


if __name__ == "__main__":
    sys.exit(main())
