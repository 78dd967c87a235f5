"""PyTorch tensors to Flax variables and back, by the tables of tables.py.

Every difference of layout between the two frameworks is a transposition or a division into other axes, and layers that
PyTorch numbers may be stacked on leading axes.
"""

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from vimd_jax.checkpoints.adapt import ADAPTABLE, differs_as_fit_can
from vimd_jax.models import create_model, describe
from vimd_jax.models.network import variable_shapes
from vimd_jax.models.srvm import SRVM
from weight_convert.safe_pickle import printable
from weight_convert.tables import Rule, computed_tensors, halves, name_in_table, table, told_options

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """One PyTorch tensor, the shape it has there, and its place: the leaf `target`, or its slice at `index`."""

    source: str
    shape: tuple[int, ...]
    target: str
    index: tuple[int, ...]
    axes: tuple[int, ...] | None


def plan(model: nn.Module) -> list[Entry]:
    """Every PyTorch tensor that `model` needs, with its place among the variables.

    Raises:
      ValueError: no table describes this kind of model, or the table leaves one of its variables without a source.
    """
    shapes = {path: leaf.shape for path, leaf in variable_shapes(model).items()}
    entries = expand(table(model), shapes)
    if uncovered := sorted(set(shapes) - {entry.target for entry in entries}):
        raise ValueError(
            f"no PyTorch name is known for {_listed(uncovered)} of {type(model).__name__}, with the options it has"
        )
    return entries


def expand(rules: Iterable[Rule], shapes: dict[str, tuple[int, ...]]) -> list[Entry]:
    """The entries of table rows for variables of these shapes, by path."""
    return [entry for rule in rules for entry in _expand(rule, shapes)]


def _expand(rule: Rule, shapes: dict[str, tuple[int, ...]]) -> Iterator[Entry]:
    """The entries of one table row; none where this model, by its options, lacks the variable."""
    pattern = re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(rule.target)))
    for target, shape in shapes.items():
        if not (match := pattern.fullmatch(target)):
            continue
        counted = {name: int(number) for name, number in match.groupdict().items()}
        stacked = [name for name in re.findall(r"{(\w+)", rule.source) if name not in counted]
        own = shape[len(stacked) :]
        if rule.axes is not None:
            own = _with_first_axes(own, len(rule.axes))
            own = tuple(own[axis] for axis in np.argsort(rule.axes))
        if rule.shape is not None:
            own = rule.shape(*own)
        for index in np.ndindex(shape[: len(stacked)]):
            source = _with_numbers(rule.source, counted | dict(zip(stacked, index)))
            yield Entry(source, own, target, index, rule.axes)


def _with_numbers(source: str, numbers: dict[str, int]) -> str:
    return re.sub(r"{(\w+)(\+1)?}", lambda match: str(numbers[match[1]] + bool(match[2])), source)


def _with_first_axes(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(shape)) + tuple(shape)


def step_counters(entries: list[Entry]) -> list[str]:
    """PyTorch's `num_batches_tracked` of every batch norm: read by nothing at its fixed momentum, so Flax has none."""
    ending = "running_mean"
    return [e.source.removesuffix(ending) + "num_batches_tracked" for e in entries if e.source.endswith(ending)]


def convert_state_dict(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """PyTorch weights as the variables of `model`, strictly: every tensor is used once, every variable is filled once.

    Args:
      state_dict: PyTorch name → array, of the original classes (`VisionMamba`, `SRResNet`). For SRVM-Net the two
        halves: `{"sr": {...}, "classifier": {...}}`, or one flat dict with these prefixes. Names may have a prefix in
        common, as wrappers of PyTorch leave it, or be older ones. `num_batches_tracked` is ignored, rotary tables are
        compared with ours.
      model: a network of vimd_jax.models; its options decide the expected names and shapes.

    Returns:
      `{"params": ..., "batch_stats": ...}` as `model.init` would (`batch_stats` where the model has them), float32
      whatever floating-point dtype the tensors have.

    Raises:
      ValueError: missing or unexpected names, wrong shapes, dtypes or rotary tables; one message lists them all.
    """
    leaves = fill(state_dict, model)
    return unflatten_dict({path: jnp.asarray(leaf) for path, leaf in leaves.items()}, sep="/")


def flat_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Joins the names of nested dicts by dots: `{"sr": {"conv3.bias": x}}` → `{"sr.conv3.bias": x}`."""
    return flatten_dict(state_dict, sep=".")


def unwrapped(state_dict: dict[str, Any], model: nn.Module, sources: set[str]) -> tuple[dict[str, Any], list[str]]:
    """The tensors without the prefix that wrappers put before the network's names, and the prefixes left out.

    Such are `module.` (DataParallel, averages of weights), `_orig_mod.` (compile) and `model.` (Lightning); of an
    SRVM-Net each half may have its own. `sources` are the names in the table of the model.
    """
    if isinstance(model, SRVM):
        joined, left_out = {}, []
        parts = halves(state_dict)
        rest = parts.pop("", {})
        for part, tensors in parts.items():
            own = {name.removeprefix(f"{part}.") for name in sources if name.startswith(f"{part}.")}
            tensors, prefixes = unwrapped(tensors, getattr(model, part), own)
            joined |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
            left_out += prefixes
        return joined | rest, left_out
    prefixes = Counter()
    for name in state_dict:
        pieces = name.split(".", 4)
        ends = [".".join(pieces[start:]) for start in range(len(pieces))]
        prefixes.update(name.removesuffix(end) for end in ends if name_in_table(end, model) in sources)
    prefix = max(prefixes, key=prefixes.get, default="")
    if not prefix:
        return state_dict, []
    short = {name: name.removeprefix(prefix) for name in state_dict}
    taken = Counter(short.values())
    return {short[name] if taken[short[name]] == 1 else name: x for name, x in state_dict.items()}, [prefix]


def fill(
    state_dict: dict[str, Any], model: nn.Module, flexible: bool = False, source: str = "the state dict"
) -> dict[str, np.ndarray]:
    """`convert_state_dict` to path → array; if `flexible`, classes and positions may be as many as they are.

    Errors name the `source`.
    """
    entries = plan(model)
    state_dict, prefixes = unwrapped(flat_state_dict(state_dict), model, {entry.source for entry in entries})
    if prefixes:
        log.info("%s: names without their prefix %s", source, ", ".join(map(printable, prefixes)))
    state_dict = _as_in_table(state_dict, entries, model)
    if problems := _differences(state_dict, entries, model, flexible):
        raise ValueError(f"{source}: the weights do not fit {type(model).__name__}: {'; '.join(problems)}")
    shapes = variable_shapes(model)
    leaves: dict[str, np.ndarray] = {}
    for entry in entries:
        tensor = np.asarray(state_dict[entry.source])
        stacked, own = np.split(shapes[entry.target].shape, [len(entry.index)])
        tensor = tensor if entry.axes is None else tensor.transpose(entry.axes)
        tensor = tensor if tensor.ndim == len(own) else tensor.reshape(own)
        if entry.target not in leaves:
            leaves[entry.target] = np.empty((*stacked, *tensor.shape), np.float32)
        leaves[entry.target][entry.index] = tensor
    return leaves


def _as_in_table(state_dict: dict[str, Any], entries: list[Entry], model: nn.Module) -> dict[str, np.ndarray]:
    """The tensors under the names of the table; those of linear layers that came as 1×1 convolutions in its shapes."""
    shapes, renamed = {entry.source: entry.shape for entry in entries}, {}
    for name, tensor in state_dict.items():
        known = name_in_table(name, model)
        if known in renamed or (known != name and known in state_dict):
            known = name  # two tensors for one variable: this one stays unexpected
        tensor = np.asarray(tensor)
        if known in shapes and tensor.shape in _equivalent_shapes(shapes[known], known != name):
            tensor = tensor.reshape(shapes[known])
        renamed[known] = tensor
    return renamed


def _equivalent_shapes(shape: tuple[int, ...], renamed: bool) -> list[tuple[int, ...]]:
    """Shapes in which the same numbers come: of a linear layer as 1×1 convolution, of one for all directions."""
    shapes = [(*shape, 1, 1)] if len(shape) == 2 else []
    shapes += [shape[:2]] if shape[2:] == (1, 1) else []
    return shapes + ([(shape[0] * shape[1], shape[2])] if renamed and len(shape) == 3 else [])


def _differences(
    state_dict: dict[str, np.ndarray], entries: list[Entry], model: nn.Module, flexible: bool
) -> list[str]:
    """What keeps the weights from fitting, each kind in a few words, and what may help; nothing if they do."""
    expected, tables = {entry.source for entry in entries}, computed_tensors(model)
    found = [(entry, state_dict[entry.source]) for entry in entries if entry.source in state_dict]
    rows = {name.removesuffix("weight"): tensor.shape[:1] for name, tensor in state_dict.items()}
    differences = {
        "missing": sorted(expected - set(state_dict)),
        "unexpected": sorted(set(state_dict) - expected - {*step_counters(entries), *tables, "n_averaged"}),
        "wrong shape": [
            f"{entry.source} is {tensor.shape}, expected {entry.shape}"
            for entry, tensor in found
            if tensor.shape != entry.shape and not (flexible and _differs_flexibly(entry, tensor.shape))
        ],
        "not as many classes as rows of head.weight": [
            f"{entry.source} is {tensor.shape}"
            for entry, tensor in found
            if flexible
            and entry.target.endswith("/head/bias")
            and tensor.shape != rows.get(entry.source.removesuffix("bias"), tensor.shape)
        ],
        "not floating point": [
            f"{entry.source} is {tensor.dtype}"
            for entry, tensor in found
            if not jnp.issubdtype(tensor.dtype, jnp.floating)
        ],
        "not the rotary table of this grid": [
            name for name in tables if name in state_dict and not _same_table(state_dict[name], tables[name], flexible)
        ],
    }
    hints = _hints(state_dict, expected, differences["missing"], model) if any(list(differences.values())[:3]) else []
    most = 3 if hints else 20
    return [f"{what} ({len(names)}): {_listed(names, most)}" for what, names in differences.items() if names] + hints


def _differs_flexibly(entry: Entry, shape: tuple[int, ...]) -> bool:
    if len(shape) != len(entry.shape):
        return False
    axes = entry.axes or range(len(shape))
    return differs_as_fit_can(entry.target, tuple(shape[i] for i in axes), tuple(entry.shape[i] for i in axes))


def _hints(state_dict: dict[str, np.ndarray], known: set[str], missing: list[str], model: nn.Module) -> list[str]:
    """What would fit rather, as far as the names and shapes of the file tell."""
    if isinstance(model, SRVM) and missing and all(name.startswith("sr.") for name in missing):
        return ["this is the classifier alone: give the SR network's file too (convert: --sr_checkpoint FILE)"]
    if not any(name in known for name in state_dict):
        return [f"no tensor has a name of {type(model).__name__}, so this is another network (convert: --model)"]
    told = told_options({name: tensor.shape for name, tensor in state_dict.items()}, model)
    if not told:
        return []
    with contextlib.suppress(ValueError, TypeError):  # a file may tell what does not fit together; SRVM has no options
        fitting = describe(model.clone(**told))
        registered = describe(create_model(fitting["architecture"]))
        if all(fitting["options"][name] == value or name in ADAPTABLE for name, value in registered["options"].items()):
            return [f"its tensors are those of {fitting['architecture']}"]
    options = ", ".join(f"{option}={value!r}".replace(" ", "") for option, value in told.items())
    return [f"its tensors tell other options: {options} (convert: --option NAME=VALUE)"]


def _same_table(table: Any, expected: np.ndarray, other_grid: bool) -> bool:
    if table.shape != expected.shape:
        return other_grid
    return np.allclose(np.asarray(table, np.float32), expected, atol=1e-3)


def _listed(names: list[str], most: int = 20) -> str:
    shown = ", ".join(printable(name) for name in names[:most])
    return shown + (f", ... and {len(names) - most} more" if len(names) > most else "")


def export_state_dict(variables: dict[str, Any], model: nn.Module) -> dict[str, np.ndarray]:
    """The variables under PyTorch's names and layouts: the inverse of `convert_state_dict`.

    Args:
      variables: as `model.init` returns them.
      model: the module they belong to.

    Returns:
      PyTorch name → float32 array, rotary tables included; `num_batches_tracked` is 0, since Flax does not count.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(variables, sep="/").items()}
    entries = plan(model)
    tensors: dict[str, np.ndarray] = {}
    for entry in entries:
        tensor = leaves[entry.target][entry.index]
        if entry.axes is not None:
            tensor = tensor.reshape(_with_first_axes(tensor.shape, len(entry.axes))).transpose(np.argsort(entry.axes))
        tensors[entry.source] = np.ascontiguousarray(tensor, np.float32).reshape(entry.shape)
    counters = {name: np.zeros((), np.int64) for name in step_counters(entries)}
    return tensors | computed_tensors(model) | counters
