import numpy as np
import pytest

from vimd_jax.data.labels import cached_labels


class Records(list):
    """Records with these labels, which count how often one is read."""

    def __init__(self, labels):
        super().__init__({"label": label} for label in labels)
        self.reads = 0

    def __getitem__(self, i):
        self.reads += 1
        return super().__getitem__(i)

    def __iter__(self):
        return (self[i] for i in range(len(self)))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vimd_jax" / "labels"


LABELS = np.random.default_rng(0).integers(0, 1000, 5000)


def test_the_second_time_only_a_sample_is_read(cache):
    first, second = Records(LABELS), Records(LABELS)
    for records in (first, second):
        labels = cached_labels(records, "imagenet2012/5.1.0-train")
        np.testing.assert_array_equal(labels, LABELS)
        assert labels.dtype == np.int32
    assert first.reads == 5000 and second.reads == 32
    assert [path.name for path in cache.iterdir()] == ["imagenet2012-5.1.0-train.npy"]


FEWER, MORE, REORDERED, CHANGED = LABELS[:-1], np.append(LABELS, 3), LABELS[::-1], LABELS + 1


@pytest.mark.parametrize("other", [FEWER, MORE, REORDERED, CHANGED], ids=["fewer", "more", "reordered", "changed"])
def test_labels_that_do_not_fit_are_read_again(other):
    cached_labels(Records(LABELS), "a")
    for reads in (len(other), 32):
        records = Records(other)
        np.testing.assert_array_equal(cached_labels(records, "a"), other)
        assert records.reads >= reads
    assert records.reads == 32


def test_every_version_and_split_has_its_own(cache):
    for name in ("a/1.0.0-train", "a/1.0.1-train", "a/1.0.0-train+validation"):
        cached_labels(Records(LABELS), name)
    assert len(list(cache.iterdir())) == 3


def test_a_damaged_file_is_replaced(cache):
    cached_labels(Records(LABELS), "a")
    for damage in (b"", b"\x93NUMPY", (cache / "a.npy").read_bytes()[:-9]):
        (cache / "a.npy").write_bytes(damage)
        np.testing.assert_array_equal(cached_labels(Records(LABELS), "a"), LABELS)
    np.testing.assert_array_equal(np.load(cache / "a.npy"), LABELS)


def test_a_cache_that_cannot_be_written_is_done_without(cache, caplog):
    cache.parent.write_text("a file where the folder should be")
    np.testing.assert_array_equal(cached_labels(Records(LABELS), "a"), LABELS)
    assert "could not be kept" in caplog.text


def test_no_records():
    for _ in range(2):
        assert cached_labels(Records([]), "a").shape == (0,)
