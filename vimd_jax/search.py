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
from ml_collections import ConfigDict

from vimd_jax.arguments import parse_path
from vimd_jax.configs import load_config
from vimd_jax.files import replace_file
from vimd_jax.load import load_model
from vimd_jax.log import readable_errors, show_log
from vimd_jax.models.scan_order import DIRECTIONS, LayerDirections
from vimd_jax.training import plots
from vimd_jax.training.roles import build_networks

CHOSEN = 4  # directions of a layer of the final network

# What comes from outside is written as data, never as code: a checkpoint may be a stranger's.
_CONFIG = '''"""A config with the directions that a search found; for `--config` of vimd_jax.train."""

from vimd_jax.configs import load_config

BASE, ROLE = {base!a}, {role!a}
SUPERNET, STEP = {workdir!a}, {step!a}

DIRECTIONS = (
{rows}
)


def get_config():
    config = load_config(BASE)
    config[ROLE].directions = DIRECTIONS
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


def load_base(base: str, role: str) -> ConfigDict:
    """The config of the final network.

    Raises:
      ValueError: it is not found, or has no such network.
    """
    config = load_config(base)
    if role not in config:
        raise ValueError(f"--base={base} has no network {role!r}: name one with --role, in a config of one stage")
    return config


def config_text(directions: LayerDirections, base: str, role: str, workdir: Path, step: Any) -> str:
    """The text of a config file: the config `base`, as `--config` takes it, with these directions."""
    rows = "\n".join(f"    {of_layer!a}," for of_layer in directions).replace("'", '"')
    step = step if isinstance(step, int) else None
    return _CONFIG.format(base=base, role=role, workdir=str(workdir), step=step, rows=rows)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vimd_jax.search", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, type=parse_path, help="of the supernet, or a checkpoint of one")
    parser.add_argument("--base", required=True, help="config of the final network, as --config takes it")
    parser.add_argument("--role", default="classifier", help="the network's section in it (default: classifier)")
    parser.add_argument("--output", required=True, type=parse_path, help="the config to write")
    return parser.parse_args()


def main() -> None:
    """Runs the command line."""
    arguments = parse_arguments()
    show_log()
    with readable_errors():
        base = load_base(arguments.base, arguments.role)
        supernet = load_model(arguments.workdir)
        try:
            probabilities = direction_probabilities(supernet.variables)
        except ValueError as error:
            raise ValueError(f"{arguments.workdir}: {error}") from error
        directions = most_probable(probabilities)
        base[arguments.role].directions = directions
        build_networks(base, ["a", "b"])  # an error now if the final network cannot have these directions
        step = supernet.provenance.get("step")
        text = config_text(directions, arguments.base, arguments.role, arguments.workdir, step)
        replace_file(arguments.output, text.encode())
        for layer, names in enumerate(directions):
            print(f"layer {layer:2d}  {' '.join(names)}")
        plots.save_direction_probabilities(probabilities, DIRECTIONS, directions, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
