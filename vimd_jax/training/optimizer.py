"""Learning-rate schedules and AdamW as the originals use them."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from vimd_jax.models.network import Network


def create_schedule(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate of every step, counted from 0.

    "cosine": per step, linearly from warmup_learning_rate to learning_rate, then along half a cosine to
    min_learning_rate.
    "timm_epoch": the originals' (timm 0.4.12, stepped after each epoch with the number of the one just finished):
    constant within an epoch, one epoch late, and the cosine's clock starts with the warm-up.
    "staircase": LocalMamba's and EfficientVMamba's: the warm-up rises once an epoch, the cosine falls at every step.
    "poly": MMSegmentation's: per step, linearly to learning_rate, which the last step of the warm-up has, then along
    a power of the share of the steps that are left to min_learning_rate, which the last step of all has.
    "poly_mmcv": of Vim's segmenters (mmcv 1): the power falls from the first step on, and the warm-up multiplies it.

    Args:
      config: name, learning_rate, min_learning_rate, warmup_learning_rate, warmup_epochs, num_epochs; optional are
        warmup_steps and num_steps, which count instead of the epochs where they are above 0, and power, of "poly".
      steps_per_epoch: optimiser steps in an epoch.

    Raises:
      ValueError: unknown name, or a warm-up as long as the training.
    """
    warmup, total = schedule_steps(config, steps_per_epoch)
    if config.name in ("timm_epoch", "staircase") and config.get("num_steps"):
        raise ValueError(f"config.schedule.num_steps: {config.name} counts epochs, set num_steps and warmup_steps to 0")
    if config.get("num_steps") and not warmup < total:
        raise ValueError(f"config.schedule.warmup_steps: {warmup} is not below num_steps, {total}")
    if not config.get("num_steps") and not 0 <= config.warmup_epochs < config.num_epochs:
        raise ValueError(
            f"config.schedule.warmup_epochs: {config.warmup_epochs} is not below num_epochs, {config.num_epochs}"
        )
    if config.name == "cosine":
        return _cosine(config, warmup, total)
    if config.name in ("poly", "poly_mmcv"):
        return _poly(config, warmup, total)
    if config.name == "timm_epoch":
        return _timm_epoch(config, steps_per_epoch)
    if config.name == "staircase":
        return _staircase(config, steps_per_epoch)
    raise ValueError(
        f"config.schedule.name: {config.name!r} is unknown, choose cosine, timm_epoch, staircase, poly or poly_mmcv"
    )


def schedule_steps(config: ConfigDict, steps_per_epoch: int) -> tuple[int, int]:
    """Steps of the warm-up and of the whole run."""
    if config.get("num_steps"):
        return config.warmup_steps, config.num_steps
    return round(config.warmup_epochs * steps_per_epoch), round(config.num_epochs * steps_per_epoch)


def scaled_schedule(config: ConfigDict) -> ConfigDict:
    """config.schedule with the learning rate for config.batch_size, which reference_batch_size scales linearly.

    Only the peak is scaled, as DeiT does (Touvron et al., https://arxiv.org/abs/2012.12877, section 6).
    """
    schedule = config.schedule.copy_and_resolve_references()
    if schedule.reference_batch_size:
        schedule.learning_rate *= config.batch_size / schedule.reference_batch_size
    return schedule


def _poly(config: ConfigDict, warmup: int, total: int) -> optax.Schedule:
    peak, low, first, power = (
        config.learning_rate, config.min_learning_rate, config.warmup_learning_rate, config.get("power", 1.0)
    )  # fmt: skip

    def mmseg(step):
        rising = first + (peak - first) * step / max(warmup - 1, 1)
        left = 1 - (step - warmup) / max(total - warmup - 1, 1)
        return jnp.where(step < warmup, jnp.minimum(rising, peak), low + (peak - low) * jnp.clip(left, 0, 1) ** power)

    def mmcv(step):
        falling = low + (peak - low) * jnp.clip(1 - step / total, 0, 1) ** power
        missing = jnp.clip(1 - step / max(warmup, 1), 0, 1) * (1 - first / peak)
        return falling * (1 - missing)

    return mmseg if config.name == "poly" else mmcv


def _cosine(config: ConfigDict, warmup: int, total: int) -> optax.Schedule:
    def schedule(step):
        rising = step / max(warmup, 1)
        falling = jnp.clip((step - warmup) / max(total - warmup, 1), 0.0, 1.0)
        peak, low, first = config.learning_rate, config.min_learning_rate, config.warmup_learning_rate
        decayed = low + (peak - low) * 0.5 * (1 + jnp.cos(jnp.pi * falling))
        return jnp.where(step < warmup, first + (peak - first) * rising, decayed)

    return schedule


def _staircase(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    warmup, total = config.warmup_epochs * steps_per_epoch, config.num_epochs * steps_per_epoch
    peak, low, first = config.learning_rate, config.min_learning_rate, config.warmup_learning_rate

    def schedule(step):
        rising = (step // steps_per_epoch) / max(config.warmup_epochs, 1)
        falling = jnp.maximum(step - warmup - 1, 0) / (total - warmup)
        decayed = low + (peak - low) * 0.5 * (1 + jnp.cos(jnp.pi * falling))
        return jnp.where(step < warmup, first + (peak - first) * rising, decayed)

    return schedule


def _timm_epoch(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    t = np.maximum(np.arange(config.num_epochs) - 1, 0)  # the lag: epochs 0 and 1 both use the value of t = 0
    peak, low, first = config.learning_rate, config.min_learning_rate, config.warmup_learning_rate
    rising = first + t * (peak - first) / max(config.warmup_epochs, 1)
    decayed = low + (peak - low) * 0.5 * (1 + np.cos(np.pi * t / config.num_epochs))
    # A table in float64: the published rates differ by four orders of magnitude, which float32 arithmetic would blur.
    table = np.where(t < config.warmup_epochs, rising, decayed)

    def schedule(step):
        epoch = jnp.minimum(step // steps_per_epoch, len(table) - 1)
        return jnp.asarray(table, jnp.float32)[epoch]

    return schedule


def create_optimizer(
    config: ConfigDict,
    params: Any,
    schedule: optax.Schedule,
    decays: Callable[[tuple[str, ...]], bool] | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101) with the originals' choice of decayed parameters.

    Args:
      config: weight_decay, b1, b2, eps; clip_norm, the largest global norm of the gradients (None or 0: any);
        decay_state_matrix, whether A_log is decayed. Vim means to exempt it, but as published it is decayed.
        freeze, a regular expression of the paths that stay as they are (optional); layer_decay and
        layer_decay_of, see `layer_scales` (optional).
      params: the parameters to train.
      schedule: learning rate by step.
      decays: the network's `decays`, which says for the path of a parameter whether weight decay shrinks it; None is
        the rule of Vim.

    Raises:
      ValueError: config.optimizer.freeze is no regular expression, or freezes nothing, or all.
    """
    layer_decay, freeze = config.get("layer_decay", 1.0), config.get("freeze", "")
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask(params, config.decay_state_matrix, decays or Network.decays),
    )
    parts = [adamw]
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if layer_decay != 1:
        parts.append(_scale_by_tree(layer_scales(params, layer_decay, config.get("layer_decay_of", "layers"))))
    if freeze:
        trains = _scale_by_tree(jax.tree.map(lambda frozen: 0.0 if frozen else 1.0, frozen_mask(params, freeze)))
        parts = [trains, *parts, trains]  # frozen gradients do not count for the norm, frozen weights do not shrink
    return optax.chain(*parts) if len(parts) > 1 else adamw


def _scale_by_tree(scales: Any) -> optax.GradientTransformation:
    """Multiplies every leaf of the updates by its own scale."""
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales))


def frozen_mask(params: Any, pattern: str) -> Any:
    """True for the parameters whose path, as "layers/mixer/in_proj/kernel", contains a match of a regular expression.

    Raises:
      ValueError: it is none, or it matches nothing, or everything.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"config.optimizer.freeze is {pattern!r}, which is no regular expression: {error}") from error
    paths = jax.tree_util.tree_map_with_path(lambda path, _: "/".join(key.key for key in path), params)
    mask = jax.tree.map(lambda path: bool(expression.search(path)), paths)
    matches = jax.tree.leaves(mask)
    if any(matches) != all(matches):
        return mask
    names = ", ".join(sorted({path.split("/")[0] for path in jax.tree.leaves(paths)}))
    raise ValueError(
        f"config.optimizer.freeze is {pattern!r}, which matches {'every' if all(matches) else 'no'} parameter; their "
        f"paths begin with {names}"
    )


def layer_scales(params: Any, decay: float, decayed: str = "layers") -> Any:
    """Layer-wise decay of the learning rate: decay^(distance to the head), as BEiT fine-tunes.

    The head and the last norm have distance 0, the last layer 1, the embeddings the most (Bao et al.,
    https://arxiv.org/abs/2106.08254). The merging of patches between two stages counts as the layer that follows; of a
    segmenter the heads and what stands between them and the backbone have distance 0.

    Args:
      params: of the network.
      decay: factor from each layer to the one before it.
      decayed: "layers", or only the "embeddings", as Vim's segmenters were trained: their code looks for layers of
        another name, and leaves all of them at the full rate.
    """
    if "backbone" in params:
        scales = jax.tree.map(lambda _: jnp.ones((), jnp.float32), params)
        return {**scales, "backbone": layer_scales(params["backbone"], decay, decayed)}
    stacks = sorted(name for name in params if name == "layers" or name.startswith("stage_"))
    depths = [len(jax.tree.leaves(params[name])[0]) for name in stacks]
    before = dict(zip(stacks, np.cumsum([1, *depths])))
    before |= {f"downsample_{i}": before[f"stage_{i + 1}"] for i in range(len(stacks) - 1)}
    last = 1 + sum(depths)

    def scale(path, leaf):
        name = path[0].key
        if decayed == "embeddings" and name in before:
            numbers = last
        elif name in stacks:
            numbers = before[name] + np.arange(len(leaf)).reshape(-1, *[1] * (leaf.ndim - 1))
        else:
            numbers = before.get(name, last if name in ("norm", "head", "neck", "hidden_map") else 0)
        return jnp.asarray(float(decay) ** (last - numbers), jnp.float32)

    return jax.tree_util.tree_map_with_path(scale, params)


def decay_mask(
    params: Any,
    decay_state_matrix: bool = True,
    decays: Callable[[tuple[str, ...]], bool] = Network.decays,
) -> Any:
    """True for the parameters that weight decay shrinks: those that `decays` names, state matrices only if asked."""

    def shrinks(path, _):
        names = tuple(key.key for key in path)
        return decays(names) and (decay_state_matrix or not names[-1].startswith("A_log"))

    return jax.tree_util.tree_map_with_path(shrinks, params)
