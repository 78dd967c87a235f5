"""Semantic segmentation: one of several classes for each pixel.

Scores are those of MMSegmentation, from one confusion matrix of all pixels of all images, at the label maps' own sizes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict
from PIL import Image

from vimd_jax import losses
from vimd_jax.data.classes import IGNORED
from vimd_jax.data.geometry import NEAREST, View
from vimd_jax.data.sources import Record
from vimd_jax.drawing import blended, palette
from vimd_jax.models import SEGMENTERS
from vimd_jax.models.network import part
from vimd_jax.models.resize import resize_bilinear, resize_into
from vimd_jax.models.segmenter import Segmenter
from vimd_jax.models.srvm import SRVM
from vimd_jax.settings import ANY, SHARE, Rule, Setting, at_least, one_of
from vimd_jax.tasks.task import Batch, Output, Sums, Table, Task, Terms

_SIDES = Rule("two numbers of at least 0", lambda x: len(x) == 2 and min(x) >= 0)
_SCALES = Rule("two numbers above 0, the smaller first", lambda x: len(x) == 2 and 0 < x[0] <= x[1])
_POSITIVE = Rule("numbers above 0", lambda x: all(number > 0 for number in x))

SETTINGS = {
    "loss.pixel_mean": Setting(
        "labelled", one_of("labelled", "all"), 'pixels that the loss is the mean over; "all" is published'
    ),
    "loss.auxiliary_weight": Setting(0.4, at_least(0), "of the auxiliary head's loss; 0 switches it off"),
    "loss.class_weights": Setting((), _POSITIVE, "of the pixels of each class; empty: 1"),
    "dataset.classes": Setting(
        "", ANY, "a file of class names, one a line; empty: classes.txt in the directory", changeable=True
    ),
    "dataset.label_values": Setting(
        "", ANY, 'values of the classes in the label maps, as "1..150" or "0,255"; empty: 0, 1, ...'
    ),
    "dataset.ignored_values": Setting("", ANY, "values of pixels without a label, likewise; 255 is always one"),
    "dataset.size_limits": Setting(
        (0, 0), _SIDES, "pixels that the long and the short side of an image are fitted into first; 0, 0: as they are"
    ),
    "dataset.scale_range": Setting((0.5, 2.0), _SCALES, "smallest and largest scale of a training image"),
    "dataset.largest_class": Setting(
        0.75, SHARE, "share of a training crop that one class should stay below; up to ten are drawn"
    ),
    "dataset.augment.photometric": Setting(
        True, ANY, "change brightness, contrast, saturation and hue, as MMSegmentation does"
    ),
    "dataset.eval_sizes": Setting(
        16, at_least(1), "most sizes of images that an evaluation compiles; of more, sides are rounded"
    ),
    "inference.mode": Setting("whole", one_of("whole", "slide"), "images at once, or windows that slide over them"),
    "inference.window": Setting(0, at_least(0), "side of the windows in pixels; 0: high_resolution"),
    "inference.stride": Setting(0, at_least(0), "pixels from one window to the next; 0: two thirds of the window"),
    "inference.scales": Setting((1.0,), _POSITIVE, "of the image; the probabilities of several are averaged"),
    "inference.flip": Setting(False, ANY, "average with the mirrored image too"),
}  # fmt: skip


def target(record: Record, view: View) -> np.ndarray:
    """The label map of a view, uint8 with `IGNORED`; for a record without one, nothing but that."""
    if record.target is None:
        width, height = view.canvas or view.size
        return np.full((height, width), IGNORED, np.uint8)
    return np.asarray(view.pad(view.apply(record.target, NEAREST), IGNORED))


def check(config: ConfigDict, num_classes: int) -> None:
    """Raises ValueError for settings that do not go together."""
    weights, inference = config.loss.class_weights, config.inference
    if weights and len(weights) != num_classes:
        raise ValueError(f"config.loss.class_weights: {len(weights)} weights, but there are {num_classes} classes")
    if "sr" in config and config.sr.name == "bicubic":
        raise ValueError("config.sr.name is bicubic, which enlarges to one size: a segmenter needs an SR network")
    if inference.mode == "whole" and (inference.window or inference.stride):
        raise ValueError("config.inference.window and stride belong to mode=slide, but mode is whole")
    if not inference.scales:
        raise ValueError("config.inference.scales is empty: it must name at least one scale, as (1.0,)")


def loss(output: Output, batch: Batch, config: ConfigDict) -> tuple[jax.Array, Terms]:
    """Cross-entropy of the pixels, of the auxiliary head's scores too, at the size of the label map."""
    options, labels = config.loss, batch["target"]

    def of(logits: jax.Array) -> jax.Array:
        scores = resize_bilinear(logits, labels.shape[1:3])
        return losses.pixel_cross_entropy(scores, labels, class_weights=options.class_weights, over=options.pixel_mean)

    terms = {"cross_entropy": of(output.value)}
    total, auxiliary = terms["cross_entropy"], output.features.get("auxiliary_logits")
    if options.auxiliary_weight and auxiliary is not None:
        terms["auxiliary"] = of(auxiliary)
        total += options.auxiliary_weight * terms["auxiliary"]
    return total, terms


def answer(model: nn.Module, variables: dict, images: jax.Array, config: ConfigDict) -> jax.Array:
    """Class scores (b, height, width, classes) of every pixel of whole images, as config.inference says.

    Of a single view they are logits; of several scales, or with mirroring, log of the mean of the probabilities.
    """
    if isinstance(model, SRVM):
        images = model.apply(variables, images, method="enlarge")
        model, variables = model.classifier, part(variables, "classifier")
    options = config.inference
    views = [(scale, mirrored) for scale in options.scales for mirrored in (False, True)[: 1 + options.flip]]
    if views == [(1.0, False)]:
        return _segment(model, variables, images, options)
    probabilities = 0.0
    for scale, mirrored in views:
        seen = resize_bilinear(images, tuple(max(1, int(side * scale + 0.5)) for side in images.shape[1:3]))
        scores = _segment(model, variables, seen[:, :, ::-1] if mirrored else seen, options)
        scores = scores[:, :, ::-1] if mirrored else scores
        probabilities += jax.nn.softmax(resize_bilinear(scores, images.shape[1:3]))
    return jnp.log(probabilities / len(views))


def _segment(model: Segmenter, variables: dict, images: jax.Array, options: ConfigDict) -> jax.Array:
    return model.segment(variables, images, options.mode, options.window or None, options.stride or None)


def per_image(scores: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """The labelled pixels of each class in each image, (b, classes): the true ones, the predicted ones, and those that
    are both; and the sum of the cross-entropy of all of them, (b,)."""
    matrices, entropies = _compared(scores, batch)
    return {
        "loss": entropies,
        "intersection": jnp.diagonal(matrices, axis1=1, axis2=2),
        "true_pixels": matrices.sum(axis=2),
        "predicted_pixels": matrices.sum(axis=1),
    }


def sums(scores: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """The sums of these, and the confusion matrix (classes, classes) int32, rows true, of all labelled pixels."""
    matrices, _ = _compared(scores, batch)
    total = {name: jnp.sum(values, axis=0) for name, values in per_image(scores, batch).items()}
    return total | {"count": jnp.sum(batch["weight"]), "confusion": jnp.sum(matrices, axis=0)}


def _compared(scores: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The confusion matrix of each image, (b, classes, classes) int32, and the sum of its pixels' cross-entropies."""
    classes, canvas = scores.shape[-1], batch["target"].shape[1:3]

    def of(image: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        scores, labels, size = image
        scores, labels = resize_into(scores, size, canvas), labels.astype(jnp.int32)
        labelled = labels < classes
        pairs = jnp.where(labelled, labels * classes + jnp.argmax(scores, -1), 0)
        matrix = jnp.zeros(classes**2, jnp.int32).at[pairs.ravel()].add(labelled.ravel().astype(jnp.int32))
        mean = losses.pixel_cross_entropy(scores[None], labels[None])
        return matrix.reshape(classes, classes), mean * jnp.sum(labelled)

    # One image after the other: at the size of large label maps, the scores of a batch would take gigabytes.
    return jax.lax.map(of, (scores, batch["target"], batch["label_size"]))


def scores(total: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean IoU, mean accuracy of the classes and accuracy of the pixels in percent, and cross-entropy.

    A class that is neither in the label maps nor predicted counts for no mean; one that is only predicted has IoU 0.
    """
    iou, accuracy = class_scores(total)
    pixels = max(total["true_pixels"].sum(), 1.0)
    return {
        "mean_iou": _mean(iou),
        "mean_accuracy": _mean(accuracy),
        "pixel_accuracy": float(100 * total["intersection"].sum() / pixels),
        "loss": float(total["loss"] / pixels),
    }


def class_scores(total: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """IoU and accuracy of each class in percent, nan without pixels."""
    hits, true, predicted = (total[name] for name in ("intersection", "true_pixels", "predicted_pixels"))
    with np.errstate(invalid="ignore"):
        return 100 * hits / (true + predicted - hits), 100 * hits / true


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def tables(sums: Sums, class_names: tuple[str, ...]) -> dict[str, Table]:
    """IoU and accuracy of every class, nan where it has no pixels."""
    pixels = sums.total["true_pixels"].astype(np.int64)
    rows = zip(class_names, pixels, *class_scores(sums.total))
    return {"per_class": [("class", "pixels", "iou_percent", "accuracy_percent"), *rows]}


def panel(
    logits: np.ndarray,
    targets: list[np.ndarray],
    names: tuple[str, ...],
    images: np.ndarray,
    colours: np.ndarray | None,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The predicted and the true label map in colours over the image, and the share of pixels that agree."""
    truth, colours = np.stack(targets), palette(len(names)) if colours is None else colours
    predicted = np.asarray(jnp.argmax(resize_bilinear(jnp.asarray(logits), truth.shape[1:3]), -1))
    columns = {
        title: np.stack([np.asarray(blended(Image.fromarray(x), y, colours)) for x, y in zip(images, labels)])
        for title, labels in (("predicted", predicted), ("label map", truth))
    }
    return columns, [_caption(p, t, names) for p, t in zip(predicted, truth)]


def _caption(predicted: np.ndarray, truth: np.ndarray, names: tuple[str, ...]) -> str:
    labelled = truth < len(names)
    common = np.bincount(predicted.ravel(), minlength=len(names)).argsort()[::-1][:3]
    agree = 100 * np.mean(predicted[labelled] == truth[labelled]) if labelled.any() else float("nan")
    return f"{agree:.0f} % of the pixels correct; mostly {', '.join(names[i] for i in common)}"


SEGMENTATION = Task(
    networks=SEGMENTERS,
    network="upernet_vim_tiny",
    loss=loss,
    sums=sums,
    scores=scores,
    drawn=("mean_iou", "pixel_accuracy"),
    axis="mean IoU, pixel accuracy (%)",
    target=target,
    outputs=lambda class_names: class_names,
    maps=True,
    reads_features=True,
    settings=SETTINGS,
    check=check,
    answer=answer,
    per_image=per_image,
    confusion=lambda sums, num_classes: sums.total["confusion"].astype(np.int64),
    tables=tables,
    panel=panel,
)
