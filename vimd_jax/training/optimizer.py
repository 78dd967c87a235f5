"""Learning-rate schedules and AdamW as the originals use them."""

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

    Args:
      config: name, learning_rate, min_learning_rate, warmup_learning_rate, warmup_epochs, num_epochs.
      steps_per_epoch: optimiser steps in an epoch.

    Raises:
      ValueError: unknown name, or a warm-up as long as the training.
    """
    if not 0 <= config.warmup_epochs < config.num_epochs:
        raise ValueError(
            f"config.schedule.warmup_epochs: {config.warmup_epochs} is not below num_epochs, {config.num_epochs}"
        )
    if config.name == "cosine":
        return _cosine(config, steps_per_epoch)
    if config.name == "timm_epoch":
        return _timm_epoch(config, steps_per_epoch)
    raise ValueError(f'config.schedule.name: {config.name!r} is unknown, choose "cosine" or "timm_epoch"')


def _cosine(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    warmup = round(config.warmup_epochs * steps_per_epoch)
    total = round(config.num_epochs * steps_per_epoch)

    def schedule(step):
        rising = step / max(warmup, 1)
        falling = jnp.clip((step - warmup) / max(total - warmup, 1), 0.0, 1.0)
        peak, low, first = config.learning_rate, config.min_learning_rate, config.warmup_learning_rate
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
      config: weight_decay, b1, b2, eps; clip_norm, the largest global norm of the gradients (None: any);
        decay_state_matrix, whether A_log is decayed. Vim means to exempt it, but as published it is decayed.
      params: the parameters to train.
      schedule: learning rate by step.
      decays: the network's `decays`, which says for the path of a parameter whether weight decay shrinks it; None is
        the rule of Vim.
    """
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask(params, config.decay_state_matrix, decays or Network.decays),
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


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
