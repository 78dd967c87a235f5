"""How good a network is: sums over all images of a split, and the scores they give."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vimd_jax.data.geometry import central_view, low_resolution_view
from vimd_jax.data.pipeline import Batch, class_index, eval_batches, read_or_skip
from vimd_jax.data.sources import Source
from vimd_jax.errors import TrainingError
from vimd_jax.training import parallel, plots, steps
from vimd_jax.training.roles import Networks

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Sums over the images of a split, each counted once, and what follows from them."""

    sums: dict[str, np.ndarray]

    @property
    def score(self) -> float:
        """What the best checkpoint has most of: top-1 accuracy in percent, or PSNR in dB."""
        return self.summary()["top1" if "confusion" in self.sums else "psnr"]

    def summary(self) -> dict[str, float]:
        """Top-1 and top-5 accuracy in percent and cross-entropy, or PSNR in dB beside that of bicubic up-sampling."""
        count = float(self.sums["count"])
        means = {name: float(value) / count for name, value in self.sums.items() if name not in ("count", "confusion")}
        if "confusion" in self.sums:
            means["top5"] *= 100
            means = {"top1": 100 * float(np.trace(self.sums["confusion"])) / count, **means}
        return {**means, "count": count}

    def per_class(self) -> np.ndarray:
        """Accuracy of each class in percent (classes,); nan for a class without images."""
        confusion = self.sums["confusion"]
        with np.errstate(invalid="ignore"):
            return 100 * np.diag(confusion) / confusion.sum(axis=1)


def passes(source: Source, config: ConfigDict) -> Iterator[Iterator[Batch]]:
    """Pass after pass over the images of a source; the input processes stay from one to the next."""
    batches = eval_batches(
        source, config.dataset, batch_size=config.eval_batch_size, target=class_index,
        process_index=jax.process_index(), process_count=jax.process_count(), endless=True,
    )  # fmt: skip
    while True:
        yield itertools.islice(batches, -(-len(source) // config.eval_batch_size))


def evaluate(
    eval_step: Callable, variables: Any, batches: Iterable[Batch], title: str, check: Callable[[], None] | None = None
) -> Scores:
    """Runs `eval_step` with replicated variables over the batches of one pass and logs the scores in one line.

    Args:
      eval_step: see `steps.make_eval_step`.
      variables: of the network.
      batches: of this process.
      title: what the log calls the images.
      check: called between batches; what it raises ends the evaluation.

    Raises:
      ValueError: no image could be read.
      TrainingError: the network's outputs are not finite.
    """
    total, skipped = None, 0
    for batch in batches:
        skipped += int(batch["skipped"].sum())
        sums = jax.tree.map(np.float64, parallel.fetch(eval_step(variables, parallel.shard(batch))))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        if check:
            check()
    if total is None or total["count"] == 0:
        raise ValueError(f"There is no image to evaluate in {title}: check config.dataset.")
    if not all(np.all(np.isfinite(value)) for value in total.values()):
        raise TrainingError(f"The outputs of the network are not finite ({title}), so there is no score to report.")
    scores = Scores(total)
    text = ", ".join(f"{name} {value:.2f}" for name, value in scores.summary().items() if name != "count")
    unread = f" ({skipped} unreadable left out)" if skipped else ""
    log.info("%s: %s on %d images%s", title, text, total["count"], unread)
    return scores


def save_panel(
    config: ConfigDict, networks: Networks, variables: Any, source: Source, path: Path, rows: int = 6
) -> None:
    """Draws images spread over a source: low, restored and high resolution, and what the network says of them."""
    records = np.linspace(0, len(source) - 1, min(rows, len(source))).round().astype(int)
    images = {i: read_or_skip(source, i, config.dataset.on_error) for i in map(int, records)}
    records = [i for i, image in images.items() if image is not None]
    if not records:
        return
    seen = [images[i].image for i in records]
    side, crop = config.dataset.high_resolution, config.dataset.eval_crop
    views = [central_view(image.size, side, crop).apply(image) for image in seen]
    high = np.stack([np.asarray(view) for view in views])
    low = np.stack([np.asarray(low_resolution_view(view, config.dataset.low_resolution)) for view in views])
    columns, captions = {"low resolution": low, "high resolution": high}, [""] * len(records)
    images = steps.unit(low if networks.reads_low else high)
    if networks.reads_low and not networks.is_student:
        columns["super-resolved"] = jax.jit(networks.product.apply)(variables, images)
    else:
        classify = jax.jit(partial(networks.product.apply, return_features=True))
        logits, features = classify(variables, images)
        if networks.is_student:
            columns["super-resolved"] = features["super_resolved"]
        captions = [_caption(source, i, p) for i, p in zip(records, jax.nn.softmax(logits))]
    order = [name for name in ("low resolution", "super-resolved", "high resolution") if name in columns]
    plots.save_panel({name: np.asarray(columns[name]) for name in order}, captions, path)


def _caption(source: Source, record: int, probabilities: jax.Array) -> str:
    predicted, label = int(np.argmax(probabilities)), int(source.labels[record])
    names = source.class_names
    verdict = "correct" if predicted == label else f"is {names[label]}"
    return f"{names[predicted]} ({100 * float(probabilities[predicted]):.0f} %), {verdict}"
