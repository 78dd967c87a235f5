"""Evaluation: sums over all images of a split and their scores; a panel of images to look at."""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from vimd_jax.data.geometry import View, central_view, crop_view, fitted_size
from vimd_jax.data.pipeline import FILL, VIEWS, Batch, eval_passes, network_view, read_or_skip, scaled_views
from vimd_jax.data.preparation import prepare_views
from vimd_jax.data.sources import Record, Source
from vimd_jax.errors import TrainingError
from vimd_jax.tasks import restoration
from vimd_jax.tasks.task import Sums, Task, unit
from vimd_jax.training import parallel, plots
from vimd_jax.training.roles import Networks

log = logging.getLogger(__name__)


def passes(source: Source, config: ConfigDict, networks: Networks) -> Iterator[Iterator[Batch]]:
    """Pass after pass over the images of a source; the input processes stay from one to the next."""
    views = networks.views if source.maps else VIEWS
    return eval_passes(
        source, config.dataset, batch_size=config.eval_batch_size, views=views, target=networks.task.target,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip


def evaluate(
    task: Task,
    eval_step: Callable,
    variables: Any,
    batches: Iterable[Batch],
    title: str,
    check: Callable[[], None] | None = None,
) -> tuple[dict[str, float], Sums]:
    """Runs `eval_step` with replicated variables over the batches of one pass and logs the scores in one line.

    Args:
      task: of the stage.
      eval_step: see `steps.make_eval_step`.
      variables: of the network.
      batches: of this process.
      title: what the log calls the images.
      check: called between batches; its exceptions end the evaluation.

    Returns:
      Scores by name with "count", the number of images; and the sums behind them.

    Raises:
      ValueError: no image could be read.
      TrainingError: the network's outputs are not finite.
    """
    total, kept, skipped = None, [], 0
    for batch in batches:
        skipped += int(batch["skipped"].sum())
        sums, images = parallel.fetch(eval_step(variables, parallel.shard(batch)))
        sums = jax.tree.map(np.float64, sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        counted = images.pop("weight") > 0
        kept.append({name: values[counted] for name, values in images.items()})
        if check:
            check()
    if total is None or total["count"] == 0:
        raise ValueError(f"There is no image to evaluate in {title}: check config.dataset.")
    if not all(np.all(np.isfinite(value)) for value in total.values()):
        raise TrainingError(f"The outputs of the network are not finite ({title}), so there is no score to report.")
    scores = task.scores(total)
    text = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
    unread = f" ({skipped} unreadable left out)" if skipped else ""
    log.info("%s: %s on %d images%s", title, text, total["count"], unread)
    images = {name: np.concatenate([values[name] for values in kept]) for name in kept[0]}
    return {**scores, "count": float(total["count"])}, Sums(total, images)


def _spread(source: Source, config: ConfigDict, count: int) -> list[Record]:
    """Records spread over a source, up to `count`, without unreadable ones."""
    chosen = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)
    records = [read_or_skip(source, i, config.dataset.on_error) for i in dict.fromkeys(map(int, chosen))]
    return [record for record in records if record is not None]


@partial(jax.jit, static_argnums=0, static_argnames="return_features")
def _output(network: nn.Module, variables: Any, images: jax.Array, return_features: bool) -> Any:
    """Compiled once for all panels of a run."""
    options = {"return_features": True} if return_features else {}
    return network.apply(variables, images, **options)


def check_restorer(config: ConfigDict, networks: Networks, variables: Any, source: Source, most: int = 16) -> None:
    """Warns if a frozen SR network restores images, up to `most` of a source, worse than bicubic interpolation.

    Images that are of the low resolution already say nothing about that.
    """
    view = network_view(config.dataset)
    records = [record for record in _spread(source, config, most) if not view.is_ready(record.image)]
    if not records:
        return
    views = [_panel_view(config.dataset, record, source.maps) for record in records]
    seen = [_seen(config.dataset, record, view, source.maps) for record, view in zip(records, views)]
    batch = {view: np.stack([images[view] for images in seen]) for view in ("low", "high")}
    restored = jax.jit(networks.restorer.apply)(variables, unit(batch["low"]))
    sums = restoration.sums(restored, batch | {"weight": np.ones(len(seen), np.float32)})
    if remark := restoration.remark(restoration.scores(sums)):
        log.warning("config.%s.init: %s", networks.stage.restorer, remark)


def save_panel(config: ConfigDict, networks: Networks, variables: Any, source: Source, path: Path) -> None:
    """Draws the `panel` as a PNG."""
    columns, captions = panel(config, networks, variables, source)
    if captions:
        plots.save_panel(columns, captions, path)


def panel(
    config: ConfigDict, networks: Networks, variables: Any, source: Source, rows: int = 6
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Images spread over a source: low, restored and high resolution, and the network's answers.

    Returns:
      Columns, title -> images (n, height, width, 3), float in [0, 1] or uint8; and n captions. n is up to `rows`.
    """
    records = _spread(source, config, rows)
    if not records:
        return {}, []
    task = networks.task
    views = [_panel_view(config.dataset, record, source.maps) for record in records]
    seen = [_seen(config.dataset, record, view, source.maps) for record, view in zip(records, views)]
    high, low = (np.stack([images[view] for images in seen]) for view in ("high", "low"))
    targets = [task.target(record, view) if task.target else None for record, view in zip(records, views)]

    columns = {"low resolution": low, "super-resolved": None, "high resolution": high}
    images = unit(low if networks.view == "low" else high)
    output = _output(networks.product, variables, images, return_features=bool(networks.stage.restorer))
    if networks.stage.restorer:
        output, features = output
        columns["super-resolved"] = features["super_resolved"]
    drawn, captions = task.panel(np.asarray(output), targets, networks.outputs, high, source.colours)
    return {title: np.asarray(x) for title, x in (columns | drawn).items() if x is not None}, captions


def _panel_view(config: ConfigDict, record: Record, maps: bool) -> View:
    """The view of an evaluation; of an image with a label map, which is evaluated whole, a crop of its middle."""
    full_size, side = record.image.size, config.high_resolution
    if not maps:
        return central_view(full_size, side, config.eval_crop)
    scaled = fitted_size(full_size, config.size_limits)
    return crop_view(full_size, scaled, tuple(max(0, (length - side) // 2) for length in scaled), side)


def _seen(config: ConfigDict, record: Record, view: View, maps: bool) -> Batch:
    """An image in high and low resolution as a panel shows it."""
    if not maps:
        return prepare_views(record.image, network_view(config))
    return scaled_views(view.pad(view.apply(record.image), FILL), config)
