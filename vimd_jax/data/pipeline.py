"""From a source to batches: every example is a pure function of (seed, number), and Grain computes them ahead of time.

Because example i depends on nothing but the seed and i, a run resumes anywhere without saved iterator state, and
neither the number of worker processes nor the number of hosts changes what the training sees.
"""

import atexit
import functools
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator

import grain
import ml_collections
import numpy as np
from absl import flags
from PIL import Image

from vimd_jax.data.images import DatasetError, UnreadableImage
from vimd_jax.data.sources import Source
from vimd_jax.data.transforms import eval_view, low_resolution_view, train_view

Batch = dict[str, np.ndarray]

ENDLESS = 2**48  # Grain wants a length
PADDING = -1  # record number of the examples that fill up the last evaluation batch


def train_batches(
    source: Source,
    config: ml_collections.ConfigDict,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless shuffled, augmented training batches.

    Args:
        source: the training pictures.
        config: `config.dataset`; read here are high_resolution, low_resolution, crop_scale, flip, repeats, on_error
            and num_workers.
        batch_size: size of the global batch, over all processes.
        seed: of the order and the augmentation.
        start_step: number of batches to pass over; the result is that of an uninterrupted run.
        process_index: which of the process_count equal, contiguous slices of every global batch to yield.
        process_count: number of processes that train together.

    Returns:
        An iterator of dictionaries of numpy arrays, b = batch_size / process_count: "high" uint8 (b, H, H, 3), "low"
        uint8 (b, h, h, 3) and int32 (b,) "label", "index" (record number in the source) and "skipped" (1 where an
        unreadable picture was replaced by the next readable one), and float32 (b,) "weight" (1). Its `close()` ends
        the worker processes.

    Raises:
        DatasetError: at once for impossible arguments; while iterating for unreadable pictures unless
            config.on_error = "skip", which replaces and logs them.
    """
    examples = TrainExamples(source, config, seed)
    return _batches(examples, range(start_step, ENDLESS), config, batch_size, process_index, process_count)


def eval_batches(
    source: Source,
    config: ml_collections.ConfigDict,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every picture of the source exactly once, in order, in ceil(n / batch_size) batches.

    Arguments and batches are those of `train_batches`; the view is `eval_view` with config.eval_crop. Two kinds of
    examples are black pictures of weight 0: the padding of the last batch (index -1, label 0), and unreadable pictures
    if config.on_error = "skip" (skipped 1).
    """
    steps = range(-(-len(source) // max(1, batch_size)))
    return _batches(EvalExamples(source, config), steps, config, batch_size, process_index, process_count)


def steps_per_epoch(source: Source, config: ml_collections.ConfigDict, batch_size: int) -> int:
    """Whole training batches in an epoch, at least one."""
    return max(1, samples_per_epoch(len(source), config.repeats) // batch_size)


def samples_per_epoch(size: int, repeats: int) -> int:
    """Examples in an epoch over `size` pictures.

    Repeated augmentation keeps floor(size / 256) · 256 of them, as timm's RASampler does (all, below 256): an epoch
    then sees about size / repeats distinct pictures, each `repeats` times in a row with different augmentation.
    """
    return size if repeats == 1 or size < 256 else size // 256 * 256


class TrainExamples:
    """The endless sequence of training examples: `examples[i]` is a pure function of (seed, i)."""

    def __init__(self, source: Source, config: ml_collections.ConfigDict, seed: int):
        _check_choice(config)
        self._source, self._config, self._seed = source, config, seed
        self._epoch_size = samples_per_epoch(len(source), config.repeats)

    def __getitem__(self, i: int) -> Batch:
        config = self._config
        epoch, position = divmod(i, self._epoch_size)
        wanted = _epoch_order(self._seed, epoch, len(self._source))[position // config.repeats]
        record, picture = self._read(int(wanted))
        rng = np.random.default_rng((self._seed, 1, i))
        high = train_view(picture, config.high_resolution, rng, crop_scale=config.crop_scale, flip=config.flip)
        return _example(high, config, self._source.labels[record], record, skipped=record != wanted)

    def _read(self, wanted: int) -> tuple[int, Image.Image]:
        """The wanted record and its picture or, when skipping, those of the next readable one."""
        for record in range(wanted, wanted + len(self._source)):
            record %= len(self._source)
            if picture := _read_or_skip(self._source, record, self._config.on_error):
                return record, picture
        raise DatasetError(f"none of the {len(self._source)} training pictures can be read")


class EvalExamples:
    """The pictures of a source in order, then padding."""

    def __init__(self, source: Source, config: ml_collections.ConfigDict):
        _check_choice(config)
        self._source, self._config = source, config

    def __getitem__(self, i: int) -> Batch:
        config = self._config
        black = Image.new("RGB", (config.high_resolution, config.high_resolution))
        if i >= len(self._source):
            return _example(black, config, 0, PADDING, weight=0)
        picture = _read_or_skip(self._source, i, config.on_error)
        high = eval_view(picture, config.high_resolution, config.eval_crop) if picture else black
        return _example(high, config, self._source.labels[i], i, weight=bool(picture), skipped=not picture)


def _batches(
    examples: TrainExamples | EvalExamples,
    steps: range,
    config: ml_collections.ConfigDict,
    batch_size: int,
    process_index: int,
    process_count: int,
) -> Iterator[Batch]:
    """This process' share of the batches numbered `steps`, computed ahead of time by Grain."""
    if batch_size < 1 or batch_size % process_count:
        raise DatasetError(
            f"batch_size is {batch_size}; choose a multiple of the number of processes ({process_count})"
        )
    share = batch_size // process_count

    def batch(step: int) -> Batch | DatasetError:
        start = step * batch_size + process_index * share
        try:
            return _stack([examples[i] for i in range(start, start + share)])
        except DatasetError as error:
            return error  # Raised on arrival: Grain would wrap it and, between processes, leak shared memory.

    # Endless for Grain too, whose StopIteration would likewise leak.
    dataset = grain.MapDataset.range(steps.start, ENDLESS).map(batch)
    # Two threads overlap the decoding of one batch with the resizing of another (Pillow releases the interpreter lock);
    # in worker processes one is enough, since there the parallelism comes from their number.
    threads = 1 if config.num_workers else 2
    batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if config.num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which outside absl's app.run nobody parses
        options = grain.MultiprocessingOptions(config.num_workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(options, _start_worker)
    iterator = _iterate(batches, len(steps))
    _open.add(iterator)
    return iterator


def _start_worker(worker_index: int, worker_count: int) -> None:
    """Has a worker process leave Ctrl-C to the main process, and end with it even if that one is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    threading.Thread(target=lambda: (main.join(), os._exit(1)), daemon=True).start()


def _iterate(batches: grain.IterDataset, count: int) -> Iterator[Batch]:
    iterator = iter(batches)
    try:
        yield from map(_received, itertools.islice(iterator, count))
    finally:
        iterator.close()


def _received(batch: Batch | DatasetError) -> Batch:
    """The batch, copied out of the shared memory of the worker that made it, which ends with the worker."""
    if isinstance(batch, DatasetError):
        raise batch
    return {key: np.array(value) for key, value in batch.items()}


# Workers left running would outlive the interpreter's modules and fail noisily.
_open: weakref.WeakSet[Iterator[Batch]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for iterator in list(_open):
        iterator.close()


def _stack(examples: list[Batch]) -> Batch:
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _example(
    high: Image.Image,
    config: ml_collections.ConfigDict,
    label: int,
    index: int,
    weight: float = 1,
    skipped: bool = False,
) -> Batch:
    return {
        "high": np.asarray(high),
        "low": np.asarray(low_resolution_view(high, config.low_resolution)),
        "label": np.int32(label),
        "index": np.int32(index),
        "weight": np.float32(weight),
        "skipped": np.int32(skipped),
    }


def _read_or_skip(source: Source, record: int, on_error: str) -> Image.Image | None:
    try:
        return source.read(record)
    except UnreadableImage as error:
        if on_error == "stop":
            remedy = "remove or replace it, or set config.dataset.on_error=skip"
            raise UnreadableImage(f"{error}; {remedy}") from None
        _warn_once(f"skipped: {error}")
        return None


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(size)


def _check_choice(config: ml_collections.ConfigDict) -> None:
    if config.on_error not in ("stop", "skip"):
        raise DatasetError(f"config.dataset.on_error is {config.on_error!r}; choose stop or skip")
    if config.repeats < 1:
        raise DatasetError(f"config.dataset.repeats is {config.repeats}; choose 1, or 3 as published")
