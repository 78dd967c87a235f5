"""Writes the table of classifiers, as Markdown: size, cost, and the published results of each.

    python scripts/model_table.py [PATTERN …] [--into docs/networks.md]

Parameters and operations are counted by tracing each network at its own image size, without running it. Results,
checkpoints and published costs are the authors'; the table names the sources.

Operations are counted by VMamba's rule for all networks: a multiply-add of a matrix product or convolution is one, a
normalised number five, and a selective scan takes 9 LDN + LD, and LD more if it applies the gate, for L tokens, D
channels and N states. Activations, sums, pooling and the gathers of scan orders are free.

LocalMamba's authors use another rule, by which the published figures of Vim and LocalVim are counted: 5 LDN + 2 LD for
a scan, and the layers of each scan direction (short convolution, projections to step sizes and matrices) for one
direction only. A separate column holds the count by that rule.
"""

import argparse
import fnmatch
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
from flax import linen as nn
from jax.extend.core import Primitive

from vimd_jax.models import CLASSIFIERS, create_model, layers, mamba
from vimd_jax.models.mamba import CONV_WIDTH, EXPAND
from vimd_jax.models.network import input_images, square, variable_shapes
from vimd_jax.models.published import FAMILIES, PUBLISHED, Published, page

# ----------------------------------------------------------------------------------------------------------------------
# Counting.

# Depthwise convolutions are an operation of `kernels`, so that a traced program shows no convolution. Their
# multiply-adds for each number of the result, by module:
TAPS = {mamba.ShortConv: CONV_WIDTH, mamba.GroupedShortConv: CONV_WIDTH, layers.DepthwiseConv: 3 * 3}
NORMS = (nn.LayerNorm, nn.RMSNorm, layers.BatchNorm)


class Operations(NamedTuple):
    """The operations of a network on one image.

    Attributes:
      products: multiply-adds of matrix products and convolutions.
      normalized: numbers that a norm reads.
      states: LDN, summed over the selective scans.
      skips: LD for each scan's skip connection, and for each gate that a scan applies.
    """

    products: int
    normalized: int
    states: int
    skips: int

    @property
    def total(self) -> int:
        """Operations by VMamba's rule."""
        return self.products + 5 * self.normalized + 9 * self.states + self.skips


def count_parameters(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(math.prod(leaf.shape) for path, leaf in variable_shapes(model).items() if path.startswith("params/"))


def count_operations(model: nn.Module) -> Operations:
    """The operations for one image of the network's own size."""
    images = input_images(model)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    with _tallies():
        program = jax.make_jaxpr(lambda variables, images: model.apply(variables, images))(variables, images)
    counts = _count(program)
    return Operations(**{name: counts[name] for name in Operations._fields})


# An identity in a traced program that represents operations not visible in other equations; its parameters hold their
# numbers. Like any equation, it counts as often as the layer that contains it.
_tally = Primitive("tally")
_tally.def_abstract_eval(lambda x, **operations: x)


@contextmanager
def _tallies() -> Iterator[None]:
    """A context in which traced networks get tallies: for depthwise convolutions, for norms, and instead of scans."""

    def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, **options):
        skips = (D is not None) + (z is not None)
        return _tally.bind(delta, states=delta.size * A.shape[1], skips=delta.size * skips)

    def call(next_call, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and isinstance(module, NORMS):
            args = (_tally.bind(args[0], normalized=args[0].size), *args[1:])
        result = next_call(*args, **kwargs)
        if context.method_name == "__call__" and type(module) in TAPS:
            result = _tally.bind(result, products=result.size * TAPS[type(module)])
        return result

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("vimd_jax.models.") and hasattr(module, "selective_scan"):
                stack.enter_context(mock.patch.object(module, "selective_scan", scan))
        stack.enter_context(nn.intercept_methods(call))
        yield


def _count(program: Any) -> Counter:
    """The operations of a traced program; the body of a loop counts as often as it runs."""
    counts = Counter()
    for line in program.eqns:
        kind, parameters = line.primitive.name, line.params
        if kind == "tally":
            counts.update(parameters)
        elif kind == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = line.invars[0].aval.shape
            counts["products"] += line.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
        elif kind == "conv_general_dilated":
            kernel = line.invars[1].aval
            outputs = kernel.shape[parameters["dimension_numbers"].rhs_spec[0]]
            counts["products"] += line.outvars[0].aval.size * kernel.size // outputs
        elif parameters.get("branches_platforms"):  # of branches for several platforms, the general one
            counts.update(_count(parameters["branches"][parameters["branches_platforms"].index(None)].jaxpr))
        else:
            times = parameters["length"] if kind == "scan" else 1
            for part in _parts(parameters.values()):
                counts.update({name: times * n for name, n in _count(part).items()})
    return counts


def _parts(values: Any) -> Iterator[Any]:
    """The programs among an equation's parameters: bodies of loops and functions, all counted as running."""
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif isinstance(value, tuple | list):
            yield from _parts(value)


def by_rule_of_local_mamba(model: nn.Module, operations: Operations) -> int:
    """Operations of a Vim or LocalVim as LocalMamba's authors count them."""
    leaves = {path: leaf.shape for path, leaf in variable_shapes(model).items()}
    tokens = leaves["params/position_embedding"][1]
    of_directions = sum(
        math.prod(shape)
        for path, shape in leaves.items()
        if path.endswith("kernel") and any(part in path for part in ("/conv/", "x_proj", "dt_proj"))
    )
    directions = operations.states / (model.depth * tokens * EXPAND * model.embed_dim * model.state_size)
    repeated = tokens * of_directions * (1 - 1 / directions)
    return round(operations.products - repeated + 5 * operations.states + operations.skips)


RULES = {"Vim": by_rule_of_local_mamba, "LocalVim": by_rule_of_local_mamba}  # by class

# ----------------------------------------------------------------------------------------------------------------------
# The table.

BEGIN, END = "<!-- model table -->", "<!-- end of model table -->"
COLUMNS = (
    "network",
    "paper",
    "parameters",
    "image",
    "operations, 10⁹",
    "by LocalMamba's rule",
    "published",
    "top-1, %",
    "checkpoint",
)


def row(name: str) -> list[str]:
    """The cells of a network."""
    model = create_model(name)
    published = PUBLISHED.get(name, Published("", 0))
    family = FAMILIES.get(published.family)
    operations = count_operations(model)
    rule = RULES.get(type(model).__name__)
    height, width = square(model.image_size)
    checkpoint = f"[{Path(published.file).name}]({page(published.file)})" if published.file else "–"
    return [
        f"`{name}`",
        family.paper if family else "–",
        f"{count_parameters(model):,}",
        f"{height}×{width}",
        f"{operations.total / 1e9:.2f}",
        f"{rule(model, operations) / 1e9:.2f}" if rule else "–",
        "–" if published.operations is None else f"{published.operations:.1f}",
        "–" if published.top1 is None else f"{published.top1:.1f}",
        checkpoint,
    ]


def listed(patterns: list[str]) -> list[str]:
    """The classifiers that match, grouped by family, without the networks of a search."""
    names = [name for name in CLASSIFIERS if not name.endswith("_search")]
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def table(patterns: list[str]) -> str:
    """The table and the sources of its figures, as Markdown."""
    names = listed(patterns)
    rows = [list(COLUMNS), ["---"] * 2 + ["---:"] * 6 + ["---"], *map(row, names)]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    families = dict.fromkeys(PUBLISHED[name].family for name in names if name in PUBLISHED)
    sources = [f"- {family}: {FAMILIES[family].source}." for family in families]
    return "\n".join([*lines, "", "Published figures as stated in:", *sources]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", default=["*"], metavar="PATTERN", help="names, such as 'vim_*'")
    parser.add_argument("--into", type=Path, metavar="FILE", help=f"replace the text between {BEGIN} and {END} there")
    arguments = parser.parse_args()
    if not listed(arguments.patterns):
        parser.error(f"no classifier matches {' '.join(arguments.patterns)}; there are {', '.join(listed(['*']))}")
    text = table(arguments.patterns)
    if arguments.into:
        before, _, rest = arguments.into.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        arguments.into.write_text(f"{before}{BEGIN}\n{text}{END}{after}")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
