"""The losses on labels, and the terms of ViMD's multi-level distillation loss (https://arxiv.org/abs/2411.17980).

    L = L_CE + alpha L_LD + beta L_HSD

Pure functions that return scalars, means over the batch, computed in float32.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp


def label_smoothing_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """L_CE: cross-entropy with labels that keep 1 - smoothing and spread the rest evenly over all classes.

    Args:
      logits: (batch, classes).
      labels: (batch,) integers.
      smoothing: in [0, 1); 0 is the plain cross-entropy.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    true = jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]
    return -jnp.mean((1 - smoothing) * true + smoothing * log_probabilities.mean(axis=-1))


def smoothed_targets(labels: jax.Array, num_classes: int, smoothing: float = 0.0) -> jax.Array:
    """Soft labels (batch, num_classes) that keep 1 - smoothing and spread the rest evenly over all classes."""
    return (1 - smoothing) * jax.nn.one_hot(labels, num_classes) + smoothing / num_classes


def soft_target_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy with soft labels, as mixup and cutmix make them.

    Args:
      logits: (batch, classes).
      targets: (batch, classes), the share of each class; the shares of an image add up to 1.
    """
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1))


def binary_cross_entropy(logits: jax.Array, targets: jax.Array, threshold: float | None = None) -> jax.Array:
    """Cross-entropy of every class by itself, as DeiT III (https://arxiv.org/abs/2204.07118) trains.

    The mean is over images and classes.

    Args:
      logits: (batch, classes).
      targets: (batch, classes), the share of each class, from 0 to 1.
      threshold: shares above it count as 1 and all others as 0; None takes them as they are.
    """
    logits = logits.astype(jnp.float32)
    if threshold is not None:
        targets = (targets > threshold).astype(jnp.float32)
    return -jnp.mean(targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits))


def pixel_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    class_weights: Sequence[float] = (),
    over: Literal["labelled", "all"] = "labelled",
) -> jax.Array:
    """Cross-entropy of label maps, in which values beyond the classes, as 255, are no labels; 0 where there is none.

    Args:
      logits: (batch, height, width, classes).
      labels: (batch, height, width) integers.
      class_weights: of the pixels of each class; empty: 1. The mean is then a weighted one.
      over: the pixels of the mean: "labelled" ones, or "all" as the published segmenters were trained, which weakens
        the loss of an image by its share of unlabelled pixels. With class weights they are labelled in either case.
    """
    labelled = labels < logits.shape[-1]
    classes = jnp.where(labelled, labels, 0).astype(jnp.int32)
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    true = jnp.take_along_axis(log_probabilities, classes[..., None], axis=-1)[..., 0]
    weights = labelled.astype(jnp.float32)
    if class_weights:
        weights *= jnp.asarray(class_weights, jnp.float32)[classes]
    total = labels.size if over == "all" and not class_weights else weights.sum()
    return -jnp.sum(weights * true) / (total + jnp.finfo(jnp.float32).eps)


def logits_distillation(student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 4.0) -> jax.Array:
    """L_LD: KL(teacher ‖ student) of the class distributions softened by a temperature, times temperature².

    The factor keeps the size of the gradient (Hinton et al., https://arxiv.org/abs/1503.02531, section 2). The paper
    prints the divergence the other way round; this is the direction that its code computes.

    Args:
      student_logits: (batch, classes).
      teacher_logits: (batch, classes).
      temperature: divides both logits.
    """
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return temperature**2 * jnp.mean(divergence)


def hidden_state_distillation(
    student_hidden: jax.Array | Sequence[jax.Array],
    teacher_hidden: jax.Array | Sequence[jax.Array],
    layers: Literal["all", "last"] | tuple[int, ...] = "all",
    normalize: bool = False,
) -> jax.Array:
    """L_HSD: the sum over layers, or stages, of the mean squared difference of hidden states.

    Args:
      student_hidden: `features["hidden_states"]`: (depth, batch, tokens, channels), or of a hierarchical network an
        array (batch, height, width, channels) for each stage.
      teacher_hidden: the same of the teacher.
      layers: "all", "last", or the numbers of the layers (stages) to sum over, counted from 0.
      normalize: scale every token to unit length first.

    Raises:
      ValueError: the shapes differ, or there is no such layer.
    """
    if _shapes(student_hidden) != _shapes(teacher_hidden):
        raise ValueError(
            f"teacher_hidden: shape {_shapes(teacher_hidden)} differs from the student's {_shapes(student_hidden)}; "
            "hidden states can be distilled only between networks of the same depth, width and number of tokens, "
            "logits between any two; set config.loss.hidden_map, or config.loss.hidden_weight to 0"
        )
    chosen = _layer_numbers(layers, len(student_hidden))
    if isinstance(student_hidden, tuple | list):
        pairs = [(student_hidden[i][None], teacher_hidden[i][None]) for i in chosen]
    else:
        pairs = [(student_hidden[jnp.array(chosen)], teacher_hidden[jnp.array(chosen)])]
    return sum(_distances(student, teacher, normalize).sum() for student, teacher in pairs)


def _shapes(hidden: jax.Array | Sequence[jax.Array]) -> tuple | list[tuple]:
    return [stage.shape for stage in hidden] if isinstance(hidden, tuple | list) else hidden.shape


def _layer_numbers(layers: str | tuple[int, ...], depth: int) -> tuple[int, ...]:
    if layers in ("all", "last"):
        return tuple(range(depth)) if layers == "all" else (depth - 1,)
    if isinstance(layers, str) or not layers or not all(0 <= layer < depth for layer in layers):
        raise ValueError(f'layers: {layers!r} is not valid, expected "all", "last" or numbers from 0 to {depth - 1}')
    return tuple(layers)


def _distances(student: jax.Array, teacher: jax.Array, normalize: bool) -> jax.Array:
    """Mean squared difference of each layer, (layers,)."""
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    if normalize:
        student, teacher = _unit_length(student), _unit_length(teacher)
    return jnp.mean(jnp.square(student - teacher), axis=tuple(range(1, student.ndim)))


def _unit_length(tokens: jax.Array) -> jax.Array:
    # On a CPU, XLA may compute a sum of squares along the last of several axes far more slowly (JAX 0.10).
    squared = jnp.einsum("...c,...c->...", tokens, tokens, precision="highest")
    return tokens * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))[..., None]
