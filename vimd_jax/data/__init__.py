"""Pictures: where they come from (sources), how they are cut (transforms) and how they reach a training (pipeline)."""

from vimd_jax.data.catalog import DATASETS, DatasetInfo
from vimd_jax.data.images import DatasetError, UnreadableImage, read_image
from vimd_jax.data.pipeline import eval_batches, steps_per_epoch, train_batches
from vimd_jax.data.sources import load_source
from vimd_jax.data.transforms import eval_view, low_resolution_view

__all__ = [
    "DATASETS",
    "DatasetError",
    "DatasetInfo",
    "UnreadableImage",
    "eval_batches",
    "eval_view",
    "load_source",
    "low_resolution_view",
    "read_image",
    "steps_per_epoch",
    "train_batches",
]
