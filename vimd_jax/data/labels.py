"""Labels of datasets that keep them beside the images, read once: of ImageNet that is a pass over 140 GB.

They are kept in `$XDG_CACHE_HOME/vimd_jax/labels` (usually ~/.cache/vimd_jax/labels).
"""

import contextlib
import io
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vimd_jax.files import replace_file

SAMPLE = 32  # records whose labels are compared with the kept ones


def cached_labels(records: Sequence[Mapping], name: str) -> np.ndarray:
    """The "label" of every record, int32 (number of records,), from the cache where that fits the records.

    Args:
        records: the data; reading one reads its image too.
        name: what identifies them: dataset, version and split.
    """
    path = _folder() / (re.sub(r"[^\w.+-]+", "-", name) + ".npy")
    with contextlib.suppress(OSError, ValueError, EOFError):  # there is none, or it is damaged
        labels = np.load(path, allow_pickle=False)
        if labels.dtype == np.int32 and labels.shape == (len(records),) and _agree(records, labels):
            return labels
    log = logging.getLogger(__name__)
    log.info("reading the labels of the %d images of %s, once; they are kept in %s", len(records), name, path)
    labels = np.array([record["label"] for record in records], np.int32)
    try:
        _save(path, labels)
    except OSError as error:
        log.warning("the labels could not be kept, and will be read again: %s: %s", path, error.strerror)
    return labels


def _agree(records: Sequence[Mapping], labels: np.ndarray) -> bool:
    """Whether the records, a sample spread over them, have these labels: those of another order do not."""
    sample = np.linspace(0, len(labels) - 1, min(SAMPLE, len(labels))).astype(int)
    return all(records[int(i)]["label"] == labels[i] for i in sample)


def _save(path: Path, labels: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content.getvalue())


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "vimd_jax" / "labels"
