"""What one step computes: the objective of each training stage, the update, and the sums of an evaluation.

Everything here is a pure function of arrays, traced once and run on every device (see parallel.py).
A batch holds uint8 images of the same crop, "high" (b, H, W, 3) and "low" (b, h, w, 3), "target" (b,), "weight" (b,).
Mixup and cutmix make the images float32, in the same range, and add "targets" (b, classes), the soft labels.
"""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vimd_jax import losses
from vimd_jax.models.network import input_images
from vimd_jax.models.srvm import bicubic
from vimd_jax.training import hidden_map
from vimd_jax.training.mixing import mix
from vimd_jax.training.parallel import AXIS, over_devices
from vimd_jax.training.roles import Networks

Batch = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """What training changes, and what a checkpoint of a run holds; the frozen networks are not part of it."""

    step: jax.Array
    params: Any  # of the trained network
    batch_stats: Any  # of the trained network; {} if it has none
    opt_state: optax.OptState
    average: Any  # of params and batch_stats, an exponential moving one; {} when config.ema_decay is 0


def create_state(config: ConfigDict, variables: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        average=jax.tree.map(jnp.copy, variables) if config.ema_decay else {},
    )


def trained_variables(config: ConfigDict, state: TrainState) -> Any:
    """Variables of the trained network to evaluate and save: the average where it is kept."""
    variables = state.average if config.ema_decay else _variables(state.params, state.batch_stats)
    params = {name: leaf for name, leaf in variables["params"].items() if name != hidden_map.NAME}
    return {**variables, "params": params}


def _variables(params: Any, batch_stats: Any) -> Any:
    return {"params": params} | ({"batch_stats": batch_stats} if batch_stats else {})


# ---------------------------------------------------------------------------------------------------------------------
# Objectives: (variables, frozen variables by role, batch, rngs) -> loss, (its terms, updated batch statistics)


def _sr_objective(config: ConfigDict, networks: Networks) -> Callable:
    """Pixel loss: mean squared error between the restored and the true image (Ledig et al., SRGAN, eq. 4)."""

    def objective(variables, frozen, batch, rngs):
        restored, batch_stats = _forward(networks, variables, unit(batch["low"]), rngs)
        loss = jnp.mean(jnp.square(restored - unit(batch["high"])))
        return loss, ({"pixel": loss}, batch_stats)

    return objective


def _classifier_objective(config: ConfigDict, networks: Networks) -> Callable:
    """The loss on the labels, from the high-resolution image."""

    def objective(variables, frozen, batch, rngs):
        logits, batch_stats = _forward(networks, variables, unit(batch["high"]), rngs)
        loss = _label_loss(config.loss, logits, batch)
        return loss, ({config.loss.label_loss: loss}, batch_stats)

    return objective


def _student_objective(config: ConfigDict, networks: Networks) -> Callable:
    """L = L_CE + alpha L_LD + beta L_HSD of the ViMD paper: labels, the teacher's logits, its hidden states."""
    weights = config.loss
    layers = hidden_layers(weights.hidden_layers)

    def objective(variables, frozen, batch, rngs):
        images = networks.restore(frozen, unit(batch["low"]))
        (logits, features), batch_stats = _forward(networks, variables, images, rngs, return_features=True)
        loss = _label_loss(weights, logits, batch)
        terms = {weights.label_loss: loss}
        if networks.teacher is not None:
            high = unit(batch["high"])
            teacher_logits, teacher_features = networks.teacher.apply(frozen["teacher"], high, return_features=True)
        if weights.logits_weight:
            terms["logits"] = losses.logits_distillation(logits, teacher_logits, weights.temperature)
            loss += weights.logits_weight * terms["logits"]
        if weights.hidden_weight:
            states = features["hidden_states"], teacher_features["hidden_states"]
            if weights.hidden_map:
                states = hidden_map.apply(variables["params"], networks, *states)
            terms["hidden"] = losses.hidden_state_distillation(*states, layers, weights.hidden_normalize)
            loss += weights.hidden_weight * terms["hidden"]
        return loss, (terms, batch_stats)

    return objective


def _label_loss(options: ConfigDict, logits: jax.Array, batch: Batch) -> jax.Array:
    """The loss of config.loss.label_loss on the labels, or on the soft labels of images that are mixed."""
    if options.label_loss == "cross_entropy" and "targets" not in batch:
        return losses.label_smoothing_cross_entropy(logits, batch["target"], options.label_smoothing)
    targets = batch.get("targets")
    if targets is None:
        targets = losses.smoothed_targets(batch["target"], logits.shape[-1], options.label_smoothing)
    if options.label_loss == "cross_entropy":
        return losses.soft_target_cross_entropy(logits, targets)
    return losses.binary_cross_entropy(logits, targets, options.target_threshold)


def _check_label_loss(options: ConfigDict, num_classes: int) -> None:
    binary, threshold, smoothing = "binary_cross_entropy", options.target_threshold, options.label_smoothing
    if threshold is not None and options.label_loss != binary:
        raise ValueError(f"target_threshold is {threshold}, but only label_loss={binary} has one")
    if threshold is not None and threshold < smoothing / num_classes:
        raise ValueError(
            f"with label_smoothing {smoothing}, every class is above target_threshold {threshold}: "
            "set label_smoothing to 0"
        )


def _forward(networks: Networks, variables: Any, images: jax.Array, rngs: Any, **options: Any) -> tuple[Any, Any]:
    """Output of the trained network in training mode, and its updated batch statistics, {} if it has none."""
    output, updated = networks.trained.apply(
        variables, images, train=True, rngs=rngs, mutable=["batch_stats"], **options
    )
    return output, updated.get("batch_stats", {})


_OBJECTIVES = {
    "sr": _sr_objective,
    "classifier": _classifier_objective,
    "teacher": _classifier_objective,
    "student": _student_objective,
}


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


def check_objective(config: ConfigDict, networks: Networks) -> None:
    """Traces the objective without computing it, so that networks that do not fit together are found at the start."""
    objective = _OBJECTIVES[config.stage](config, networks)

    def trace(key):
        def variables(model):
            images = input_images(model)
            return model.init(key, jnp.zeros(images.shape, images.dtype))

        frozen = {role: variables(getattr(networks, role)) for role in ("sr", "teacher") if getattr(networks, role)}
        sizes = {"high": config.dataset.high_resolution, "low": config.dataset.low_resolution}
        batch = {name: jnp.zeros((1, size, size, 3), jnp.uint8) for name, size in sizes.items()}
        batch["target"] = jnp.zeros(1, jnp.int32)
        batch = _mixed(config, networks, key, batch)
        trained = hidden_map.add(config, networks, variables(networks.trained))
        return objective(trained, frozen, batch, {"drop_path": key})

    try:
        if config.stage != "sr":
            _check_label_loss(config.loss, networks.trained.num_classes)
        jax.eval_shape(jax.vmap(trace, axis_name=AXIS), jax.random.split(jax.random.key(0), 1))
    except ValueError as error:
        raise ValueError(f"config.loss: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def _mixed(config: ConfigDict, networks: Networks, key: jax.Array, batch: Batch) -> Batch:
    """The batch after mixup or cutmix, if they are on: with mixed views and their soft labels, "targets"."""
    mixing = config.mixing
    if config.stage == "sr" or not (mixing.mixup_alpha or mixing.cutmix_alpha):
        return batch
    views, classes = {name: batch[name] for name in networks.views}, networks.trained.num_classes
    views, targets = mix(
        key, views, batch["target"], classes, **mixing, smoothing=config.loss.label_smoothing, axis_name=AXIS
    )
    return {**batch, **views, "targets": targets}


def make_train_step(
    config: ConfigDict, networks: Networks, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """One optimiser step over all devices: (state, frozen, batch) -> (state, metrics), both replicated."""
    objective = _OBJECTIVES[config.stage](config, networks)

    def train_step(state, frozen, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        rngs = {"drop_path": jax.random.fold_in(key, 0)}
        batch = _mixed(config, networks, jax.random.fold_in(key, 1), batch)

        def gradients_of(batch_stats, batch, rngs):
            def loss_of(params):
                return objective(_variables(params, batch_stats), frozen, batch, rngs)

            (loss, (terms, batch_stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
            return batch_stats, (gradients, {"loss": loss, **terms})

        if config.accumulation_steps == 1:
            batch_stats, means = gradients_of(state.batch_stats, batch, rngs)
        else:
            batch_stats, means = _accumulate(gradients_of, config.accumulation_steps, state.batch_stats, batch, rngs)
        gradients, metrics = jax.lax.pmean(means, AXIS)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if config.ema_decay:
            average = optax.incremental_update(_variables(params, batch_stats), average, 1 - config.ema_decay)
        metrics |= {"gradient_norm": optax.tree.norm(gradients), "parameter_norm": optax.tree.norm(params)}
        return TrainState(state.step + 1, params, batch_stats, opt_state, average), metrics

    return over_devices(train_step, donate_state=True)


def _accumulate(gradients_of: Callable, count: int, batch_stats: Any, batch: Batch, rngs: Any) -> tuple[Any, Any]:
    """Batch statistics after, and means over, `count` parts of a batch, computed one after the other."""
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)

    def one(carry, numbered_part):
        batch_stats, sums = carry
        number, part = numbered_part
        keys = {name: jax.random.fold_in(key, number) for name, key in rngs.items()}
        batch_stats, results = gradients_of(batch_stats, part, keys)
        return (batch_stats, jax.tree.map(jnp.add, sums, results)), None

    first = jax.tree.map(lambda x: x[0], parts)
    _, shapes = jax.eval_shape(gradients_of, batch_stats, first, rngs)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (batch_stats, sums), _ = jax.lax.scan(one, (batch_stats, sums), (jnp.arange(count), parts))
    return batch_stats, jax.tree.map(lambda x: x / count, sums)


def make_eval_step(networks: Networks) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """Sums of one evaluation batch over all devices: (variables, batch) -> sums, each image counted by its weight."""
    product, view = networks.product, "low" if networks.reads_low else "high"
    sums = _restoration_sums if networks.reads_low and not networks.is_student else _classification_sums

    def eval_step(variables, batch):
        return jax.lax.psum(sums(product.apply(variables, unit(batch[view])), batch), AXIS)

    return over_devices(eval_step)


def _classification_sums(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    label, weight, classes = batch["target"], batch["weight"], logits.shape[-1]
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
    """Peak signal-to-noise ratio in dB of each image; (b, H, W, 3) in [0, 1] -> (b,)."""
    return -10 * jnp.log10(jnp.maximum(jnp.mean(jnp.square(image - truth), axis=(1, 2, 3)), 1e-10))


def unit(images: jax.Array) -> jax.Array:
    """Images with values from 0 to 255 as float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255
