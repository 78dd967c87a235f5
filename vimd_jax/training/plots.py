"""Plots of a run: its curves, and its images beside the predictions.

They look the same whatever settings of matplotlib the user has, and need no screen. Names are drawn as they are.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vimd_jax.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextlib.contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure to draw in, of a size in inches, which is then written as a PNG."""
    backend = os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not exist here, would end the import
    try:
        import matplotlib
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font does not have
        matplotlib.rcdefaults()
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        png = io.BytesIO()
        figure.savefig(png, dpi=110)
    replace_file(path, png.getvalue())


def save_curves(lines: list[dict[str, Any]], path: Path, scores: Sequence[str] = (), title: str = "scores") -> None:
    """Draws metrics.jsonl as a PNG: the loss with its terms, these scores of the evaluations, the learning rate.

    Args:
      lines: see `metrics.read_metrics`.
      path: the PNG.
      scores: names of scores that share an axis.
      title: of that axis.
    """
    train = [line for line in lines if line["split"] == "train"]
    evaluations = [line for line in lines if line["split"] in ("validation", "test")]
    hidden = ("learning_rate", "images_per_second", "input_wait", "gradient_norm", "parameter_norm")
    with _figure(path, 15, 4) as figure:
        axes = figure.subplots(1, 3)
        for name in train[0]["metrics"] if train else ():
            if name not in hidden:
                axes[0].plot(*_points(train, name), label=name)
        axes[0].set(title="training loss and its terms", yscale="log")
        for split in ("validation", "test"):
            for name in scores:
                measured = [x for x in evaluations if x["split"] == split and name in x["metrics"]]
                if measured:
                    axes[1].plot(*_points(measured, name), marker="o", markersize=3, label=f"{split} {name}")
        axes[1].set(title=title)
        axes[2].plot(*_points(train, "learning_rate"))
        axes[2].set(title="learning rate")
        for axis in axes:
            axis.set_xlabel("epoch")
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend()


def _points(lines: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """The epochs and the values of a metric."""
    return [line["epoch"] for line in lines], [line["metrics"].get(name, np.nan) for line in lines]


def save_panel(columns: dict[str, np.ndarray], captions: list[str], path: Path) -> None:
    """Draws images side by side as a PNG, one row an image.

    Args:
      columns: title -> images (n, height, width, 3), float in [0, 1] or uint8; heights may differ between columns.
      captions: n lines of text, one for each row.
      path: the PNG.
    """
    rows = len(captions)
    with _figure(path, 2.6 * len(columns), 2.75 * rows) as figure:
        axes = figure.subplots(rows, len(columns), squeeze=False)
        for column, (title, images) in enumerate(columns.items()):
            for row in range(rows):
                axes[row, column].imshow(images[row], interpolation="nearest")
                axes[row, column].set_axis_off()
            axes[0, column].set_title(f"{title} ({images.shape[1]} px)", fontsize=9)
        # Room for the captions: between rows, and below the last.
        figure.get_layout_engine().set(h_pad=0.12, rect=(0, 0.12 / rows, 1, 1 - 0.12 / rows))  # type: ignore[call-arg]
        for row, caption in enumerate(captions):
            place = {"transform": axes[row, 0].transAxes, "va": "top", "in_layout": False}
            axes[row, 0].text(0, -0.04, caption, fontsize=8, parse_math=False, **place)


def save_direction_probabilities(
    probabilities: np.ndarray, names: Sequence[str], chosen: Sequence[Sequence[str]], path: Path
) -> None:
    """Draws the probability of every direction (layers, directions) in every layer; a dot marks the chosen ones."""
    layers = len(probabilities)
    with _figure(path, 6, 1.5 + 0.3 * layers) as figure:
        axes = figure.subplots()
        image = axes.imshow(probabilities, cmap="viridis", aspect="auto")
        points = [(names.index(name), layer) for layer, of_layer in enumerate(chosen) for name in of_layer]
        axes.plot(*zip(*points), "o", color="white", markersize=4)
        axes.set(xticks=range(len(names)), xticklabels=names, yticks=range(layers), ylabel="layer", xlabel="direction")
        figure.colorbar(image, label="probability")


def save_confusion(confusion: np.ndarray, class_names: tuple[str, ...], path: Path) -> None:
    """Draws a confusion matrix (classes, classes), rows true and columns predicted, as a PNG."""
    share = np.divide(confusion, np.maximum(confusion.sum(axis=1, keepdims=True), 1), dtype=np.float32)
    size = min(4 + 0.15 * len(class_names), 24)
    with _figure(path, size, size) as figure:
        axis = figure.subplots()
        image = axis.imshow(share, cmap="viridis", vmin=0, vmax=1)
        axis.set(xlabel="predicted", ylabel="true", title="share of each true class")
        if len(class_names) <= 120:
            names = {"labels": class_names, "fontsize": 6, "parse_math": False}
            axis.set_xticks(range(len(class_names)), rotation=90, **names)
            axis.set_yticks(range(len(class_names)), **names)
        figure.colorbar(image, fraction=0.046)
