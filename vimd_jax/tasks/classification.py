"""Classification: one of several classes for each image."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from vimd_jax import losses
from vimd_jax.data.geometry import View
from vimd_jax.data.sources import Record
from vimd_jax.models import CLASSIFIERS
from vimd_jax.settings import BELOW_1, SHARE_OR_0, Setting, at_least, one_of
from vimd_jax.tasks.mixing import check_groups, mix
from vimd_jax.tasks.task import Batch, Output, Sums, Table, Task, Terms

SETTINGS = {
    "loss.label_loss": Setting(
        "cross_entropy",
        one_of("cross_entropy", "binary_cross_entropy"),
        "the second makes every class a yes or no of its own, as in DeiT III",
    ),
    "loss.label_smoothing": Setting(0.1, BELOW_1, "label mass spread over all classes"),
    "loss.target_threshold": Setting(float, BELOW_1, "of binary_cross_entropy: labels above it count as 1"),
    "mixing.mixup_alpha": Setting(0.0, at_least(0), "above 0: mixup, its weights from Beta(alpha, alpha)"),
    "mixing.cutmix_alpha": Setting(0.0, at_least(0), "above 0: cutmix, likewise"),
    "mixing.probability": Setting(1.0, SHARE_OR_0, "share of the batches that are mixed"),
    "mixing.switch_probability": Setting(0.5, SHARE_OR_0, "share of these that cutmix gets where both are on"),
    "mixing.group_size": Setting(
        0,
        at_least(0),
        "images that share one draw, as the originals do for each GPU's share; 0: the whole batch",
    ),
}


def target(record: Record, view: View) -> np.int32:
    """The class; 0 for a record without one."""
    return np.int32(record.target or 0)


def check(config: ConfigDict, num_classes: int) -> None:
    """Raises ValueError for settings of the loss and of mixing that do not go together."""
    options, binary = config.loss, "binary_cross_entropy"
    threshold, smoothing = options.target_threshold, options.label_smoothing
    if threshold is not None and options.label_loss != binary:
        raise ValueError(f"config.loss: target_threshold is {threshold}, but only label_loss={binary} has one")
    if threshold is not None and threshold < smoothing / num_classes:
        raise ValueError(
            f"config.loss: with label_smoothing {smoothing}, every class is above target_threshold {threshold}: "
            "set label_smoothing to 0"
        )
    check_groups(config.batch_size, config.mixing.group_size, jax.device_count())


def mixed(
    key: jax.Array, batch: Batch, views: tuple[str, ...], num_classes: int, config: ConfigDict, axis_name: str
) -> Batch:
    """The batch after mixup or cutmix, if they are on: float32 views in the same range, and their "soft_target"."""
    if not (config.mixing.mixup_alpha or config.mixing.cutmix_alpha):
        return batch
    images, soft = mix(
        key, {name: batch[name] for name in views}, batch["target"], num_classes,
        **config.mixing, smoothing=config.loss.label_smoothing, axis_name=axis_name,
    )  # fmt: skip
    return {**batch, **images, "soft_target": soft}


def loss(output: Output, batch: Batch, config: ConfigDict) -> tuple[jax.Array, Terms]:
    """The loss of config.loss.label_loss on the labels, or on the soft labels of images that are mixed."""
    options, logits = config.loss, output.value
    term = _loss(options, logits, batch["target"], batch.get("soft_target"))
    return term, {options.label_loss: term}


def _loss(options: ConfigDict, logits: jax.Array, labels: jax.Array, soft: jax.Array | None) -> jax.Array:
    if options.label_loss == "cross_entropy" and soft is None:
        return losses.label_smoothing_cross_entropy(logits, labels, options.label_smoothing)
    if soft is None:
        soft = losses.smoothed_targets(labels, logits.shape[-1], options.label_smoothing)
    if options.label_loss == "cross_entropy":
        return losses.soft_target_cross_entropy(logits, soft)
    return losses.binary_cross_entropy(logits, soft, options.target_threshold)


def sums(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Cross-entropy, and how many images have their class first, and among the first five."""
    images, weight = per_image(logits, batch), batch["weight"]
    return {"count": jnp.sum(weight)} | {name: jnp.sum(weight * images[name]) for name in ("loss", "top1", "top5")}


def scores(total: dict[str, np.ndarray]) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, and cross-entropy."""
    count = float(total["count"])
    means = {name: float(total[name]) / count for name in ("loss", "top5")}
    return {"top1": 100 * float(total["top1"]) / count, "loss": means["loss"], "top5": 100 * means["top5"]}


def per_image(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """The true and the predicted class, the probability of the latter, and the image's share of `sums`."""
    label, predicted = batch["target"], jnp.argmax(logits, -1).astype(jnp.int32)
    true_logit = jnp.take_along_axis(logits, label[:, None], axis=-1)
    return {
        "true": label,
        "predicted": predicted,
        "confidence": jnp.max(jax.nn.softmax(logits), axis=-1),
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, label),
        "top1": (predicted == label).astype(jnp.float32),
        "top5": (jnp.sum(logits > true_logit, axis=-1) < 5).astype(jnp.float32),
    }


def confusion(sums: Sums, num_classes: int) -> np.ndarray:
    """The number of images of each class (rows) predicted to be of each class, (classes, classes) int32."""
    matrix = np.zeros((num_classes, num_classes), np.int32)
    np.add.at(matrix, (sums.images["true"], sums.images["predicted"]), 1)
    return matrix


def tables(sums: Sums, class_names: tuple[str, ...]) -> dict[str, Table]:
    """The accuracy of every class, nan where it has no images."""
    true, predicted = sums.images["true"], sums.images["predicted"]
    images, correct = (np.bincount(x, minlength=len(class_names)) for x in (true, true[true == predicted]))
    with np.errstate(invalid="ignore"):
        accuracy = 100 * correct / images
    return {
        "per_class": [("class", "images", "correct", "accuracy_percent"), *zip(class_names, images, correct, accuracy)]
    }


def panel(
    logits: np.ndarray, targets: list[int], names: tuple[str, ...], *_: Any
) -> tuple[dict[str, np.ndarray], list[str]]:
    return {}, [_caption(p, label, names) for p, label in zip(jax.nn.softmax(logits), targets)]


def _caption(probabilities: jax.Array, label: int, names: tuple[str, ...]) -> str:
    predicted = int(np.argmax(probabilities))
    verdict = "correct" if predicted == label else f"is {names[label]}"
    return f"{names[predicted]} ({100 * float(probabilities[predicted]):.0f} %), {verdict}"


CLASSIFICATION = Task(
    networks=CLASSIFIERS,
    network="vim_tiny_stride8",
    loss=loss,
    sums=sums,
    scores=scores,
    drawn=("top1",),
    axis="top-1 accuracy (%)",
    target=target,
    outputs=lambda class_names: class_names,
    settings=SETTINGS,
    check=check,
    mix=mixed,
    per_image=per_image,
    confusion=confusion,
    tables=tables,
    panel=panel,
)
