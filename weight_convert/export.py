"""Exports a trained or converted checkpoint to PyTorch: names and layouts of the original classes, as .safetensors.

    python -m weight_convert.export --checkpoint DIR --output X.safetensors

In PyTorch: `model.load_state_dict(safetensors.torch.load_file("X.safetensors"))`. The file's metadata name the classes.
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from vimd_jax.arguments import parse_path
from vimd_jax.checkpoints.format import read_model
from vimd_jax.errors import printable
from vimd_jax.files import replace_file
from weight_convert.mapping import export_state_dict, plan, step_counters


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m weight_convert.export", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint", required=True, type=parse_path, help="workdir of a run, or converted checkpoint"
    )
    parser.add_argument("--output", required=True, type=parse_path, help=".safetensors file to write")
    parser.add_argument(
        "--part", help="export only this part of a composite, under its own names, e.g. classifier of srvm_*"
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # characters that the terminal lacks must not end an export
    flags = parser.parse_args(arguments)
    try:
        export_part(flags.checkpoint, flags.output, flags.part)
    except (ValueError, OSError) as error:
        print(f"error: {printable(error, None)}", file=sys.stderr)
        return 1
    return 0


def export_part(checkpoint: Path, output: Path, part: str | None = None) -> None:
    """Writes a network, or one part of it, as the .safetensors file `output`.

    Raises:
      ValueError, OSError: the output exists already, or the checkpoint has no such part or cannot be read.
    """
    if output.suffix != ".safetensors":
        raise ValueError(f"--output {output} must end in .safetensors")
    if output.exists():
        raise ValueError(f"--output {output} exists: name another file or remove it")
    trained = read_model(checkpoint)
    if part is not None and part not in trained.model.parts:
        kind, parts = type(trained.model).__name__, ", ".join(trained.model.parts) or "none"
        raise ValueError(f"--part {part}: {checkpoint} holds a {kind}, which has no such part (it has: {parts})")
    tensors = export_state_dict(trained.variables, trained.model)
    counters = trained.provenance.get("num_batches_tracked")
    for name in step_counters(plan(trained.model)) if isinstance(counters, dict) else ():
        if type(counters.get(name)) is int and counters[name].bit_length() < 64:
            tensors[name] = np.array(counters[name])
    if part is not None:
        tensors = {name.removeprefix(f"{part}."): x for name, x in tensors.items() if name.startswith(f"{part}.")}
    metadata = {"format": "pt"}
    if trained.class_names and part in (None, "classifier"):
        metadata["class_names"] = json.dumps(trained.class_names)
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, save(tensors, metadata=metadata))
    print(f"{len(tensors)} tensors written to {output}")


if __name__ == "__main__":
    sys.exit(main())
