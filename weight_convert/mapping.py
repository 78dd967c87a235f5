"""PyTorch tensors to Flax variables and back, by the tables of tables.py.

Every difference of layout between the two frameworks is a transposition or a division into other axes, and layers that
PyTorch numbers may be stacked on leading axes.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from vimd_jax.models.network import variable_shapes
from weight_convert.tables import OPTIONS, Rule, computed_tensors, name_in_table, table


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
    entries = [entry for rule in table(model) for entry in _expand(rule, shapes)]
    if uncovered := sorted(set(shapes) - {entry.target for entry in entries}):
        raise ValueError(
            f"no PyTorch name is known for {_listed(uncovered)} of {type(model).__name__}, with the options it has"
        )
    return entries


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
        halves: `{"sr": {...}, "classifier": {...}}`, or one flat dict with these prefixes. Names may begin with
        `module.`, as wrappers of PyTorch leave them, or be older ones. `num_batches_tracked` is ignored, rotary tables
        are compared with ours.
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


def fill(
    state_dict: dict[str, Any], model: nn.Module, flexible: tuple[str, ...] = (), source: str = "the state dict"
) -> dict[str, np.ndarray]:
    """`convert_state_dict` to path → array; paths that end with one of `flexible` keep the shape they come with.

    Errors name the `source`.
    """
    entries = plan(model)
    state_dict = _as_in_table(flat_state_dict(state_dict), entries, model)
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
    state_dict: dict[str, Any], entries: list[Entry], model: nn.Module, flexible: tuple[str, ...]
) -> list[str]:
    """What keeps the weights from fitting, each kind in a few words; nothing if they do."""
    expected, tables = {entry.source for entry in entries}, computed_tensors(model)
    found = [(entry, np.asarray(state_dict[entry.source])) for entry in entries if entry.source in state_dict]
    differences = {
        "missing": sorted(expected - set(state_dict)),
        "unexpected": sorted(set(state_dict) - expected - set(step_counters(entries)) - set(tables)),
        "wrong shape": [
            f"{entry.source} is {tensor.shape}, expected {entry.shape}"
            for entry, tensor in found
            if tensor.shape != entry.shape and not (entry.target.endswith(flexible) and tensor.ndim == len(entry.shape))
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
    problems = [f"{what} ({len(names)}): {_listed(names)}" for what, names in differences.items() if names]
    odd = [*differences["missing"], *differences["unexpected"]]
    if options := sorted({option for part, option in OPTIONS.items() if any(re.search(part, name) for name in odd)}):
        problems.append(f"look at the options {', '.join(options)} of the model")
    return problems


def _same_table(table: Any, expected: np.ndarray, other_grid: Any) -> bool:
    table = np.asarray(table, np.float32)
    if table.shape != expected.shape:
        return bool(other_grid)
    return np.allclose(table, expected, atol=1e-3)


def _listed(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f", … and {len(names) - most} more" if len(names) > most else "")


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
