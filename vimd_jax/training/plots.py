"""Plots of a run: its curves, and its images beside the predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first: no screen is needed)
import numpy as np  # noqa: E402


def save_curves(lines: list[dict[str, Any]], path: Path, scores: Sequence[str], title: str) -> None:
    """Draws metrics.jsonl as a PNG: the loss with its terms, these scores of the evaluations, the learning rate.

    Args:
      lines: see `metrics.read_metrics`.
      path: the PNG.
      scores: names of scores that share an axis.
      title: of that axis.
    """
    train = [line for line in lines if line["split"] == "train"]
    evaluations = [line for line in lines if line["split"] in ("validation", "test")]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    hidden = ("learning_rate", "images_per_second", "input_wait", "gradient_norm", "parameter_norm")
    for name in train[0]["metrics"] if train else ():
        if name not in hidden:
            axes[0].plot([line["epoch"] for line in train], [line["metrics"][name] for line in train], label=name)
    axes[0].set(title="training loss and its terms", yscale="log")
    for split in ("validation", "test"):
        for name in scores:
            points = [
                (x["epoch"], x["metrics"][name]) for x in evaluations if x["split"] == split and name in x["metrics"]
            ]
            if points:
                axes[1].plot(*zip(*points), marker="o", markersize=3, label=f"{split} {name}")
    axes[1].set(title=title)
    axes[2].plot([line["epoch"] for line in train], [line["metrics"]["learning_rate"] for line in train])
    axes[2].set(title="learning rate")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    _save(figure, path)


def save_panel(columns: dict[str, np.ndarray], captions: list[str], path: Path) -> None:
    """Draws images side by side as a PNG, one row an image.

    Args:
      columns: title -> images (n, height, width, 3), float in [0, 1] or uint8; heights may differ between columns.
      captions: n lines of text, one for each row.
      path: the PNG.
    """
    rows = len(captions)
    figure, axes = plt.subplots(
        rows, len(columns), figsize=(2.6 * len(columns), 2.75 * rows), squeeze=False, layout="constrained"
    )
    for column, (title, images) in enumerate(columns.items()):
        for row in range(rows):
            axes[row, column].imshow(images[row], interpolation="nearest")
            axes[row, column].set_axis_off()
        axes[0, column].set_title(f"{title} ({images.shape[1]} px)", fontsize=9)
    # Room for the captions: between rows, and below the last.
    figure.get_layout_engine().set(h_pad=0.12, rect=(0, 0.12 / rows, 1, 1 - 0.12 / rows))  # type: ignore[call-arg]
    for row, caption in enumerate(captions):
        axes[row, 0].text(0, -0.04, caption, transform=axes[row, 0].transAxes, fontsize=8, va="top", in_layout=False)
    _save(figure, path)


def save_direction_probabilities(
    probabilities: np.ndarray, names: Sequence[str], chosen: Sequence[Sequence[str]], path: Path
) -> None:
    """Draws the probability of every direction (layers, directions) in every layer; a dot marks the chosen ones."""
    layers = len(probabilities)
    figure, axes = plt.subplots(figsize=(6, 1.5 + 0.3 * layers), layout="constrained")
    image = axes.imshow(probabilities, cmap="viridis", aspect="auto")
    points = [(names.index(name), layer) for layer, of_layer in enumerate(chosen) for name in of_layer]
    axes.plot(*zip(*points), "o", color="white", markersize=4)
    axes.set(xticks=range(len(names)), xticklabels=names, yticks=range(layers), ylabel="layer", xlabel="direction")
    figure.colorbar(image, label="probability")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_confusion(confusion: np.ndarray, class_names: tuple[str, ...], path: Path) -> None:
    """Draws a confusion matrix (classes, classes), rows true and columns predicted, as a PNG."""
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    size = min(4 + 0.15 * len(class_names), 24)
    figure, axis = plt.subplots(figsize=(size, size), layout="constrained")
    image = axis.imshow(share, cmap="viridis", vmin=0, vmax=1)
    axis.set(xlabel="predicted", ylabel="true", title="share of each true class")
    if len(class_names) <= 120:
        axis.set_xticks(range(len(class_names)), class_names, rotation=90, fontsize=6)
        axis.set_yticks(range(len(class_names)), class_names, fontsize=6)
    figure.colorbar(image, fraction=0.046)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
