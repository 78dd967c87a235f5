"""A trained network for other programs: `python -m vimd_jax.export --checkpoint DIR --format FORMAT --output FILE`.

    pytorch     its weights under the names of the original classes, FILE.safetensors
    stablehlo   the whole network as a program that JAX alone runs on CPU, CUDA GPU and TPU, FILE.stablehlo
    onnx        the same for ONNX Runtime and whatever else reads ONNX, FILE.onnx (pip install "vimd-jax[onnx]")

A program holds its weights and takes images of any number, float32 in [0, 1]. FILE.json beside it says what it takes,
what it returns, which classes there are and how an image is prepared.
"""

import argparse
import io
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.extend.core import jaxpr_as_fun

import kernels
from vimd_jax import __version__
from vimd_jax.arguments import parse_path
from vimd_jax.checkpoints.format import read_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.errors import printable
from vimd_jax.files import replace_file
from vimd_jax.models import describe
from vimd_jax.models.layers import portable
from vimd_jax.publish import publish
from weight_convert.export import export_part
from weight_convert.hub import resolve

FORMATS = {"pytorch": ".safetensors", "stablehlo": ".stablehlo", "onnx": ".onnx"}
WEIGHTS = ("float32", "bfloat16", "int8")
PLATFORMS = ("cpu", "cuda", "tpu")

Program = Callable[[jax.Array], jax.Array]


def to_stablehlo(trained: TrainedModel, weights: str = "float32") -> bytes:
    """The network as a program for `jax.export.deserialize`, which needs nothing of this library.

    Args:
      trained: a classifier, a student, a segmenter or an SR network.
      weights: how the kernels are stored, see `WEIGHTS`; the arithmetic is that of the network.

    Returns:
      The file's content.
    """
    program = jax.jit(program_of(trained, weights))
    return export.export(program, platforms=PLATFORMS)(_images(trained)).serialize()


def to_onnx(trained: TrainedModel, weights: str = "float32") -> bytes:
    """The network as an ONNX model with the input "images" and the output that `describe_program` names.

    Args:
      trained: as in `to_stablehlo`.
      weights: as in `to_stablehlo`.

    Raises:
      ValueError: jax2onnx is not installed.
    """
    try:
        import jax2onnx
        from onnx_ir import to_proto
    except ImportError as error:
        raise ValueError(f'ONNX needs the extra "onnx" ({error}): pip install "vimd-jax[onnx]"') from error
    from vimd_jax.onnx_graph import symbolic_sizes, tidied

    images = _images(trained)
    # Traced here, not by jax2onnx, whose own versions of JAX's functions do not go with Flax's loops.
    with portable(True):
        program = jax.make_jaxpr(program_of(trained, weights, "plain", "plain"))(images)
    with symbolic_sizes():
        model = jax2onnx.to_onnx(
            jaxpr_as_fun(program),
            [images],
            model_name=describe(trained.model)["architecture"],
            return_mode="ir",
            input_names=["images"],
            output_names=[describe_program(trained)["output"]["name"]],
        )
    return to_proto(tidied(model)).SerializeToString()


def program_of(
    trained: TrainedModel, weights: str = "float32", scan: str = "sequential", convolution: str = "shifted"
) -> Program:
    """The function of images that is exported: probabilities of a classifier or of every pixel, or restored images."""
    model, variables = trained.model, stored(trained.variables, weights)

    def program(images: jax.Array) -> jax.Array:
        restored = jax.tree.map(lambda x: x(), variables)
        with kernels.use(scan=scan, convolution=convolution):
            if not trained.class_names:
                return model.apply(restored, images)
            scores = model.segment(restored, images) if model.dense else model.apply(restored, images)
            return jax.nn.softmax(scores)

    return program


def describe_program(trained: TrainedModel, weights: str = "float32") -> dict[str, Any]:
    """Describes a program for the JSON file that accompanies it."""
    shape = [str(side) if export.is_symbolic_dim(side) else side for side in _images(trained).shape]
    output = jax.eval_shape(program_of(trained), _images(trained)).shape
    view = {"low_resolution": trained.low_resolution, "image_size": trained.image_size, "crop": trained.crop}
    return {
        "input": {"name": "images", "shape": shape, "dtype": "float32", "range": [0, 1]},
        "output": {
            "name": "probabilities" if trained.class_names else "restored",
            "shape": [str(side) if export.is_symbolic_dim(side) else side for side in output],
        },
        "class_names": list(trained.class_names),
        "view": view,
        "weights": weights,
        **describe(trained.model),
        "provenance": trained.provenance | {"exported_by": f"vimd_jax {__version__}"},
    }


def _images(trained: TrainedModel) -> jax.ShapeDtypeStruct:
    """Images as the program takes them: any number, and where the network restores them, of any size."""
    if trained.class_names:
        view = trained.view
        (batch,) = export.symbolic_shape("batch")
        shape = (batch, *(view.low_resolution or view.size), 3)
    else:
        shape = export.symbolic_shape("batch, height, width, 3")
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def stored(variables: dict[str, Any], weights: str) -> dict[str, Any]:
    """For every variable a function that restores it while the program runs.

    Kernels, which are nearly all of a network, are kept in fewer bits: as bfloat16, or as int8 with a scale for every
    output of every layer. The rest (biases, norms, state matrices, positions) stays as it is.
    """

    def restore(path, x):
        x = np.asarray(x)
        is_kernel = path[-1].key.endswith("kernel") and x.ndim > 1 and x.shape[-2] >= 8
        if is_kernel and weights == "bfloat16":
            rounded = x.astype(jnp.bfloat16)
            return lambda: jnp.asarray(rounded).astype(jnp.float32)
        if is_kernel and weights == "int8":
            scale = np.maximum(np.abs(x).max(axis=-2, keepdims=True), 1e-30) / 127
            rounded = np.round(x / scale).astype(np.int8)
            return lambda: jnp.asarray(rounded).astype(jnp.float32) * scale
        return lambda: x

    return jax.tree_util.tree_map_with_path(restore, variables)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m vimd_jax.export", description=__doc__.split(":")[0])
    parser.add_argument("--checkpoint", required=True, help="workdir of a run, converted checkpoint, or its name")
    parser.add_argument("--format", choices=FORMATS, default="pytorch", help="default: pytorch")
    parser.add_argument("--output", type=parse_path, help="file to write")
    parser.add_argument("--part", help="of a network of several, this one alone, e.g. classifier (pytorch)")
    parser.add_argument("--weights", choices=WEIGHTS, help="of a program: how kernels are stored (default float32)")
    parser.add_argument(
        "--push_to_hub",
        metavar="OWNER/NAME",
        help="upload the checkpoint, a model card and what --output names to this repository of the Hugging Face Hub",
    )
    parser.add_argument("--private", action="store_true", help="a repository that is made is for its owner alone")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal lacks must not end an export
    flags = parser.parse_args(arguments)
    try:
        flags.checkpoint = resolve(flags.checkpoint).expanduser()
        exported = _write(flags)
        if flags.push_to_hub:
            page = publish(flags.checkpoint, flags.push_to_hub, exported, flags.private)
            print(f"uploaded to {page}: load_model('hf://{flags.push_to_hub}')")
    except (ValueError, OSError) as error:
        print(f"error: {printable(error, None)}", file=sys.stderr)
        return 1
    return 0


def _write(flags: argparse.Namespace) -> list[Path]:
    """Writes what the command line asks for; returns the files."""
    if not flags.output:
        if not flags.push_to_hub or flags.weights or flags.part or flags.format != "pytorch":
            raise ValueError("name the file to write (--output FILE)")
        return []
    if flags.format != "pytorch":
        return _write_program(flags)
    if flags.weights:
        raise ValueError("--weights is for the formats stablehlo and onnx")
    export_part(flags.checkpoint, flags.output, flags.part)
    return [flags.output]


def _write_program(flags: argparse.Namespace) -> list[Path]:
    suffix, description = FORMATS[flags.format], flags.output.with_suffix(".json")
    if flags.part:
        raise ValueError("--part is for the format pytorch")
    if flags.output.suffix != suffix:
        raise ValueError(f"--output {flags.output} must end in {suffix}")
    for path in (flags.output, description):
        if path.exists():
            raise ValueError(f"--output {path} exists: name another file or remove it")
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # remarks about types that it infers itself
    trained, weights = read_model(flags.checkpoint), flags.weights or "float32"
    content = {"stablehlo": to_stablehlo, "onnx": to_onnx}[flags.format](trained, weights)
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"file": flags.output.name, **describe_program(trained, weights)}, indent=2) + "\n"
    replace_file(flags.output, content)
    replace_file(description, text.encode())
    print(f"{len(content) / 1e6:.1f} MB written to {flags.output}, described in {description}")
    return [flags.output, description]


if __name__ == "__main__":
    sys.exit(main())
