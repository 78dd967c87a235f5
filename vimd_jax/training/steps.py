"""What one step computes: the objective of each training stage, the update, and the sums of an evaluation.

Everything here is a pure function of arrays, traced once and run on every device (see parallel.py).
A batch holds uint8 pictures of the same crop, "high" (b, H, W, 3) and "low" (b, h, w, 3), "label" (b,), "weight" (b,).
"""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from vimd_jax import losses
from vimd_jax.models.srvm import bicubic
from vimd_jax.training.parallel import AXIS, over_devices

Batch = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """What training changes, and what a checkpoint holds."""

    step: jax.Array
    params: Any  # of the network that is trained; in stage "student" of its classifier alone
    batch_stats: Any  # of the SR network in stage "sr", else {}
    opt_state: optax.OptState
    ema_params: Any  # {} when config.ema_decay is 0


def create_state(
    config: ConfigDict, params: Any, batch_stats: Any, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if config.ema_decay else {},
    )


def inference_variables(config: ConfigDict, state: TrainState, frozen: Any) -> Any:
    """Variables of the network that a stage trains, with the averaged weights where they are kept."""
    return _join(state.ema_params if config.ema_decay else state.params, state.batch_stats, frozen.get("sr"))


def _join(params: Any, batch_stats: Any, frozen_sr: Any) -> Any:
    """Flax variables of the trained network; around a student's classifier it puts the frozen SR network."""
    if frozen_sr is None:
        return {"params": params, "batch_stats": batch_stats}
    stats = {"sr": frozen_sr["batch_stats"]} if frozen_sr else {}
    return {
        "params": {"classifier": params, **({"sr": frozen_sr["params"]} if frozen_sr else {})},
        "batch_stats": stats,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Objectives: (variables, frozen teacher, batch, rng) -> loss, its terms, batch statistics


def _sr_objective(config: ConfigDict, network: nn.Module, teacher: nn.Module | None) -> Callable:
    """Pixel loss: mean squared error between the restored and the true picture (Ledig et al., SRGAN, eq. 4)."""

    def objective(variables, frozen, batch, rngs):
        restored, updated = network.apply(variables, unit(batch["low"]), train=True, mutable=["batch_stats"])
        loss = jnp.mean(jnp.square(restored - unit(batch["high"])))
        return loss, {"pixel": loss}, updated["batch_stats"]

    return objective


def _teacher_objective(config: ConfigDict, network: nn.Module, teacher: nn.Module | None) -> Callable:
    """Label-smoothed cross-entropy on the high-resolution picture."""

    def objective(variables, frozen, batch, rngs):
        logits = network.apply(variables, unit(batch["high"]), train=True, rngs=rngs)
        loss = losses.label_smoothing_cross_entropy(logits, batch["label"], config.loss.label_smoothing)
        return loss, {"cross_entropy": loss}, {}

    return objective


def _student_objective(config: ConfigDict, network: nn.Module, teacher: nn.Module | None) -> Callable:
    """L = L_CE + alpha L_LD + beta L_HSD of the ViMD paper: labels, the teacher's logits, its hidden states."""
    weights = config.loss
    layers = hidden_layers(weights.hidden_layers)

    def objective(variables, frozen, batch, rngs):
        logits, features = network.apply(variables, unit(batch["low"]), train=True, return_features=True, rngs=rngs)
        cross_entropy = losses.label_smoothing_cross_entropy(logits, batch["label"], weights.label_smoothing)
        loss, terms = cross_entropy, {"cross_entropy": cross_entropy}
        if teacher is not None:
            high = unit(batch["high"])
            teacher_logits, teacher_features = teacher.apply(frozen["teacher"], high, return_features=True)
        if weights.logits_weight:
            terms["logits"] = losses.logits_distillation(logits, teacher_logits, weights.temperature)
            loss += weights.logits_weight * terms["logits"]
        if weights.hidden_weight:
            states = features["hidden_states"], teacher_features["hidden_states"]
            terms["hidden"] = losses.hidden_state_distillation(*states, layers, weights.hidden_normalize)
            loss += weights.hidden_weight * terms["hidden"]
        return loss, terms, {}

    return objective


_OBJECTIVES = {"sr": _sr_objective, "teacher": _teacher_objective, "student": _student_objective}


def hidden_layers(text: str) -> str | tuple[int, ...]:
    """Reads config.loss.hidden_layers: "all", "last", or layer numbers as in "5,11,23"."""
    if text in ("all", "last"):
        return text
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(
            f'config.loss.hidden_layers is {text!r}: give "all", "last" or layer numbers as in "5,11,23".'
        ) from None


def distils(config: ConfigDict) -> bool:
    """Whether the stage needs a teacher."""
    return config.stage == "student" and bool(config.loss.logits_weight or config.loss.hidden_weight)


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def make_train_step(
    config: ConfigDict, network: nn.Module, teacher: nn.Module | None, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """One optimiser step over all devices: (state, frozen, batch) -> (state, metrics), both replicated."""
    objective = _OBJECTIVES[config.stage](config, network, teacher)

    def train_step(state, frozen, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        rngs = {"drop_path": jax.random.fold_in(key, jax.lax.axis_index(AXIS))}

        def loss_of(params):
            loss, terms, stats = objective(_join(params, state.batch_stats, frozen.get("sr")), frozen, batch, rngs)
            return loss, (terms, stats)

        (loss, (terms, batch_stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        gradients, metrics = jax.lax.pmean((gradients, {"loss": loss, **terms}), AXIS)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = (
            optax.incremental_update(params, state.ema_params, 1 - config.ema_decay) if config.ema_decay else {}
        )
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        return TrainState(state.step + 1, params, batch_stats, opt_state, ema_params), metrics

    return over_devices(train_step, donate_state=True)


def make_eval_step(config: ConfigDict, network: nn.Module) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """Sums of one evaluation batch over all devices: (variables, batch) -> sums, each picture counted by its weight."""
    sums = _restoration_sums if config.stage == "sr" else _classification_sums
    picture = "high" if config.stage == "teacher" else "low"

    def eval_step(variables, batch):
        output = network.apply(variables, unit(batch[picture]))
        return jax.lax.psum(sums(output, batch), AXIS)

    return over_devices(eval_step)


def _classification_sums(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    label, weight, classes = batch["label"], batch["weight"], logits.shape[-1]
    true_logit = jnp.take_along_axis(logits, label[:, None], axis=-1)
    rank = jnp.sum(logits > true_logit, axis=-1)
    predicted = jax.nn.one_hot(jnp.argmax(logits, -1), classes)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return {
        "count": jnp.sum(weight),
        "loss": jnp.sum(weight * loss),
        "top5": jnp.sum(weight * (rank < 5)),
        "confusion": jnp.einsum("b,bt,bp->tp", weight, jax.nn.one_hot(label, classes), predicted),
    }


def _restoration_sums(restored: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    high = unit(batch["high"])
    return {
        "count": jnp.sum(batch["weight"]),
        "psnr": jnp.sum(batch["weight"] * psnr(restored, high)),
        "psnr_bicubic": jnp.sum(batch["weight"] * psnr(bicubic(unit(batch["low"]), high.shape[1]), high)),
    }


def psnr(image: jax.Array, truth: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of each picture; (b, H, W, 3) in [0, 1] -> (b,)."""
    return -10 * jnp.log10(jnp.maximum(jnp.mean(jnp.square(image - truth), axis=(1, 2, 3)), 1e-10))


def unit(pictures: jax.Array) -> jax.Array:
    """uint8 pictures as float32 in [0, 1]."""
    return pictures.astype(jnp.float32) / 255
