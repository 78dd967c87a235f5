import collections
import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vimd_jax.data.geometry import NEAREST, central_view, low_resolution_view
from vimd_jax.data.images import read_image
from vimd_jax.data.pipeline import eval_batches, eval_passes, samples_per_epoch, steps_per_epoch, train_batches
from vimd_jax.data.sources import Record, Source, load_source
from vimd_jax.errors import DatasetError, UnreadableImage


def label(record, view):
    """The class of a record, 0 where it has none."""
    return np.int32(record.target or 0)


def take(source, config, count, **arguments):
    arguments = dict(batch_size=8, seed=3, target=label) | arguments
    return list(itertools.islice(train_batches(source, config, **arguments), count))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_shapes_and_types(dataset_config):
    config = dataset_config()
    batch = take(load_source(config, "train"), config, 1)[0]
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "high": ((8, 32, 32, 3), "uint8"),
        "low": ((8, 8, 8, 3), "uint8"),
        "target": ((8,), "int32"),
        "index": ((8,), "int32"),
        "weight": ((8,), "float32"),
        "skipped": ((8,), "int32"),
    }
    assert (batch["weight"] == 1).all() and not batch["skipped"].any()
    assert all(type(value) is np.ndarray for value in batch.values())


def test_images_that_are_not_square(dataset_config):
    config = dataset_config()
    with config.unlocked():
        del config.high_resolution, config.low_resolution
        config.high_resolution, config.low_resolution = (32, 16), (8, 4)
    training = take(load_source(config, "train"), config, 1, batch_size=4)
    for batch in training + list(eval_batches(load_source(config, "test"), config, batch_size=4)):
        assert (batch["high"].shape, batch["low"].shape) == ((4, 32, 16, 3), (4, 8, 4, 3))


@pytest.mark.parametrize("views", [("high",), ("low",), ("high", "low")])
def test_only_the_views_that_are_asked_for(dataset_config, views):
    config = dataset_config()
    source = load_source(config, "train")
    whole, part = take(source, config, 1)[0], take(source, config, 1, views=views)[0]
    assert_same([part], [{key: value for key, value in whole.items() if key in views or key not in ("high", "low")}])


def test_reduced_decoding_sees_the_same_crops(dataset_config, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        (tmp_path / name / "a").mkdir(parents=True)
    for i, size in enumerate([(400, 304), (304, 400), (72, 56), (1000, 704)] * 2):
        pixels = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = (1, 6)[i // 4]  # the second four lie on their side
        pixels.save(tmp_path / f"train/a/{i}.jpg", quality=95, exif=exif)
        pixels.save(tmp_path / f"test/a/{i}.jpg", quality=95)
    config = dataset_config(name="folder", directory=str(tmp_path), validation_fraction=0.0, crop_scale=(0.3, 1.0))
    reduced = dataset_config(**config.to_dict() | {"reduced_decoding": True})
    source = load_source(config, "train")
    whole, fast = take(source, config, 10), take(source, reduced, 10)
    assert_same(fast[6:], take(source, reduced, 4, start_step=6))
    for one, other in zip(whole, fast):
        difference = np.abs(one["high"].astype(int) - other["high"]).mean(axis=(1, 2, 3))
        assert difference.max() < 1
        assert not difference[one["index"] % 4 == 2].any(), "an image that is too small is decoded in full"
        assert difference.any()
    assert_same(*(list(eval_batches(load_source(c, "test"), c, batch_size=4)) for c in (config, reduced)))


class Segments(Source):
    """JPEG photographs with maps of labels beside them: each pixel's label is the brightness of its cell."""

    class_names = ("dark", "grey", "bright")

    def __init__(self, folder):
        rng = np.random.default_rng(0)
        self._sizes = [(400, 304), (72, 56), (1000, 704), (304, 400)]
        self._folder = folder
        for i, size in enumerate(self._sizes):
            cells = Image.fromarray(rng.integers(0, 3, (4, 4), np.uint8))
            cells.resize(size, NEAREST).save(folder / f"{i}.png")
            cells.point([0, 120, 240] + [0] * 253).resize(size, NEAREST).convert("RGB").save(folder / f"{i}.jpg")

    def __len__(self):
        return len(self._sizes)

    def read(self, i, reduction=None):
        with Image.open(self._folder / f"{i}.png") as labels:
            return Record(read_image(self._folder / f"{i}.jpg", reduction), labels.copy())

    def name(self, i):
        return str(self._folder / f"{i}.jpg")


def segments(record, view):
    if record.target is None:
        return np.full(view.size[::-1], 255, np.uint8)
    return np.asarray(view.apply(record.target, NEAREST))


@pytest.mark.parametrize("reduced", [False, True])
def test_a_map_of_labels_follows_its_image(dataset_config, tmp_path, reduced):
    config = dataset_config(crop_scale=(0.3, 1.0), reduced_decoding=reduced)
    source = Segments(tmp_path)
    training = take(source, config, 4, target=segments, batch_size=4)
    evaluation = list(eval_batches(source, config, batch_size=3, target=segments))
    for batch in training + evaluation:
        seen = batch["weight"] == 1
        assert batch["target"].shape == (len(seen), 32, 32) and batch["target"].dtype == np.uint8
        brightness = np.rint(batch["high"][seen].mean(axis=-1) / 120)
        assert (brightness == batch["target"][seen]).mean() > 0.9, "all but the edges of the cells"
        assert (batch["target"][~seen] == 255).all()
    assert sum((batch["weight"] == 0).sum() for batch in evaluation) == 2


def test_low_resolution_is_the_same_crop_down_sampled(dataset_config):
    config = dataset_config()
    batch = take(load_source(config, "train"), config, 1)[0]
    for high, low in zip(batch["high"], batch["low"]):
        np.testing.assert_array_equal(low, low_resolution_view(Image.fromarray(high), 8))


@pytest.fixture
def low_resolution_photographs(dataset_config, tmp_path):
    """A source of four files, of which two have the low resolution already."""
    rng = np.random.default_rng(0)
    for split, i in itertools.product(("train", "test"), range(4)):
        (tmp_path / split / "a").mkdir(parents=True, exist_ok=True)
        shape = (8, 8, 3) if i % 2 else (40, 30, 3)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(tmp_path / f"{split}/a/{i}.png")
    return dataset_config(
        name="folder", directory=str(tmp_path), validation_fraction=0.0, crop_scale=(1.0, 1.0), flip=False
    )


def test_a_file_of_the_low_resolution_is_evaluated_as_it_is(low_resolution_photographs):
    config = low_resolution_photographs
    source = load_source(config, "test")
    batch = next(eval_batches(source, config, batch_size=4))
    for i, (high, low) in enumerate(zip(batch["high"], batch["low"])):
        image = source.read(i).image
        np.testing.assert_array_equal(high, central_view(image.size, 32).apply(image))
        expected = image if i % 2 else low_resolution_view(Image.fromarray(high), 8)
        np.testing.assert_array_equal(low, expected)


@pytest.mark.parametrize("augment", [{}, {"three_augment": True}])
def test_a_file_of_the_low_resolution_trains_without_being_enlarged_first(low_resolution_photographs, augment):
    config = low_resolution_photographs
    config.augment.update(augment)
    source = load_source(config, "train")
    (batch,) = take(source, config, 1)
    for i, high, low in zip(batch["index"], batch["high"], batch["low"]):
        if i % 2:
            np.testing.assert_array_equal(high, Image.fromarray(low).resize((32, 32), Image.Resampling.BICUBIC))
            assert augment or np.array_equal(low, source.read(i).image)
        else:
            np.testing.assert_array_equal(low, low_resolution_view(Image.fromarray(high), 8))
    (only,) = take(source, config, 1, views=("high",))  # where no network reads the low resolution, it is no exception
    assert augment or np.array_equal(only["high"][batch["index"] % 2 == 0], batch["high"][batch["index"] % 2 == 0])
    for i, high in zip(only["index"], only["high"]):
        if i % 2 and not augment:
            np.testing.assert_array_equal(high, source.read(i).image.resize((32, 32), Image.Resampling.BICUBIC))


def test_batches_are_the_same_only_with_the_same_seed(dataset_config):
    config = dataset_config()
    source = load_source(config, "train")
    batches = take(source, config, 6)
    assert_same(batches, take(load_source(config, "train"), config, 6))
    assert not np.array_equal(batches[0]["index"], take(source, config, 1, seed=4)[0]["index"])


@pytest.mark.parametrize("start", [1, 3, 5, 8])
def test_resuming_continues_as_if_never_interrupted(dataset_config, start):
    config = dataset_config(synthetic_train_size=37)  # epochs end in the middle of a batch
    source = load_source(config, "train")
    assert_same(take(source, config, 10)[start:], take(source, config, 10 - start, start_step=start))


AUGMENT = {"rand_augment": "rand-m9-mstd0.5-inc1", "erasing_probability": 0.5}


@pytest.mark.parametrize("augment", [AUGMENT, {"three_augment": True, "color_jitter": 0.3}])
def test_augmented_batches_depend_on_nothing_but_seed_and_position(dataset_config, augment):
    config = dataset_config(augment=augment, repeats=3)
    source = load_source(config, "train")
    batches = take(source, config, 10)
    assert_same(batches[4:], take(source, config, 6, start_step=4))
    assert_same(batches[2:4], take(source, dataset_config(augment=augment, repeats=3, num_workers=1), 2, start_step=2))
    for high, low in zip(batches[0]["high"], batches[0]["low"]):
        np.testing.assert_array_equal(low, low_resolution_view(Image.fromarray(high), 8))
    plain = take(source, dataset_config(repeats=3), 10)
    pairs = [(one, other) for a, b in zip(batches, plain) for one, other in zip(a["high"], b["high"])]
    changed = np.mean([not np.array_equal(one, other) for one, other in pairs])
    # Two operations, each with probability 1/2 (some change nothing), and erasing: 1 - 1/8 at most.
    assert changed == 1 if "three_augment" in augment else 0.6 < changed < 0.95


def test_evaluation_is_not_augmented(dataset_config):
    config = dataset_config(augment={"rand_augment": "rand-m9-p1.0", "erasing_probability": 1.0})
    test = load_source(config, "test")
    assert_same(*(list(eval_batches(test, settings, batch_size=4)) for settings in (config, dataset_config())))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batch(dataset_config, processes):
    config = dataset_config()
    source = load_source(config, "train")
    shares = [take(source, config, 3, process_index=i, process_count=processes) for i in range(processes)]
    joined = [{key: np.concatenate([share[key] for share in step]) for key in step[0]} for step in zip(*shares)]
    assert_same(joined, take(source, config, 3))


def test_worker_processes_change_nothing_and_report_errors(dataset_config, image_folder):
    folder = image_folder({"train/a": 6, "train/b": 6, "test/a": 5})
    config = dataset_config(name="folder", directory=str(folder), validation_fraction=0.0)
    parallel = dataset_config(**config.to_dict() | {"num_workers": 1})
    source, test = load_source(config, "train"), load_source(config, "test")
    assert_same(take(source, config, 4, start_step=1), take(source, parallel, 4, start_step=1))
    assert_same(list(eval_batches(test, config, batch_size=2)), list(eval_batches(test, parallel, batch_size=2)))
    (folder / "train/b/003.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"b/003\.png: the file is empty; replace .*on_error=skip") as error:
        take(source, parallel, 4)
    assert "\n" not in str(error.value)


def test_workers_exit_when_the_main_process_is_killed(dataset_config):
    code = f"""
from ml_collections import ConfigDict
from vimd_jax.data.pipeline import train_batches
from vimd_jax.data.sources import load_source
config = ConfigDict({dataset_config(num_workers=1).to_dict()!r})
batches = train_batches(load_source(config, "train"), config, batch_size=8, seed=0)
next(batches)
print("ready", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        process.communicate(timeout=30)  # returns once the last process that holds the output has exited


def test_every_epoch_has_all_images_in_a_new_order(dataset_config):
    config = dataset_config()
    batches = take(load_source(config, "train"), config, 15)
    epochs = np.concatenate([batch["index"] for batch in batches]).reshape(3, 40)
    assert (np.sort(epochs) == np.arange(40)).all()
    assert not (epochs[0] == epochs[1]).all() and not (epochs[0] == np.arange(40)).all()
    same_image = [np.concatenate([b["high"] for b in batches])[np.flatnonzero(epochs.ravel() == 7)[k]] for k in (0, 1)]
    assert not np.array_equal(*same_image), "the augmentation of an image differs from epoch to epoch"


def test_labels_match_the_images(dataset_config):
    config = dataset_config(crop_scale=(1.0, 1.0), flip=False)
    source = load_source(config, "train")
    for i, high, target in zip(*(take(source, config, 1)[0][key] for key in ("index", "high", "target"))):
        assert target == source.labels[i]
        # A crop of the whole area is stretched unless its aspect ratio is 1, but most of the bird is always there.
        assert np.abs(high.astype(float) - np.asarray(source.read(i).image)).mean() < 60


def test_balanced_sampling(dataset_config, image_folder):
    """Sixty images of one class, six and two of others: 68 an epoch, 22 or 23 of each, all of a small class in turn."""
    folder = image_folder({"train/a": 60, "train/b": 6, "train/c": 2, "test/a": 1}, side=4)
    config = dataset_config(name="folder", directory=str(folder), validation_fraction=0.0, sampling="balanced")
    source = load_source(config, "train")
    batches = take(source, config, 34, batch_size=4)
    epochs = np.concatenate([batch["index"] for batch in batches]).reshape(2, 68)
    for epoch in epochs:
        counts = np.bincount(epoch, minlength=68)
        assert sorted([counts[:60].sum(), counts[60:66].sum(), counts[66:].sum()]) == [22, 23, 23]
        assert set(counts[:60]) == {0, 1} and set(counts[60:66]) <= {3, 4} and set(counts[66:]) <= {11, 12}
    assert set(epochs[0][epochs[0] < 60]) != set(epochs[1][epochs[1] < 60])
    assert_same(batches[20:], take(source, config, 14, batch_size=4, start_step=20))
    source.labels = None
    with pytest.raises(DatasetError, match="sampling is 'balanced', but these images have no classes"):
        take(source, config, 1)


@pytest.mark.parametrize(
    "size, repeats, expected",
    [
        (5994, 3, 5888),
        (8144, 3, 7936),
        (12000, 3, 11776),
        (3680, 3, 3584),
        (2040, 3, 1792),
        (200, 3, 200),
        (5994, 1, 5994),
    ],
)
def test_samples_per_epoch_match_the_published_numbers(size, repeats, expected):
    assert samples_per_epoch(size, repeats) == expected


def test_repeated_augmentation(dataset_config):
    config = dataset_config(repeats=3, synthetic_train_size=300, high_resolution=8, low_resolution=2)
    source = load_source(config, "train")
    assert steps_per_epoch(source, config, 16) == 16
    batches = take(source, config, 32, batch_size=16)
    order = np.concatenate([batch["index"] for batch in batches]).reshape(2, 256)
    for epoch in order:
        runs = [len(list(group)) for _, group in itertools.groupby(epoch)]
        assert runs == [3] * 85 + [1]
        assert len(set(epoch)) == 86
    assert set(order[0]) != set(order[1])
    high = batches[0]["high"]
    assert not np.array_equal(high[0], high[1]) and not np.array_equal(high[1], high[2])


def test_steps_per_epoch(dataset_config):
    config = dataset_config()
    source = load_source(config, "train")
    assert [steps_per_epoch(source, config, size) for size in (1, 8, 32, 100)] == [40, 5, 1, 1]


@pytest.mark.parametrize("batch_size, processes", [(1, 1), (5, 1), (13, 1), (64, 1), (6, 2), (4, 4)])
def test_evaluation_sees_each_image_once(dataset_config, batch_size, processes):
    config = dataset_config()
    source = load_source(config, "test")
    batches = []
    for i in range(processes):
        share = list(
            eval_batches(source, config, batch_size=batch_size, target=label, process_index=i, process_count=processes)
        )
        assert len(share) == -(-13 // batch_size)
        assert all(len(batch["target"]) == batch_size // processes for batch in share)
        batches += share
    merged = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    real = merged["weight"] == 1
    np.testing.assert_array_equal(np.sort(merged["index"][real]), np.arange(13))
    np.testing.assert_array_equal(merged["target"][real], source.labels[merged["index"][real]])
    assert (merged["index"][~real] == -1).all() and (merged["weight"][~real] == 0).all()
    for i, high in zip(merged["index"][real], merged["high"][real]):
        np.testing.assert_array_equal(high, central_view((32, 32), 32).apply(source.read(i).image))


@pytest.fixture
def damaged(dataset_config, image_folder):
    folder = image_folder({"train/a": 5, "train/b": 5, "test/a": 3, "test/b": 4})
    for name in ("train/a/004.png", "train/b/000.png", "test/a/001.png"):
        (folder / name).write_bytes(b"broken")
    return dataset_config(name="folder", directory=str(folder), validation_fraction=0.0)


def test_stop_is_the_default(damaged):
    with pytest.raises(DatasetError, match=r"train/./00\d\.png: not an image .*; replace it, or set config"):
        take(load_source(damaged, "train"), damaged, 5)
    with pytest.raises(DatasetError, match=r"test/a/001\.png"):
        list(eval_batches(load_source(damaged, "test"), damaged, batch_size=4))


def test_skip_uses_the_next_readable_image_in_training(damaged, caplog):
    damaged.on_error = "skip"
    source = load_source(damaged, "train")
    batches = take(source, damaged, 5, batch_size=2)
    index, skipped, targets = (np.concatenate([b[key] for b in batches]) for key in ("index", "skipped", "target"))
    # Images 4 and 5 are damaged: 6 is seen three times in the epoch, twice as a replacement.
    assert sorted(index) == [0, 1, 2, 3, 6, 6, 6, 7, 8, 9]
    assert skipped.sum() == 2 and set(index[skipped == 1]) == {6}
    np.testing.assert_array_equal(targets, source.labels[index])
    assert sum("a/004.png" in message for message in caplog.messages) == 1


def test_skipped_images_have_weight_zero_in_evaluation(damaged):
    damaged.on_error = "skip"
    batches = list(eval_batches(load_source(damaged, "test"), damaged, batch_size=4))
    merged = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    np.testing.assert_array_equal(merged["weight"], [1, 0, 1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(merged["skipped"], [0, 1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(merged["index"], [0, 1, 2, 3, 4, 5, 6, -1])


def test_an_image_that_cannot_be_read_is_not_tried_again(damaged, monkeypatch):
    damaged.on_error = "skip"
    source = load_source(damaged, "train")
    tries, read = collections.Counter(), type(source._source).read
    monkeypatch.setattr(type(source._source), "read", lambda self, i, *_: (tries.update([i]), read(self, i))[1])
    take(source, damaged, 25, batch_size=2)
    assert max(tries[4], tries[5]) <= 2 and tries[6] > 5  # two threads may try at once


def test_an_endless_evaluation_goes_round(damaged):
    damaged.on_error = "skip"
    test = load_source(damaged, "test")
    once = list(eval_batches(test, damaged, batch_size=4))
    passes = eval_passes(test, damaged, batch_size=4)
    assert_same([*next(passes), *next(passes)], once * 2)


def test_no_readable_image_at_all(damaged):
    damaged.on_error = "skip"
    source = load_source(damaged, "train")
    for i in range(len(source)):
        with open(source.name(i), "wb"):
            pass
    with pytest.raises(DatasetError, match="none of the 10 training images can be read"):
        take(source, damaged, 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 9, "process_count": 2}, r"batch_size is 9; choose a multiple of .* \(2\)"),
    ],
)
def test_batches_that_cannot_be_shared_are_rejected_at_once(dataset_config, arguments, message):
    config = dataset_config()
    with pytest.raises(DatasetError, match=message):
        train_batches(load_source(config, "train"), config, **{"batch_size": 8, "seed": 0} | arguments)
