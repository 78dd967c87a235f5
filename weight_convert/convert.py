"""Converts a PyTorch checkpoint to a directory that training, evaluation and prediction load.

    python -m weight_convert.convert --model vim_tiny_stride8 --checkpoint vim_t_midclstok_ft_78p3acc.pth --output DIR
    python -m weight_convert.convert --model srresnet_x4 --checkpoint SRResNet_x4-ImageNet-6dd5216c.pth.tar --output DIR
    python -m weight_convert.convert --model srvm_tiny --checkpoint best_checkpoint.pth --output DIR \\
        --sr_checkpoint SRResNet_x4-ImageNet-6dd5216c.pth.tar

Every tensor of the file must be used once and every variable of the model filled once; otherwise nothing is written.
"""

import argparse
import dataclasses
import difflib
import io
import sys
import textwrap
from collections.abc import Sequence

import numpy as np
from flax.traverse_util import unflatten_dict

from vimd_jax.arguments import parse_option, parse_path
from vimd_jax.checkpoints.adapt import MODES, adapted_leaves
from vimd_jax.checkpoints.format import save_model
from vimd_jax.errors import printable
from vimd_jax.models import create_model, describe, list_models
from vimd_jax.models.network import Network, variable_shapes
from weight_convert.hub import published, resolve
from weight_convert.load import as_trained_model, assumptions, model_for, provenance_of, recorded_class_names
from weight_convert.mapping import Entry, fill, flat_state_dict, plan, step_counters, unwrapped
from weight_convert.tables import name_in_table, tensors_by_part
from weight_convert.torch_file import load_torch_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # characters that the terminal lacks must not end a conversion
    flags = _parser().parse_args(arguments)
    try:
        _convert(flags)
    except (ValueError, OSError) as error:
        print(f"error: {printable(error, None)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    names = textwrap.fill(f"architectures: {', '.join(list_models())}", 100, break_on_hyphens=False)
    parser = argparse.ArgumentParser(
        prog="python -m weight_convert.convert",
        description=__doc__.split("\n")[0],
        epilog=names,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="the architecture of the checkpoint, one of those below")
    parser.add_argument("--checkpoint", required=True, help=".pth, .pth.tar or .safetensors, or its name (see hub.py)")
    parser.add_argument("--sr_checkpoint", help="srvm_* only: the SR network; --checkpoint is the classifier")
    parser.add_argument("--output", type=parse_path, help="directory to write; must not exist")
    parser.add_argument(
        "--num_classes", type=int, help="default: as in the checkpoint; another number makes a new head, 0 none"
    )
    parser.add_argument("--image_size", type=_size, help="pixels, S or HEIGHTxWIDTH; resizes the position embedding")
    parser.add_argument(
        "--source_size", type=_size, help="image size that the checkpoint was trained at, unless square"
    )
    parser.add_argument(
        "--option", action="append", type=parse_option, default=[], metavar="NAME=VALUE", help="an option of the model"
    )
    parser.add_argument("--key", help='entry of the file, e.g. model_ema; default: "model" or "state_dict"')
    parser.add_argument("--position_mode", choices=MODES, default="correct", help="reference: resize as published")
    parser.add_argument("--dry_run", action="store_true", help="check and print, write nothing")
    return parser


def _size(text: str) -> int | tuple[int, int]:
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels nor HEIGHTxWIDTH")
    return int(text) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _convert(flags: argparse.Namespace) -> None:
    if flags.output is None and not flags.dry_run:
        raise ValueError("give the directory to write with --output, or only check with --dry_run")
    if flags.output is not None and flags.output.exists():
        raise ValueError(f"--output {flags.output} exists: name another directory or remove it")
    if flags.model not in list_models():
        close = difflib.get_close_matches(flags.model, list_models(), n=3) or ["one that --help lists"]
        raise ValueError(f"--model: there is no network {flags.model!r}, did you mean {' or '.join(close)}?")
    entry = published(flags.checkpoint, flags.model)
    flags.checkpoint = resolve(flags.checkpoint, flags.model)
    flags.sr_checkpoint = flags.sr_checkpoint and resolve(flags.sr_checkpoint)
    given = {"image_size": flags.image_size, "num_classes": flags.num_classes}
    options = (entry.options if entry else {}) | dict(flags.option)
    options |= {name: value for name, value in given.items() if value is not None}
    state_dict = _load(flags, create_model(flags.model, **options))
    model = model_for(state_dict, flags.model, options)
    entries = plan(model)
    state_dict, prefixes = unwrapped(state_dict, model, {entry.source for entry in entries})
    leaves = fill(state_dict, model, flexible=True, source=str(flags.checkpoint))
    if "num_classes" not in options and leaves.keys() != variable_shapes(model).keys():
        raise ValueError(f"{flags.checkpoint} has no head: add --num_classes N for a new one, or 0 for none")
    origin = _network_at(flags.source_size, model, flags.model)
    leaves, changes = adapted_leaves(
        leaves, model, origin=origin, mode=flags.position_mode, source=str(flags.checkpoint)
    )
    notes = [f"names are read without their prefix {printable(prefix)}" for prefix in prefixes]
    notes += [": ".join(change) for change in changes]
    notes += [f"it sees images as published: crop {entry.crop:g}, {entry.options or 'not normalised'}"] if entry else []
    assumed = assumptions(model, options)
    if broken := [path for path, leaf in leaves.items() if not np.isfinite(leaf).all()]:
        notes.append(f"warning: {len(broken)} variables contain NaN or infinite values, the first is {broken[0]}")
    named, known = {name_in_table(name, model): x for name, x in state_dict.items()}, set(step_counters(entries))
    counters = {name: int(x) for name, x in named.items() if name in known and x.ndim == 0 and x.dtype.kind in "iu"}
    parameters = sum(leaf.size for path, leaf in leaves.items() if path.startswith("params/"))

    _print_table(entries, model)
    print(f"{len(state_dict)} tensors read, each used once ({len(counters)} batch counters only recorded)")
    for note in notes + [f"assumed (not recorded in the file): {note}" for note in assumed]:
        print(note)
    print(f"{parameters:,} parameters")
    if flags.dry_run:
        print("dry run: nothing written")
        return
    files = [flags.checkpoint] + ([flags.sr_checkpoint] if flags.sr_checkpoint else [])
    provenance = provenance_of(files, flags.key) | {
        "changes": notes,
        "assumed": assumed,
        "parameters": parameters,
        "num_batches_tracked": counters,
    }
    recorded = recorded_class_names(flags.checkpoint)
    trained = as_trained_model(model, options, unflatten_dict(leaves, sep="/"), provenance, recorded)
    trained = dataclasses.replace(trained, crop=entry.crop) if entry else trained
    print(f"written to {flags.output}, checksum {save_model(flags.output, trained)}")


def _load(flags: argparse.Namespace, model: Network) -> dict[str, np.ndarray]:
    """The state dict; for SRVM-Net, with the tensors of both parts, prefixed by the part's name."""
    state_dict = load_torch_checkpoint(flags.checkpoint, key=flags.key)
    is_classifier_alone = "classifier" in model.parts and "" in tensors_by_part(state_dict, model.parts)
    if flags.sr_checkpoint and not is_classifier_alone:
        raise ValueError(
            f"--sr_checkpoint {flags.sr_checkpoint} is not needed: it is for an srvm_* model whose --checkpoint is the "
            "classifier alone"
        )
    if not is_classifier_alone:
        return state_dict
    sr = {"sr": load_torch_checkpoint(flags.sr_checkpoint)} if flags.sr_checkpoint else {}
    return flat_state_dict({"classifier": state_dict} | sr)


def _network_at(size: int | tuple[int, int] | None, model: Network, architecture: str) -> Network | None:
    """The network with this image size; None if no size is given."""
    if size is None:
        return None
    return create_model(architecture, **describe(model)["options"] | {"image_size": size})


def _print_table(entries: list[Entry], model: Network) -> None:
    """Prints a row for each variable: the PyTorch names that fill it, its path and its shape."""
    shapes = variable_shapes(model)
    sources: dict[str, list[str]] = {}
    for entry in entries:
        sources.setdefault(entry.target, []).append(entry.source)
    for target, names in sources.items():
        ends = zip(names[0].split("."), names[-1].split("."))
        name = ".".join(first if first == last else f"{{{first}..{last}}}" for first, last in ends)
        print(f"{name:50} -> {target:50} {shapes[target].shape}")


if __name__ == "__main__":
    sys.exit(main())
