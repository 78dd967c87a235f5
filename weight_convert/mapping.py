"""Converts PyTorch tensors to Flax variables and back, by the tables of tables.py.

Layouts in the two frameworks differ by a transposition or a reshape, and layers that PyTorch numbers may be stacked on
leading axes.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vimd_jax.checkpoints.adapt import HEAD, adaptable
from vimd_jax.errors import printable
from vimd_jax.models import create_model, describe, list_models
from vimd_jax.models.network import Network, variable_shapes
from weight_convert.tables import (
    RELEASES,
    Rule,
    as_recorded,
    computed_tensors,
    name_in_table,
    recorded_options,
    table,
    tensors_by_part,
)

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A PyTorch tensor, its shape there, and its destination: the leaf `target`, or the slice of it at `index`."""

    source: str
    shape: tuple[int, ...]
    target: str
    index: tuple[int, ...]
    axes: tuple[int, ...] | None


def plan(model: Network) -> list[Entry]:
    """Every PyTorch tensor that `model` needs, with its destination among the variables.

    Raises:
      ValueError: no table describes this kind of model, or the table leaves one of its variables without a source.
    """
    shapes = {path: leaf.shape for path, leaf in variable_shapes(model).items()}
    entries = expand(table(model), shapes)
    if uncovered := sorted(set(shapes) - {entry.target for entry in entries}):
        raise ValueError(
            f"no PyTorch name is known for {_listed(uncovered)} of {type(model).__name__} with these options"
        )
    return entries


def expand(rules: Iterable[Rule], shapes: dict[str, tuple[int, ...]]) -> list[Entry]:
    """The entries of table rows, given the shapes of the variables by path."""
    return [entry for rule in rules for entry in _expand(rule, shapes)]


def _expand(rule: Rule, shapes: dict[str, tuple[int, ...]]) -> Iterator[Entry]:
    """The entries of one table row; none if the model, with its options, lacks the variable."""
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
    """Names of every batch norm's `num_batches_tracked`, which PyTorch ignores at a fixed momentum and Flax lacks."""
    ending = "running_mean"
    return [e.source.removesuffix(ending) + "num_batches_tracked" for e in entries if e.source.endswith(ending)]


def convert_state_dict(state_dict: dict[str, Any], model: Network) -> dict[str, Any]:
    """Converts PyTorch weights to the variables of `model`; every tensor is used once, every variable filled once.

    Args:
      state_dict: PyTorch name → array, of the original classes (`VisionMamba`, `SRResNet`). For SRVM-Net its
        parts: `{"sr": {...}, "classifier": {...}}`, or one flat dict with these prefixes. Names may share a prefix, as
        PyTorch's wrappers add one, or be those of older releases. `num_batches_tracked` is ignored; rotary tables must
        equal ours.
      model: a network of vimd_jax.models; its options decide the expected names and shapes.

    Returns:
      `{"params": ..., "batch_stats": ...}` as from `model.init` (`batch_stats` if the model has them), in float32
      whatever the floating-point dtype of the tensors.

    Raises:
      ValueError: names are missing or unexpected, or shapes, dtypes or rotary tables wrong; the message lists all.
    """
    leaves = fill(state_dict, model)
    return unflatten_dict({path: jnp.asarray(leaf) for path, leaf in leaves.items()}, sep="/")


def flat_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Joins the names of nested dicts by dots: `{"sr": {"conv3.bias": x}}` → `{"sr.conv3.bias": x}`."""
    return flatten_dict(state_dict, sep=".")


def unwrapped(state_dict: dict[str, Any], model: Network, sources: set[str]) -> tuple[dict[str, Any], list[str]]:
    """The tensors without the prefixes that wrappers put before the network's names, and the list of these prefixes.

    Examples are `module.` (DataParallel, averages of weights), `_orig_mod.` (compile) and `model.` (Lightning); each
    part of a composite may have its own. `sources` are the names in the table of the model.
    """
    if model.parts:
        joined, left_out = {}, []
        parts = tensors_by_part(state_dict, model.parts)
        rest = parts.pop("", {})
        for part, tensors in parts.items():
            own = {name.removeprefix(f"{part}.") for name in sources if name.startswith(f"{part}.")}
            tensors, prefixes = unwrapped(tensors, model.parts[part], own)
            joined |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
            left_out += prefixes
        return joined | rest, left_out
    prefix = next(iter(_prefixes(state_dict, model, sources)), "")
    if not prefix:
        return state_dict, []
    short = {name: name.removeprefix(prefix) for name in state_dict}
    taken = Counter(short.values())
    return {short[name] if taken[short[name]] == 1 else name: x for name, x in state_dict.items()}, [prefix]


def _prefixes(state_dict: dict[str, Any], model: Network, sources: set[str]) -> list[str]:
    """The prefixes whose removal turns most names into names of the model's table; several in case of a tie."""
    prefixes = Counter()
    for name in state_dict:
        pieces = name.split(".", 4)
        ends = [".".join(pieces[start:]) for start in range(len(pieces))]
        prefixes.update(name.removesuffix(end) for end in ends if name_in_table(end, model) in sources)
    return [prefix for prefix, count in prefixes.items() if count == max(prefixes.values())]


def tensors_for(state_dict: dict[str, Any], model: Network, source: str) -> dict[str, Any]:
    """The tensors of a network, from its own file or from that of a composite with such a part.

    Raises:
      ValueError: the file has several such parts.
    """
    if model.parts:
        return state_dict
    prefixes = _prefixes(state_dict, model, {entry.source for entry in plan(model)})
    if len(prefixes) > 1:
        raise ValueError(f"{source} holds more than one {type(model).__name__}, named {_listed(prefixes)}")
    prefix = next(iter(prefixes), "")
    return {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def fill(
    state_dict: dict[str, Any], model: Network, flexible: bool = False, source: str = "the state dict"
) -> dict[str, np.ndarray]:
    """`convert_state_dict` to path → array; if `flexible`, with any number of classes and positions.

    Then the head may also be missing, or be present although the model has none. Errors name the `source`.
    """
    entries = plan(model)
    state_dict, prefixes = unwrapped(flat_state_dict(state_dict), model, {entry.source for entry in entries})
    if prefixes:
        log.info("%s: names without their prefix %s", source, ", ".join(map(printable, prefixes)))
    original, state_dict = state_dict, _as_in_table(state_dict, entries, model)
    if problems := _differences(state_dict, entries, model, flexible):
        raise ValueError(
            f"{source}: the weights do not fit {type(model).__name__}: {_in_words(problems, original, model)}"
        )
    shapes = variable_shapes(model)
    leaves: dict[str, np.ndarray] = {}
    for entry in entries:
        if entry.source not in state_dict:
            continue  # a missing head
        tensor = np.asarray(state_dict[entry.source])
        stacked, own = np.split(shapes[entry.target].shape, [len(entry.index)])
        tensor = tensor if entry.axes is None else tensor.transpose(entry.axes)
        tensor = tensor if tensor.ndim == len(own) else tensor.reshape(own)
        if entry.target not in leaves:
            leaves[entry.target] = np.empty((*stacked, *tensor.shape), np.float32)
        leaves[entry.target][entry.index] = tensor
    return leaves


def _as_in_table(state_dict: dict[str, Any], entries: list[Entry], model: Network) -> dict[str, np.ndarray]:
    """The tensors under the table's names, and in its shapes where a linear layer is stored as a 1×1 convolution."""
    shapes, renamed = {entry.source: entry.shape for entry in entries}, {}
    for name, tensor in state_dict.items():
        known = name_in_table(name, model)
        if known in renamed or (known != name and known in state_dict):
            known = name  # two tensors for one variable: this one is reported as unexpected
        tensor = np.asarray(tensor)
        if known in shapes and tensor.shape in _equivalent_shapes(shapes[known], known != name):
            tensor = tensor.reshape(shapes[known])
        renamed[known] = tensor
    return renamed


def _equivalent_shapes(shape: tuple[int, ...], renamed: bool) -> list[tuple[int, ...]]:
    """Other shapes of the same numbers: of a linear layer as a 1×1 convolution, or of all directions in one layer."""
    shapes = [(*shape, 1, 1)] if len(shape) == 2 else []
    shapes += [shape[:2]] if shape[2:] == (1, 1) else []
    return shapes + ([(shape[0] * shape[1], shape[2])] if renamed and len(shape) == 3 else [])


def _differences(
    state_dict: dict[str, np.ndarray], entries: list[Entry], model: Network, flexible: bool
) -> dict[str, list[str]]:
    """The names of tensors that do not fit, by kind of problem; empty if all fit."""
    expected, tables = {entry.source for entry in entries}, computed_tensors(model)
    found = [(entry, state_dict[entry.source]) for entry in entries if entry.source in state_dict]
    rows = {name.removesuffix("weight"): tensor.shape[:1] for name, tensor in state_dict.items()}
    heads = {rule.source for rule in table(model) if rule.target.endswith(HEAD)} if flexible else set()
    no_head = expected & heads if heads.isdisjoint(state_dict) else set()
    problems = {
        "missing": sorted(expected - set(state_dict) - no_head),
        "unexpected": sorted(
            set(state_dict) - expected - {*step_counters(entries), *tables, "n_averaged"} - (heads - expected)
        ),
        "wrong shape": [
            f"{entry.source} is {tensor.shape}, expected {entry.shape}"
            for entry, tensor in found
            if tensor.shape != entry.shape and not (flexible and _differs_adaptably(entry, tensor.shape))
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
    return {kind: names for kind, names in problems.items() if names}


def _differs_adaptably(entry: Entry, shape: tuple[int, ...]) -> bool:
    if len(shape) != len(entry.shape):
        return False
    axes = entry.axes or range(len(shape))
    return adaptable(entry.target, tuple(shape[i] for i in axes), tuple(entry.shape[i] for i in axes))


def _in_words(problems: dict[str, list[str]], state_dict: dict[str, np.ndarray], model: Network) -> str:
    """Describes the problems, and hints at a network that the weights would fit."""
    of_names_or_shapes = problems.keys() & {"missing", "unexpected", "wrong shape"}
    hints = _hints(state_dict, problems.get("missing", []), model) if of_names_or_shapes else []
    most = 3 if hints else 20
    return "; ".join([f"{kind} ({len(names)}): {_listed(names, most)}" for kind, names in problems.items()] + hints)


def _hints(state_dict: dict[str, np.ndarray], missing: list[str], model: Network) -> list[str]:
    """Hints at the architecture or family that the tensors belong to, or the options of `model` that they imply."""
    if missing and all(name.startswith("sr.") for name in missing):
        return ["this is the classifier alone: give the SR network's file too (convert: --sr_checkpoint FILE)"]
    if model.parts:
        parts = tensors_by_part(state_dict, model.parts)
        hints = [(part, hint) for part in parts if part for hint in _hints(parts[part], [], model.parts[part])]
        return [f"{part}: {hint.partition(' (convert')[0]}" for part, hint in hints]
    candidates = [network for network in map(create_model, list_models()) if _has_names_of(network, state_dict)]
    if names := [describe(network)["architecture"] for network in candidates if _has_tensors_of(network, state_dict)]:
        return [f"its tensors are those of {' or '.join(names)}{_release(names[0])} (convert: --model)"]
    kind = min(candidates, key=lambda network: len(table(network)), default=model)
    if type(kind) is not type(model) and not _has_names_of(model, state_dict):
        names = [name for name in list_models() if type(create_model(name)) is type(kind)]
        return [f"its tensors have the names of {', '.join(names)}{_release(names[0])} (convert: --model)"]
    if not any(_pattern(name_in_table(name, model)) in _patterns(model) for name in state_dict):
        return [f"no tensor has a name of {type(model).__name__}, so it holds a different network (convert: --model)"]
    recorded = recorded_options(_shapes(state_dict, model), type(model))
    implied = {name: value for name, value in recorded.items() if value not in (as_recorded(model, name), "fixed")}
    options = ", ".join(f"{option}={value!r}".replace(" ", "") for option, value in implied.items())
    return [f"its tensors imply other options: {options} (convert: --option NAME=VALUE)"] if options else []


def _has_tensors_of(model: Network, state_dict: dict[str, np.ndarray]) -> bool:
    """True if the tensors, whose names are those of the network, fit it in all but classes and positions."""
    recorded = recorded_options(_shapes(state_dict, model), type(model))
    if any(as_recorded(model, option) != value for option, value in recorded.items()):
        return False  # without building the table
    entries = plan(model)
    return not _differences(_as_in_table(state_dict, entries, model), entries, model, flexible=True)


def _has_names_of(model: Network, state_dict: dict[str, Any]) -> bool:
    """True if every tensor has a name of the network's table, with any numbers in it."""
    return (
        bool(state_dict)
        and not model.parts
        and all(_pattern(name_in_table(name, model)) in _patterns(model) for name in state_dict)
    )


def _patterns(model: Network) -> set[str]:
    names = [re.sub(r"{[^}]+}", "0", rule.source) for rule in table(model)]
    counters = [re.sub(r"running_mean$", "num_batches_tracked", name) for name in names]
    return {_pattern(name) for name in (*names, *counters, *computed_tensors(model))}


def _pattern(name: str) -> str:
    """The name with all numbers replaced by 0."""
    return re.sub(r"\d+", "0", name)


def _shapes(state_dict: dict[str, np.ndarray], model: Network) -> dict[str, tuple[int, ...]]:
    return {name_in_table(name, model): tensor.shape for name, tensor in state_dict.items()}


def _release(architecture: str) -> str:
    kind = type(create_model(architecture)).__name__
    return f", of {RELEASES[kind]}" if kind in RELEASES else ""


def _same_table(table: Any, expected: np.ndarray, other_grid: bool) -> bool:
    """True if a rotary table equals ours, to the precision of its dtype."""
    if table.shape != expected.shape:
        return other_grid
    exact = jnp.finfo(table.dtype).eps if jnp.issubdtype(table.dtype, jnp.floating) else 0
    return np.allclose(np.asarray(table, np.float32), expected, atol=max(1e-3, float(exact)))


def _listed(names: list[str], most: int = 20) -> str:
    shown = ", ".join(printable(name) for name in names[:most])
    return shown + (f", ... and {len(names) - most} more" if len(names) > most else "")


def export_state_dict(variables: dict[str, Any], model: Network) -> dict[str, np.ndarray]:
    """Converts variables to PyTorch's names and layouts, the inverse of `convert_state_dict`.

    Args:
      variables: as `model.init` returns them.
      model: the module they belong to.

    Returns:
      PyTorch name → float32 array, with rotary tables; `num_batches_tracked` is 0, since Flax does not count.
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
