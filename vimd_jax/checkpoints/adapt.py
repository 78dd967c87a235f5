"""Weights to start a network from: of the same network, another number of classes, or another grid of patches."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vimd_jax.models import describe
from vimd_jax.models.network import Network, input_images, variable_shapes
from vimd_jax.models.positions import CLASS_TOKENS, class_token_positions, resize_positions

MODES = ("correct", "reference")

# Of a classifier and of a segmenter; the last axis counts classes.
HEAD = ("/head/kernel", "/head/bias", "/classes/kernel", "/classes/bias")
_POSITIONS = "/position_embedding"
ADAPTABLE = ("num_classes", "image_size", "stride")  # the options in which they may differ


class Change(NamedTuple):
    """A difference between a checkpoint and a network, and what is done about it."""

    difference: str
    remedy: str


def resize_position_embedding(
    table: jax.Array,
    new_grid: int | tuple[int, int],
    mode: str = "correct",
    *,
    grid: tuple[int, int] | None = None,
    class_token: str | None = "middle",
) -> jax.Array:
    """Position embeddings for another grid of patches, by PyTorch's bicubic interpolation.

    Args:
      table: (1, tokens, dim), in sequence order, class tokens included.
      new_grid: (rows, columns) of patches wanted, or the side of a square.
      mode: "correct" keeps the class token's row and resizes those of the patches. "reference" does as the published
        code of Vim and ViMD: it takes the first row for the class token's wherever that stands, so that with one in the
        middle half the patches get their neighbour's row and the class token one of the grid.
      grid: (rows, columns) that the table is for; None means a square.
      class_token: where class tokens stand: "middle", "head", "double" (both ends) or None.

    Returns:
      (1, new tokens, dim) float32.

    Raises:
      ValueError: an unknown mode, or a table that does not hold the grid.
    """
    if mode not in MODES:
        raise ValueError(f"mode: {mode!r} is unknown, valid ones are {MODES}")
    if class_token not in CLASS_TOKENS:
        raise ValueError(f"class_token: {class_token!r} is unknown, valid ones are {CLASS_TOKENS}")
    new_grid = (new_grid, new_grid) if isinstance(new_grid, int) else tuple(new_grid)
    if len(new_grid) != 2 or min(new_grid) < 1:
        raise ValueError(f"new_grid: {new_grid} are not two numbers of patches, rows and columns")
    if mode == "reference" and class_token == "double":
        raise ValueError("mode: 'reference' is not defined for class_token 'double'; use 'correct'")
    num_patches = table.shape[1] - len(class_token_positions(class_token, 0))
    if grid is None:
        grid = (math.isqrt(max(num_patches, 0)),) * 2
    if table.ndim != 3 or table.shape[0] != 1 or num_patches < 1 or math.prod(grid) != num_patches:
        raise ValueError(
            f"table: shape {table.shape} with class_token {class_token!r} does not hold {grid[0]}x{grid[1]} patches; "
            "name the grid it was made for"
        )
    kept = "head" if mode == "reference" and class_token == "middle" else class_token
    return resize_positions(jnp.asarray(table, jnp.float32), grid, new_grid, kept)


def adapted_leaves(
    leaves: dict[str, Any],
    model: Network,
    *,
    origin: Network | None = None,
    mode: str = "correct",
    source: str = "the checkpoint",
) -> tuple[dict[str, Any], list[Change]]:
    """Variables in the shapes of `model`, where only the classes or the grid of patches differ.

    Args:
      leaves: path → array, every variable of the model, with the source's shapes. Those of a head may be missing, or be
        there though the model has none.
      model: the network to fill.
      origin: the network that the leaves are of, where it is known. It tells the grid of the positions; otherwise that
        is taken to be square where their number allows it.
      mode: as in `resize_position_embedding`.
      source: what errors name.

    Returns:
      The leaves in the model's shapes, and the changes made. A new head starts as the model starts it.

    Raises:
      ValueError: shapes that neither another number of classes nor another grid explains.
    """
    shapes = {path: leaf.shape for path, leaf in variable_shapes(model).items()}
    if wrong := [path for path in shapes if path in leaves and not adaptable(path, leaves[path].shape, shapes[path])]:
        found = ", ".join(f"{path} is {leaves[path].shape}, expected {shapes[path]}" for path in wrong[:20])
        raise ValueError(
            f"{source}: the weights do not fit {type(model).__name__}: wrong shape ({len(wrong)}): {found}"
        )
    leaves, changes = dict(leaves), []
    for change, paths in _changed_heads(leaves, shapes):
        changes.append(change)
        if paths[0] in shapes:
            leaves |= _initial_values(model, paths)
        else:
            leaves = {path: leaf for path, leaf in leaves.items() if path not in paths}
    for path in [path for path in shapes if path.endswith(_POSITIONS)]:
        network, grid = _owner(path, model), None if origin is None else _owner(path, origin).grid
        change = _other_grid(leaves[path].shape[1], network, grid, source)
        if change is None:
            continue
        old, difference = change
        leaves[path] = resize_position_embedding(
            leaves[path], network.grid, mode, grid=old, class_token=network.class_token
        )
        remedy = f"the position embedding is resized (mode {mode}){_stride_for(old, network)}"
        changes.append(Change(difference, remedy))
    return leaves, changes


def segmenter_leaves(
    leaves: dict[str, Any], origin: Network, model: Network, mode: str = "correct", source: str = "the checkpoint"
) -> tuple[dict[str, Any], list[Change]]:
    """Variables of a segmenter whose backbone starts from a classifier; the rest starts as the model starts it.

    Args:
      leaves: path → array, the variables of the classifier.
      origin: the classifier, of the backbone's class.
      model: the segmenter.
      mode: as in `resize_position_embedding`.
      source: what errors name.

    Returns:
      The segmenter's leaves, and the changes made. Rows of class tokens are taken out of the position table before it
      is resized for the backbone's grid.

    Raises:
      ValueError: a variable of the trunk is missing or has another shape.
    """
    shapes = {path: leaf.shape for path, leaf in variable_shapes(model).items()}
    trunk = {path: leaf for path, leaf in leaves.items() if path.split("/")[1] not in ("head", "norm")}
    table, known = trunk.get("params" + _POSITIONS), None
    if table is not None:
        patches = table.shape[1] - len(class_token_positions(origin.class_token, 0))
        known = model.clone(backbone=origin) if math.prod(origin.grid) == patches else None
        tokens = class_token_positions(origin.class_token, patches)
        trunk["params" + _POSITIONS] = np.delete(table, np.array(tokens, int), axis=1)
        trunk = {path: leaf for path, leaf in trunk.items() if not path.startswith("params/class_token")}
    placed = {path.replace("/", "/backbone/", 1): leaf for path, leaf in trunk.items()}
    own = {path for path in shapes if "/backbone/" in path and "/neck/" not in path}
    biases = {path for path in own - placed.keys() if path.endswith("norm/bias")}  # the classifier's norms have none
    unfit = (own ^ placed.keys()) - biases
    unfit |= {path for path in own & placed.keys() if not adaptable(path, placed[path].shape, shapes[path])}
    if unfit:
        raise ValueError(
            f"{source}: not the trunk of the segmenter's {type(origin).__name__}, {len(unfit)} of {len(own)} variables "
            f"differ: {', '.join(sorted(unfit)[:3])}"
        )
    placed |= _initial_values(model, [path for path in shapes if path not in placed])
    anew = Change("a classifier", "the neck and the heads of the segmenter are initialised anew and need training")
    placed, resized = adapted_leaves(placed, model, origin=known, mode=mode, source=source)
    return placed, [anew, *resized]


def adaptable(path: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a variable's shape differs from the wanted one in classes or positions at most."""
    axis = None
    if path.endswith(HEAD):
        axis = len(wanted) - 1
    elif path.endswith(_POSITIONS):
        axis = 1
    return len(shape) == len(wanted) and all(n == m or i == axis for i, (n, m) in enumerate(zip(shape, wanted)))


def _changed_heads(leaves: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[Change, list[str]]]:
    """For every head that differs in its classes what is done about it, and the paths of its variables."""
    heads = {path.rpartition("/")[0] for path in {*leaves, *shapes} if path.endswith(HEAD)}
    for head in sorted(heads):
        paths = sorted(path for path in {*leaves, *shapes} if path.startswith(f"{head}/"))
        old = next((leaves[path].shape[-1] for path in paths if path in leaves), "no")
        new = next((shapes[path][-1] for path in paths if path in shapes), "none")
        if old != new:
            difference = f"{old} classes in the checkpoint, {new} wanted"
            remedy = "left out" if new == "none" else "initialised anew and needs training"
            yield Change(difference, f"the head is {remedy}"), paths


def _owner(path: str, network: Network) -> Network:
    """The network, or the part of a composite, that the variable at this path belongs to."""
    for name in path.split("/")[1:]:
        if name not in network.parts:
            break
        network = network.parts[name]
    return network


def _other_grid(
    tokens: int, model: Network, grid: tuple[int, int] | None, source: str
) -> tuple[tuple[int, int], str] | None:
    """The grid that a table of so many tokens is for, and how it differs from the model's; None if it does not."""
    patches, assumed = tokens - len(class_token_positions(model.class_token, 0)), ""
    if grid is None:
        side = math.isqrt(max(patches, 0))
        grid, assumed = ((side, side), " (taken to be square)") if side * side == patches else (model.grid, "")
    if patches < 1 or math.prod(grid) != patches:
        raise ValueError(
            f"{source}: the position embedding is for {patches} patches, not for {grid[0]}x{grid[1]}; say what size of "
            "images it was made for (convert: --source_size HEIGHTxWIDTH)"
        )
    if grid == model.grid:
        return None
    return grid, "{}x{} patches{} in the checkpoint, {}x{} wanted".format(*grid, assumed, *model.grid)


def _stride_for(grid: tuple[int, int], model: Network) -> str:
    """A hint at the stride, if any, that has this grid."""
    for stride in [n for n in range(1, model.patch_size + 1) if model.patch_size % n == 0 and n != model.stride]:
        other = model.clone(stride=stride)
        if other.grid == grid:
            return f"; with stride {stride}, as {describe(other)['architecture']} has, it would be kept as it is"
    return ""


def _initial_values(model: Network, paths: list[str]) -> dict[str, jax.Array]:
    """The leaves as `model.init` makes them; jit drops the forward pass, on which they do not depend."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        images = input_images(model)
        leaves = flatten_dict(model.init(key, jnp.zeros(images.shape, images.dtype)), sep="/")
        return {path: leaves[path] for path in paths}

    return jax.jit(init)(jax.random.key(0))
