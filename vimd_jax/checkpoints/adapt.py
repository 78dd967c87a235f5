"""Weights to start a network from: of the same network, another number of classes, or another grid of patches."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from vimd_jax.models import describe
from vimd_jax.models.network import input_images, variable_shapes
from vimd_jax.models.positions import CLASS_TOKENS, class_token_positions, resize_positions

MODES = ("correct", "reference")

_HEAD = ("/head/kernel", "/head/bias")
_POSITIONS = "/position_embedding"
ADAPTABLE = ("num_classes", "image_size", "stride")  # the options in which they may differ


class Change(NamedTuple):
    """Where a checkpoint and a network differ, and what `fit` does about it."""

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
        raise ValueError(f"mode: {mode!r} is unknown, choose one of {MODES}")
    if class_token not in CLASS_TOKENS:
        raise ValueError(f"class_token: {class_token!r} is unknown, choose one of {CLASS_TOKENS}")
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


def fit(
    leaves: dict[str, Any],
    model: nn.Module,
    *,
    grid: tuple[int, int] | None = None,
    mode: str = "correct",
    source: str = "the checkpoint",
) -> tuple[dict[str, Any], list[Change]]:
    """Makes the head and the position embedding fit `model`, where only the classes or the grid differ.

    Args:
      leaves: path → array, every variable of the model, with the source's shapes.
      model: the network to fit.
      grid: the grid of the source's positions; None means a square, where their number allows it.
      mode: as in `resize_position_embedding`.
      source: what errors name.

    Returns:
      The leaves in the model's shapes, and the changes made. A new head starts as the model starts it.

    Raises:
      ValueError: shapes that neither another number of classes nor another grid explains.
    """
    shapes = {path: leaf.shape for path, leaf in variable_shapes(model).items()}
    if rest := [path for path in shapes if not differs_as_fit_can(path, leaves[path].shape, shapes[path])]:
        found = ", ".join(f"{path} is {leaves[path].shape}, expected {shapes[path]}" for path in rest[:20])
        raise ValueError(f"{source}: the weights do not fit {type(model).__name__}: wrong shape ({len(rest)}): {found}")
    leaves, changes = dict(leaves), []
    heads = [path for path in shapes if path.endswith(_HEAD)]
    if heads and leaves[heads[0]].shape != shapes[heads[0]]:
        old, new = leaves[heads[0]].shape[-1], shapes[heads[0]][-1]
        leaves |= _initial_values(model, heads)
        changes.append(
            Change(f"{old} classes in the checkpoint, {new} wanted", "the head is initialised anew and needs training")
        )
    classifier = getattr(model, "classifier", model)
    for path in [path for path in shapes if path.endswith(_POSITIONS)]:
        change = _other_grid(leaves[path].shape[1], classifier, grid, source)
        if change is None:
            continue
        old, difference = change
        leaves[path] = resize_position_embedding(
            leaves[path], classifier.grid, mode, grid=old, class_token=classifier.class_token
        )
        changes.append(
            Change(difference, f"the position embedding is resized (mode {mode}){_stride_for(old, classifier)}")
        )
    return leaves, changes


def differs_as_fit_can(path: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a variable's shape differs from the wanted one in classes or positions at most."""
    free = {_HEAD[0]: 1, _HEAD[1]: 0, _POSITIONS: 1}
    axis = next((axis for ending, axis in free.items() if path.endswith(ending)), None)
    return len(shape) == len(wanted) and all(n == m or i == axis for i, (n, m) in enumerate(zip(shape, wanted)))


def _other_grid(
    tokens: int, model: nn.Module, grid: tuple[int, int] | None, source: str
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


def _stride_for(grid: tuple[int, int], model: nn.Module) -> str:
    """Which stride, if any, has that grid."""
    for stride in [n for n in range(1, model.patch_size + 1) if model.patch_size % n == 0 and n != model.stride]:
        other = model.clone(stride=stride)
        if other.grid == grid:
            return f"; with stride {stride}, as {describe(other)['architecture']} has, it would be kept as it is"
    return ""


def _initial_values(model: nn.Module, paths: list[str]) -> dict[str, jax.Array]:
    """What `model.init` gives these leaves; jit drops the forward pass, on which they do not depend."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        images = input_images(model)
        leaves = flatten_dict(model.init(key, jnp.zeros(images.shape, images.dtype)), sep="/")
        return {path: leaves[path] for path in paths}

    return jax.jit(init)(jax.random.key(0))
