"""Which PyTorch tensor is which Flax variable: one table per network, read in both directions.

Every difference of layout between the two frameworks is a transposition, so a table row is a PyTorch name, a Flax
path and the axes. `{i}` in a PyTorch name counts layers; where the Flax path has no `{i}`, the layers are stacked on a
leading axis (`nn.scan`). Rows of variables that a model does not have, by its options, are skipped.
"""

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from vimd_jax.models.position import rotary_angles


class Rule(NamedTuple):
    """One table row; `axes` is the transposition from PyTorch's axes to Flax's (None: the same order)."""

    source: str
    target: str
    axes: tuple[int, ...] | None = None


class Entry(NamedTuple):
    """One PyTorch tensor, the shape it has there, and its place: the leaf `target`, or the slice `layer` of it."""

    source: str
    shape: tuple[int, ...]
    target: str
    layer: int | None
    axes: tuple[int, ...] | None


_LINEAR = (1, 0)  # (out, in) -> (in, out)
_CONV1D = (2, 1, 0)  # (out, in, width) -> (width, in, out)
_CONV2D = (2, 3, 1, 0)  # (out, in, height, width) -> (height, width, in, out)

_MIXER = "layers.{i}.mixer"
_STACKED_MIXER = "params/layers/mixer"


def _direction(name: str, a_log: str, suffix: str) -> tuple[Rule, ...]:
    """The rows of one scan direction of a Vim mixer; PyTorch marks the backward one by a suffix."""
    target = f"{_STACKED_MIXER}/{name}"
    return (
        Rule(f"{_MIXER}.conv1d{suffix}.weight", f"{target}/conv/kernel", _CONV1D),
        Rule(f"{_MIXER}.conv1d{suffix}.bias", f"{target}/conv/bias"),
        Rule(f"{_MIXER}.x_proj{suffix}.weight", f"{target}/x_proj/kernel", _LINEAR),
        Rule(f"{_MIXER}.dt_proj{suffix}.weight", f"{target}/dt_proj/kernel", _LINEAR),
        Rule(f"{_MIXER}.dt_proj{suffix}.bias", f"{target}/dt_proj/bias"),
        Rule(f"{_MIXER}.{a_log}", f"{target}/A_log"),
        Rule(f"{_MIXER}.D{suffix}", f"{target}/D"),
    )


VIM = (
    Rule("patch_embed.proj.weight", "params/patch_embed/kernel", _CONV2D),
    Rule("patch_embed.proj.bias", "params/patch_embed/bias"),
    Rule("cls_token", "params/class_token"),
    Rule("cls_token_head", "params/class_token_head"),
    Rule("cls_token_tail", "params/class_token_tail"),
    Rule("pos_embed", "params/position_embedding"),
    Rule("layers.{i}.norm.weight", "params/layers/norm/scale"),
    Rule("layers.{i}.norm.bias", "params/layers/norm/bias"),
    Rule(f"{_MIXER}.in_proj.weight", f"{_STACKED_MIXER}/in_proj/kernel", _LINEAR),
    *_direction("forward", "A_log", ""),
    *_direction("backward", "A_b_log", "_b"),
    Rule(f"{_MIXER}.A_b_log", f"{_STACKED_MIXER}/forward/A_log_backward"),
    Rule(f"{_MIXER}.gamma", f"{_STACKED_MIXER}/layer_scale"),
    Rule(f"{_MIXER}.out_proj.weight", f"{_STACKED_MIXER}/out_proj/kernel", _LINEAR),
    Rule("norm_f.weight", "params/norm/scale"),
    Rule("norm_f.bias", "params/norm/bias"),
    Rule("head.weight", "params/head/kernel", _LINEAR),
    Rule("head.bias", "params/head/bias"),
)


def _batch_norm(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.weight", f"params/{target}/scale"),
        Rule(f"{source}.bias", f"params/{target}/bias"),
        Rule(f"{source}.running_mean", f"batch_stats/{target}/mean"),
        Rule(f"{source}.running_var", f"batch_stats/{target}/var"),
    )


SRRESNET = (
    Rule("conv1.0.weight", "params/conv_in/kernel", _CONV2D),
    Rule("conv1.0.bias", "params/conv_in/bias"),
    Rule("conv1.1.weight", "params/prelu_in/alpha"),
    Rule("trunk.{i}.rcb.0.weight", "params/blocks/conv1/kernel", _CONV2D),
    *_batch_norm("trunk.{i}.rcb.1", "blocks/norm1"),
    Rule("trunk.{i}.rcb.2.weight", "params/blocks/prelu/alpha"),
    Rule("trunk.{i}.rcb.3.weight", "params/blocks/conv2/kernel", _CONV2D),
    *_batch_norm("trunk.{i}.rcb.4", "blocks/norm2"),
    Rule("conv2.0.weight", "params/conv_mid/kernel", _CONV2D),
    *_batch_norm("conv2.1", "norm_mid"),
    Rule("upsampling.{i}.upsample_block.0.weight", "params/upsample_{i}/conv/kernel", _CONV2D),
    Rule("upsampling.{i}.upsample_block.0.bias", "params/upsample_{i}/conv/bias"),
    Rule("upsampling.{i}.upsample_block.2.weight", "params/upsample_{i}/prelu/alpha"),
    Rule("conv3.weight", "params/conv_out/kernel", _CONV2D),
    Rule("conv3.bias", "params/conv_out/bias"),
)


def _inside(part: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rows of a network that is one part of a larger one."""

    def target(path: str) -> str:
        collection, rest = path.split("/", 1)
        return f"{collection}/{part}/{rest}"

    return tuple(Rule(f"{part}.{rule.source}", target(rule.target), rule.axes) for rule in rules)


TABLES = {"Vim": VIM, "SRResNet": SRRESNET, "SRVM": (*_inside("sr", SRRESNET), *_inside("classifier", VIM))}

# The option of Vim on which tensors depend, by a part of their names.
_OPTIONS = {
    "rope.freqs": "rope",
    "mixer.gamma": "layer_scale",
    "norm.bias": "norm",
    "norm_f.bias": "norm",
    "_b.": "bimamba_type",
    "A_b_log": "bimamba_type",
    "cls_token": "class_token",
}


def input_images(model: nn.Module) -> jax.ShapeDtypeStruct:
    """A batch of one image as `model.init` expects it."""
    size = getattr(getattr(model, "classifier", model), "image_size", 16)  # super-resolution takes any size
    height, width = (size, size) if isinstance(size, int) else size
    return jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)


def variable_shapes(model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Path → shape and dtype of every leaf of `model.init`, computed without running the model."""
    return flatten_dict(jax.eval_shape(model.init, jax.random.key(0), input_images(model)), sep="/")


def plan(model: nn.Module) -> list[Entry]:
    """Every PyTorch tensor that `model` needs, with its place among the variables.

    Args:
      model: a Flax module of vimd_jax.models.

    Raises:
      ValueError: no table describes this kind of model, or the table leaves one of its variables without a source.
    """
    kind = type(model).__name__
    if kind not in TABLES:
        raise ValueError(f"model {kind} has no PyTorch counterpart here; convertible: {', '.join(TABLES)}")
    shapes = variable_shapes(model)
    entries = [entry for rule in TABLES[kind] for entry in _expand(rule, shapes)]
    if uncovered := sorted(set(shapes) - {entry.target for entry in entries}):
        raise ValueError(f"no PyTorch name is known for {_listed(uncovered)} of {kind}, with the options it has")
    return entries


def _expand(rule: Rule, shapes: dict[str, Any]) -> list[Entry]:
    """The entries of one table row; none where this model (by its class tokens, its stages) lacks the variable."""

    def entry(source: str, target: str, layer: int | None = None) -> Entry:
        shape = shapes[target].shape[layer is not None :]
        if rule.axes is not None:
            shape = tuple(shape[axis] for axis in np.argsort(rule.axes))
        return Entry(source, shape, target, layer, rule.axes)

    if "{i}" in rule.target:
        numbered = [(rule.source.format(i=i), rule.target.format(i=i)) for i in range(len(shapes))]
        return [entry(source, target) for source, target in numbered if target in shapes]
    if rule.target not in shapes:
        return []
    if "{i}" not in rule.source:
        return [entry(rule.source, rule.target)]
    return [entry(rule.source.format(i=i), rule.target, i) for i in range(shapes[rule.target].shape[0])]


def step_counters(entries: list[Entry]) -> list[str]:
    """PyTorch's `num_batches_tracked` of every batch norm: read by nothing at its fixed momentum, so Flax has none."""
    ending = "running_mean"
    return [e.source.removesuffix(ending) + "num_batches_tracked" for e in entries if e.source.endswith(ending)]


def rotary_tables(model: nn.Module) -> dict[str, np.ndarray]:
    """PyTorch's buffers of a Vim with rotary positions, which are computed here."""
    classifier = getattr(model, "classifier", model)
    if not getattr(classifier, "rope", False):
        return {}
    prefix = "" if classifier is model else "classifier."
    angles = rotary_angles(classifier.grid, None, classifier.embed_dim)
    return {f"{prefix}rope.freqs_cos": np.cos(angles), f"{prefix}rope.freqs_sin": np.sin(angles)}


def convert_state_dict(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """PyTorch weights as the variables of `model`, strictly: every tensor is used once, every variable is filled once.

    Args:
      state_dict: PyTorch name → array, of the original classes (`VisionMamba`, `SRResNet`). For SRVM-Net the two
        halves: `{"sr": {...}, "classifier": {...}}`, or one flat dict with these prefixes. `num_batches_tracked` is
        ignored, rotary tables are compared with ours.
      model: Vim, SRResNet or SRVM; its options decide the expected names and shapes.

    Returns:
      `{"params": ..., "batch_stats": ...}` as `model.init` would (`batch_stats` where the model has them), float32
      whatever floating-point dtype the tensors have.

    Raises:
      ValueError: missing or unexpected names, wrong shapes, dtypes or rotary tables; one message lists them all.
    """
    return nested(fill(state_dict, model))


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Path → leaf as a tree of JAX arrays."""
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
    state_dict = flat_state_dict(state_dict)
    entries = plan(model)
    if problems := _differences(state_dict, entries, model, flexible):
        raise ValueError(f"{source}: the weights do not fit {type(model).__name__}: {'; '.join(problems)}")
    layers = Counter(entry.target for entry in entries)
    leaves: dict[str, np.ndarray] = {}
    for entry in entries:
        tensor = np.asarray(state_dict[entry.source])
        tensor = tensor if entry.axes is None else tensor.transpose(entry.axes)
        if entry.layer is None:
            leaves[entry.target] = np.array(tensor, np.float32, order="C")
            continue
        if entry.layer == 0:
            leaves[entry.target] = np.empty((layers[entry.target], *tensor.shape), np.float32)
        leaves[entry.target][entry.layer] = tensor
    return leaves


def _differences(
    state_dict: dict[str, Any], entries: list[Entry], model: nn.Module, flexible: tuple[str, ...]
) -> list[str]:
    """What keeps the weights from fitting, each kind in a few words; nothing if they do."""
    expected, tables = {entry.source for entry in entries}, rotary_tables(model)
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
    if options := sorted({option for part, option in _OPTIONS.items() if any(part in name for name in odd)}):
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
        tensor = leaves[entry.target] if entry.layer is None else leaves[entry.target][entry.layer]
        if entry.axes is not None:
            tensor = tensor.transpose(np.argsort(entry.axes))
        tensors[entry.source] = np.ascontiguousarray(tensor, np.float32)
    counters = {name: np.zeros((), np.int64) for name in step_counters(entries)}
    return tensors | rotary_tables(model) | counters
