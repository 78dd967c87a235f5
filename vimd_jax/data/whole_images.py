"""Evaluating whole images of unequal sizes in batches, each batch of one size, and few sizes in all.

A network is compiled for every size of a batch, so that an evaluation with a hundred sizes would spend its time there.
Where there are more than config.dataset.eval_sizes, the sides are rounded to multiples of 2, 4, 8, … pixels, and the
images resized to that; scores are compared with the label maps at their own sizes in any case.
"""

import logging
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vimd_jax.data.geometry import Size, fitted_size, rounded_sizes
from vimd_jax.data.source import Source
from vimd_jax.errors import UnreadableImage

PADDING = -1  # index of what fills up a batch

log = logging.getLogger(__name__)


class Slot(NamedTuple):
    """One example of an evaluation.

    Attributes:
        index: of the image in its source, or PADDING.
        size: that the image is resized to.
        canvas: that its label map is filled up to.
    """

    index: int
    size: Size
    canvas: Size


def slots(source: Source, config: ConfigDict, batch_size: int, multiple: int = 1) -> list[Slot]:
    """Every image of a source once, those of one size together, filled up to whole batches.

    Args:
        source: the images.
        config: `config.dataset`; reads size_limits and eval_sizes.
        batch_size: examples in a batch.
        multiple: that the sides have to be of, in pixels.
    """
    full = _sizes(source)
    sizes = rounded_sizes([fitted_size(size, config.size_limits) for size in full], config.eval_sizes, multiple)
    groups: dict[Size, list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(size, []).append(i)
    log.info("%d whole images, %d different sizes, evaluated in %d", len(full), len(set(full)), len(groups))
    planned = []
    for size, indices in groups.items():
        canvas = tuple(max(sides) for sides in zip(*(full[i] for i in indices)))
        indices = indices + [PADDING] * (-len(indices) % batch_size)
        planned += [Slot(i, size, canvas) for i in indices]
    return planned


def _sizes(source: Source) -> list[Size]:
    """The sizes of all images; one that cannot be read gets that of another, and is dealt with when it is its turn."""
    found: list[Size | None] = []
    for i in range(len(source)):
        try:
            found.append(source.size(i))
        except UnreadableImage:
            found.append(None)
    known = next((size for size in found if size), (1, 1))
    return [size or known for size in found]


def label_size(size: Size) -> np.ndarray:
    """(height, width) int32 of a label map."""
    return np.array(size[::-1], np.int32)
