"""From a source to batches: every example is a pure function of (seed, position), and Grain computes them in advance.

Because example i depends only on the seed and i, a run resumes anywhere without saved iterator state, and neither the
number of worker processes nor the number of hosts changes what the network sees.
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
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from vimd_jax.data.augment import augment
from vimd_jax.data.classes import IGNORED
from vimd_jax.data.geometry import (
    BICUBIC,
    BILINEAR,
    View,
    central_view,
    draw_scaled_view,
    draw_view,
    low_resolution_view,
    pair,
    whole_view,
)
from vimd_jax.data.images import Reduction
from vimd_jax.data.preparation import NetworkView, prepare_views
from vimd_jax.data.rand_augment import MEAN
from vimd_jax.data.source import Record, Source
from vimd_jax.data.whole_images import PADDING, Slot, label_size, slots
from vimd_jax.errors import DatasetError, UnreadableImage

Batch = dict[str, np.ndarray]
Batches = Generator[Batch, None, None]  # has close()
Target = Callable[[Record, View], Any]  # what stands beside an image in a batch, an array of one shape for all records

ENDLESS = 2**48  # Grain requires a finite length
VIEWS = ("high", "low")
FILL = tuple(round(x) for x in MEAN.tolist())  # what an image is filled up with: the mean colour of ImageNet


def train_batches(
    source: Source,
    config: ConfigDict,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    views: Sequence[str] = VIEWS,
    target: Target | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Endless shuffled, augmented training batches.

    Args:
        source: the training images.
        config: `config.dataset`; reads high_resolution, low_resolution, crop_scale, flip, augment, repeats,
            sampling, on_error, reduced_decoding and num_workers; of a source of label maps size_limits, scale_range
            and largest_class, but not crop_scale and reduced_decoding.
        batch_size: global batch size, over all processes.
        seed: determines the order and the augmentation.
        start_step: number of batches to skip; the rest are those of an uninterrupted run.
        views: those of "high" and "low" that batches shall have; to leave one out saves its time.
        target: what stands beside an image, from its record and the view drawn of it; None: nothing.
        process_index: which of the process_count equal, contiguous slices of every global batch to yield.
        process_count: number of processes that train together.

    Returns:
        An iterator of dictionaries of numpy arrays, b = batch_size / process_count: "high" uint8 (b, H, W, 3), "low"
        uint8 (b, h, w, 3), "target" (b, …), int32 (b,) "index" (in the source) and "skipped" (1 where an unreadable
        image was replaced by the next readable one), and float32 (b,) "weight" (1). Its `close()` stops the worker
        processes.

    Raises:
        DatasetError: at once for invalid arguments; while iterating for unreadable images, unless
            config.on_error = "skip", which replaces and logs them.
    """
    if config.sampling == "balanced" and source.labels is None:
        raise DatasetError(
            "config.dataset.sampling is 'balanced', but these images have no classes: set it to 'uniform'"
        )
    example = functools.partial(_train_example, source, config, seed, views, target)
    return _batches(example, range(start_step, ENDLESS), config, batch_size, process_index, process_count)


def eval_batches(
    source: Source,
    config: ConfigDict,
    *,
    batch_size: int,
    views: Sequence[str] = VIEWS,
    target: Target | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Every image of the source exactly once, in order, in ceil(n / batch_size) batches.

    Arguments and batches are those of `train_batches`; the view is `central_view` with config.eval_crop. Two kinds of
    examples are black images with weight 0 and the target of a record without one: the padding of the last batch
    (index -1), and unreadable images if config.on_error = "skip" (skipped 1).

    Of a source of label maps the images are whole, see whole_images.py, "target" is filled up to the largest map of the
    images of one size, and "label_size" int32 (b, 2) is the (height, width) of the map itself.
    """
    return next(
        eval_passes(
            source, config, batch_size=batch_size, views=views, target=target, process_index=process_index,
            process_count=process_count, endless=False,
        )
    )  # fmt: skip


def eval_passes(
    source: Source,
    config: ConfigDict,
    *,
    batch_size: int,
    views: Sequence[str] = VIEWS,
    target: Target | None = None,
    process_index: int = 0,
    process_count: int = 1,
    endless: bool = True,
) -> Iterator[Iterator[Batch]]:
    """What `eval_batches` yields, again and again; the input processes stay from one pass to the next."""
    steps = -(-len(source) // max(1, batch_size))
    if source.maps:
        multiple = config.high_resolution // config.low_resolution if "low" in views else 1
        planned = slots(source, config, batch_size, multiple)
        steps = len(planned) // batch_size
        example = functools.partial(_whole_example, source, config, views, target, planned)
    else:
        example = functools.partial(_eval_example, source, config, target, steps * batch_size)
    numbers = range(ENDLESS if endless else steps)
    batches = _batches(example, numbers, config, batch_size, process_index, process_count)
    while endless:
        yield itertools.islice(batches, steps)
    yield batches


def steps_per_epoch(source: Source, config: ConfigDict, batch_size: int) -> int:
    """Whole training batches in an epoch, at least one."""
    return max(1, samples_per_epoch(len(source), config.repeats) // batch_size)


def samples_per_epoch(size: int, repeats: int) -> int:
    """Examples in an epoch over `size` images.

    Repeated augmentation keeps floor(size / 256) · 256 of them, as timm's RASampler does (all, below 256): an epoch
    then sees about size / repeats distinct images, each `repeats` times in a row with different augmentation.
    """
    return size if repeats == 1 or size < 256 else size // 256 * 256


def _train_example(
    source: Source, config: ConfigDict, seed: int, views: Sequence[str], target: Target | None, i: int
) -> Batch:
    epoch, position = divmod(i, samples_per_epoch(len(source), config.repeats))
    scheduled = int(_epoch_order(source, config.sampling, seed, epoch)[position // config.repeats])
    for index in itertools.chain(range(scheduled, len(source)), range(scheduled)):
        drawing = Drawing(config, (seed, 1, i))
        reduces = config.reduced_decoding and not source.maps
        record = read_or_skip(source, index, config.on_error, drawing.reduction if reduces else None)
        if record is not None:
            break
    else:
        raise DatasetError(f"none of the {len(source)} training images can be read; check config.dataset.directory")
    view = drawing.view or (drawing.draw_on(record.target) if source.maps else drawing.draw(record.image.size))
    seen, low = view, network_view(config).low_resolution
    if "low" in views and not source.maps and network_view(config).is_ready(record.image):
        seen = view._replace(size=low[::-1])  # not enlarged first; the high view is then made of the low one
    image = view.pad(augment(seen.apply(record.image), config.augment, drawing.rng), FILL)
    sizes = {"high": view.canvas or view.size, "low": low[::-1]}
    images = {name: np.asarray(image.resize(sizes[name], BICUBIC)) for name in views}
    return _example(images, index, _beside(target, record, view), skipped=index != scheduled)


class Drawing:
    """The random choices of a seed for one image: its view, and from `rng` afterwards its augmentation.

    With reduced decoding, the view is drawn as soon as the image's size is read from the header, and decides how much
    smaller the image is decoded; otherwise it is drawn for the decoded image's size.
    """

    def __init__(self, config: ConfigDict, seed: tuple[int, ...]):
        self._config, self.rng = config, np.random.default_rng(seed)
        self.view: View | None = None

    def draw(self, full_size: tuple[int, int]) -> View:
        config = self._config
        self.view = draw_view(
            full_size, config.high_resolution, self.rng, crop_scale=config.crop_scale, flip=config.flip
        )
        return self.view

    def draw_on(self, labels: Image.Image) -> View:
        """The view of an image with a label map, which decides with others where it is cropped."""
        config = self._config
        return draw_scaled_view(
            labels, config.high_resolution, self.rng, limits=config.size_limits, scale=config.scale_range,
            largest_class=config.largest_class, ignored=IGNORED, flip=config.flip,
        )  # fmt: skip

    def reduction(self, width: int, height: int) -> int:
        return self.draw((width, height)).reduction


def _eval_example(source: Source, config: ConfigDict, target: Target | None, period: int, i: int) -> Batch:
    i %= period
    if i >= len(source):
        return blank_example(config, target)
    record = read_or_skip(source, i, config.on_error)
    if record is None:
        return {**blank_example(config, target), "index": np.int32(i), "skipped": np.int32(1)}
    view = central_view(record.image.size, config.high_resolution, config.eval_crop)
    return _example(prepare_views(record.image, network_view(config)), i, _beside(target, record, view))


def network_view(config: ConfigDict) -> NetworkView:
    """The view of an image that networks read in evaluation, from `config.dataset`."""
    return NetworkView(pair(config.high_resolution), config.eval_crop, pair(config.low_resolution))


def _whole_example(
    source: Source, config: ConfigDict, views: Sequence[str], target: Target | None, planned: list[Slot], i: int
) -> Batch:
    index, size, canvas = planned[i % len(planned)]
    record = None if index == PADDING else read_or_skip(source, index, config.on_error)
    skipped = record is None and index != PADDING
    weight = float(record is not None)
    record = record or Record(Image.new("RGB", canvas))
    full_size = record.image.size if record.target is None else record.target.size
    beside = _beside(target, record, whole_view(full_size, full_size)._replace(canvas=canvas))
    image = whole_view(full_size, size).apply(record.image, BILINEAR)
    example = _example(scaled_views(image, config, views), index, beside, weight=weight, skipped=skipped)
    return example | {"label_size": label_size(full_size)}


def scaled_views(high: Image.Image, config: ConfigDict, views: Sequence[str] = VIEWS) -> Batch:
    """The views of an image in high resolution, of any size; the low resolution has the proportions of the config."""
    scale = config.high_resolution / config.low_resolution
    low_size = tuple(max(1, round(side / scale)) for side in (high.height, high.width))
    made = {"high": lambda: high, "low": lambda: low_resolution_view(high, low_size)}
    return {name: np.asarray(made[name]()) for name in views}


def blank_example(config: ConfigDict, target: Target | None) -> Batch:
    """An example that does not count: black, weight 0, index -1, and the target of a record without one."""
    record = Record(Image.new("RGB", pair(config.high_resolution)[::-1]))
    view = central_view(record.image.size, config.high_resolution)
    return _example(prepare_views(record.image, network_view(config)), PADDING, _beside(target, record, view), weight=0)


def _beside(target: Target | None, record: Record, view: View) -> Batch:
    return {} if target is None else {"target": target(record, view)}


def _example(images: Batch, index: int, beside: Batch, *, weight: float = 1, skipped: bool = False) -> Batch:
    return {
        **images,
        **beside,
        "index": np.int32(index),
        "weight": np.float32(weight),
        "skipped": np.int32(skipped),
    }


@functools.lru_cache(maxsize=2)
def _epoch_order(source: Source, sampling: str, seed: int, epoch: int) -> np.ndarray:
    """The images of an epoch in their order: each once, or of every class equally many."""
    rng = np.random.default_rng((seed, 0, epoch))
    order = rng.permutation(len(source))
    return _balanced(order, source.labels, rng) if sampling == "balanced" else order


def _balanced(order: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many images, of every class equally many, up to one: a part of a large class, a small one repeatedly."""
    classes = rng.permutation(np.unique(labels))  # the first ones get one more
    of_class = [order[labels[order] == label] for label in classes]
    counts = [len(part) for part in np.array_split(order, len(classes))]
    return rng.permutation(np.concatenate([np.resize(images, n) for images, n in zip(of_class, counts)]))


def read_or_skip(source: Source, i: int, on_error: str, reduction: Reduction | None = None) -> Record | None:
    """Record i of a source; None if it cannot be read and on_error is "skip", which is logged once.

    Raises:
        UnreadableImage: it cannot be read, and on_error is "stop".
    """
    name = source.name(i)
    if name in _unreadable:
        return None
    try:
        return source.read(i, reduction)
    except UnreadableImage as error:
        if on_error == "stop":
            remedy = "replace it, or set config.dataset.on_error=skip"
            raise UnreadableImage(f"{error}; {remedy}") from None
        _unreadable.add(name)
        logging.getLogger(__name__).warning("skipped: %s", error)
        return None


_unreadable: set[str] = set()  # the names of images that are skipped, so that none is tried twice


def _batches(
    example: Callable[[int], Batch],
    steps: range,
    config: ConfigDict,
    batch_size: int,
    process_index: int,
    process_count: int,
) -> Batches:
    """This process's share of the batches numbered `steps`, computed in advance by Grain."""
    if batch_size < 1 or batch_size % process_count:
        raise DatasetError(
            f"batch_size is {batch_size}; choose a multiple of the number of processes ({process_count})"
        )
    share = batch_size // process_count

    def batch(step: int) -> Batch | DatasetError:
        start = step * batch_size + process_index * share
        try:
            examples = [example(i) for i in range(start, start + share)]
        except DatasetError as error:
            return error  # Raised on arrival: Grain would wrap it and, between processes, leak shared memory.
        return {key: np.stack([each[key] for each in examples]) for key in examples[0]}

    # Grain's own end of iteration would leak shared memory too, so it sees an endless range and _iterate stops.
    dataset = grain.MapDataset.range(steps.start, ENDLESS).map(batch)
    # Two threads overlap the decoding of one batch with the resizing of another (Pillow releases the interpreter lock).
    # A worker process needs only one, since there the parallelism comes from the number of processes.
    threads = 1 if config.num_workers else 2
    batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if config.num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which only absl's app.run parses.
        options = grain.MultiprocessingOptions(config.num_workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(options, _start_worker)
    iterator = _iterate(batches, len(steps))
    _open.add(iterator)
    return iterator


def _start_worker(worker_index: int, worker_count: int) -> None:
    """Makes a worker process leave signals to the main process, and exit with it even if that one is killed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which schedulers send to the whole process group
        signal.signal(number, signal.SIG_IGN)
    main = multiprocessing.parent_process()

    def follow() -> None:
        main.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _iterate(batches: grain.IterDataset, count: int) -> Batches:
    iterator = iter(batches)
    try:
        # Through map, so that no variable here keeps a batch, and with it shared memory, alive beyond the close.
        yield from map(_received, itertools.islice(iterator, count))
    finally:
        iterator.close()


def _received(batch: Batch | DatasetError) -> Batch:
    """A copy of the batch, because the shared memory of a worker process disappears when it exits."""
    if isinstance(batch, DatasetError):
        raise batch
    return {key: np.array(value) for key, value in batch.items()}


# Workers still running at exit would outlive the interpreter's modules and fail noisily.
_open: weakref.WeakSet[Batches] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for iterator in list(_open):
        iterator.close()
