"""Reads the result of a direction search: `python -m vimd_jax.search --workdir DIR --base CONFIG --output FILE`.

LocalMamba (Huang et al., https://arxiv.org/abs/2403.09338, section 3.3) trains a supernet, `local_vim_search` or
`local_vmamba_search`, whose layers run every direction and weigh the results by a softmax. The four most probable
directions of each layer make the final network, which is trained from scratch. DIR is the workdir of the supernet. FILE
becomes a config: that of CONFIG, as configs/local_vim_tiny_imagenet.py, with these directions. Beside it a plot of the
probabilities is written, FILE with the suffix .png.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from vimd_jax.checkpoints.network import load_model, replace_file
from vimd_jax.log import readable_errors, show_log
from vimd_jax.models.scan_order import DIRECTIONS, LayerDirections
from vimd_jax.training import plots

CHOSEN = 4  # directions of a layer of the final network

_CONFIG = '''"""{base} with the directions that a search found.

Searched    {workdir}, step {step}
Command     python -m vimd_jax.train --config {output} --workdir DIR
"""

from {module} import get_config as base

DIRECTIONS = (
{rows}
)


def get_config():
    config = base({argument})
    config.{role}.directions = DIRECTIONS
    return config
'''


def direction_probabilities(variables: dict[str, Any]) -> np.ndarray:
    """Probabilities of the directions in each layer of a supernet, (layers, len(DIRECTIONS)).

    Raises:
      ValueError: the network searches nothing.
    """
    leaves = flatten_dict(variables["params"], sep="/")
    stacks = [leaves[path] for path in sorted(leaves) if path.endswith("/direction_weights")]
    if not stacks:
        raise ValueError("this network searches no directions: train local_vim_search or local_vmamba_search")
    return np.asarray(jax.nn.softmax(np.concatenate(stacks), axis=-1))


def most_probable(probabilities: np.ndarray) -> LayerDirections:
    """The names of the most probable directions of each layer, in the order of DIRECTIONS."""
    best = np.sort(np.argsort(-probabilities, axis=-1, kind="stable")[:, :CHOSEN])
    return tuple(tuple(DIRECTIONS[i] for i in of_layer) for of_layer in best)


def config_text(directions: LayerDirections, base: str, role: str, **texts: Any) -> str:
    """A config file: that of `base`, PATH or PATH:ARGUMENT relative to the repository, with these directions."""
    path, _, argument = base.partition(":")
    return _CONFIG.format(
        base=base,
        module=".".join(Path(path).with_suffix("").parts),
        argument=repr(argument) if argument else "",
        rows="\n".join(f"    {of_layer!r}," for of_layer in directions).replace("'", '"'),
        role=role,
        **texts,
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vimd_jax.search", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, type=Path, help="of the supernet, or a checkpoint of one")
    parser.add_argument("--base", required=True, help="config of the final network: a file of configs/, or FILE:NAME")
    parser.add_argument("--role", default="classifier", help="the network's section in it (default: classifier)")
    parser.add_argument("--output", required=True, type=Path, help="the config to write")
    return parser.parse_args()


def main() -> None:
    """Runs the command line."""
    arguments = parse_arguments()
    show_log()
    with readable_errors():
        if not Path(arguments.base.partition(":")[0]).is_file():
            raise FileNotFoundError(f"--base={arguments.base}: there is no such file")
        supernet = load_model(arguments.workdir)
        try:
            probabilities = direction_probabilities(supernet.variables)
        except ValueError as error:
            raise ValueError(f"{arguments.workdir}: {error}") from error
        directions = most_probable(probabilities)
        text = config_text(
            directions, arguments.base, arguments.role,
            workdir=arguments.workdir, step=supernet.provenance.get("step", "unknown"), output=arguments.output,
        )  # fmt: skip
        replace_file(arguments.output, text.encode())
        plots.save_direction_probabilities(probabilities, DIRECTIONS, directions, arguments.output.with_suffix(".png"))
        for layer, names in enumerate(directions):
            print(f"layer {layer:2d}  {' '.join(names)}")


if __name__ == "__main__":
    main()
