import gzip
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import official_archives as official
import pytest
from official_archives import miniature

from vimd_jax.data import archives as archives_module
from vimd_jax.data import prepare as prepare_module
from vimd_jax.data.archives import Archive
from vimd_jax.data.catalog import DATASETS
from vimd_jax.data.layouts import FLOWERS, LAYOUTS
from vimd_jax.data.prepare import prepare
from vimd_jax.data.sources import load_source
from vimd_jax.errors import DatasetError
from vimd_jax.files import replace_file


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.is_file() for path in folder.rglob("*")}


def refused(name, tmp_path, message, change):
    """Prepares a dataset after `change` did something to its archives: one line, and nothing is there afterwards."""
    layout, archives = miniature(name, tmp_path / "downloads")
    changed = change(archives)
    archives = changed if isinstance(changed, list) else archives
    before = tree(tmp_path)
    with pytest.raises(DatasetError, match=message) as caught:
        prepare(layout, archives, tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_layouts_agree_with_the_catalog():
    for name, info in DATASETS.items():
        sizes = LAYOUTS[name].sizes
        test = "test" if "test" in sizes else "val"
        assert LAYOUTS[name].num_classes == info.num_classes and sizes[test] == info.test_size
        assert sum(size for split, size in sizes.items() if split != test) == info.train_sizes[0]
    assert len(set(FLOWERS)) == 102


@pytest.mark.parametrize("name", official.MINIATURES)
def test_official_archives_become_a_folder(name, tmp_path):
    layout, archives = miniature(name, tmp_path / "downloads")
    data = tmp_path / "data"
    assert prepare(layout, archives, data) == layout.sizes
    files = [path for path, is_file in tree(data).items() if is_file]
    per_image = 1 if layout.num_classes else 2
    assert official.MINIATURES[name].example in files and len(files) == per_image * sum(layout.sizes.values())
    assert sorted(os.listdir(tmp_path)) == ["data", "downloads"]


def test_label_maps_are_kept_to_the_byte(tmp_path):
    layout, archives = miniature("voc", tmp_path / "downloads")
    prepare(layout, archives, tmp_path / "data")
    assert (tmp_path / "data/annotations/train/2007_000032.png").read_bytes() == official.label_map()


@pytest.mark.parametrize("name", [name for name, made in official.MINIATURES.items() if made.num_classes])
def test_training_reads_the_prepared_folder(name, tmp_path, dataset_config):
    layout, archives = miniature(name, tmp_path / "downloads")
    prepare(layout, archives, tmp_path / "data")
    config = dataset_config(name="folder", directory=str(tmp_path / "data"), validation_fraction=0.0)
    assert len(load_source(config, "train")) == layout.sizes["train"]
    test = load_source(config, "test")
    assert len(test) == 2 and len(test.class_names) == 2 and test.read(1).image.size == (12, 9)


def test_validation_images_join_the_training_images(tmp_path):
    layout, archives = miniature("aircraft", tmp_path / "downloads")
    assert prepare(layout, archives, tmp_path / "data", join_validation=True) == {"train": 4, "test": 2}
    assert (tmp_path / "data/train/F-A-18/0000004.jpg").exists() and not (tmp_path / "data/val").exists()


def test_sets_without_validation_images_have_none_to_join(tmp_path):
    layout, archives = miniature("cub", tmp_path / "downloads")
    with pytest.raises(DatasetError, match="no validation split"):
        prepare(layout, archives, tmp_path / "data", join_validation=True)


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def truncated(archives):
    cut(archives[0], 0.4)


def another_file(archives):
    archives[0].write_bytes(b"<!DOCTYPE html>")


def without_a_list(archives):
    """Removes the list of a split, or where folders are the splits, one of these."""
    for path in archives:
        files = official.contents(path)
        lists = [name for name in files if re.search(A_LIST, name)]
        if lists == [path.name]:
            return [other for other in archives if other != path]
        if lists:
            official.rewrite(path, {name: content for name, content in files.items() if name not in lists})
            return archives
    raise AssertionError("the miniature has no list of a split")


def evil_path(archives):
    official.rewrite(archives[0], official.contents(archives[0]) | {"../evil.jpg": b"evil"})


def bomb(archives):
    """A file of zeros that belongs to the dataset: compressed, or of a plain tar as a hole."""
    files, content = official.contents(archives[0]), bytes(2**24)
    name = next(name for name in files if name.lower().endswith((".jpg", ".jpeg", ".png", ".tar")))
    if archives[0].suffix != ".tar":
        official.rewrite(archives[0], files | {name: content})
    else:
        inner = name.removesuffix(".tar")
        official.holed(archives[0], name if name == inner else f"{inner}/{inner}_1.JPEG", len(content))


A_LIST = (
    r"train_test_split.txt|cars_train_annos.mat|cars_annos.mat|train_list.mat|trainval.txt|setid.mat|TrainImages.txt|"
    r"plits/train.txt|variant_train.txt|ground_truth.txt|/training/|/train/|Segmentation/train.txt"
)
DAMAGE = {
    truncated: "damaged or truncated|are not in the archives|is missing|hold",
    another_file: "not a tar, tar.gz or zip archive; download it again",
    without_a_list: "is missing from the archives; needed are|hold 0 train images",
    evil_path: "the path '../evil.jpg' leads out of the archive; this is not an official archive",
    bomb: "unpacks to more than 1 MiB",
}


@pytest.mark.parametrize("name", official.MINIATURES)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_every_damage_of_every_set_is_one_line(name, damage, tmp_path, monkeypatch):
    monkeypatch.setattr(archives_module, "MAX_GROWTH_BYTES", 2**20)
    refused(name, tmp_path, DAMAGE[damage], damage)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.55])
@pytest.mark.parametrize("name", ["cub", "dogs", "action"])  # tar.gz, tar, zip
def test_truncated_archive(name, share, tmp_path):
    message = "damaged or truncated|not a tar, tar.gz or zip|are not in the archives|is missing"
    refused(name, tmp_path, message, lambda archives: cut(archives[0], share))


def test_damaged_archive_fails_its_checksum(tmp_path):
    def damage(archives):
        content = gzip.decompress(archives[0].read_bytes()) + bytes(2**18)  # after the end that tarfile looks for
        content = bytearray(gzip.compress(content))
        content[-6] ^= 1  # of the checksum at the end of the gzip stream
        archives[0].write_bytes(content)

    refused("cub", tmp_path, r"CUB_200_2011.tgz: damaged or truncated \('CRC check failed", damage)


@pytest.mark.parametrize("name", ["cub", "dogs", "action", "flowers"])
def test_random_damage_is_one_line_or_harmless(name, tmp_path):
    layout, archives = miniature(name, tmp_path / "downloads")
    rng, whole = np.random.default_rng(0), [archive.read_bytes() for archive in archives]
    outcomes = []
    for trial in range(40):
        damaged = archives[trial % len(archives)]
        content = bytearray(whole[trial % len(archives)])
        for place in rng.integers(0, len(content), 1 + trial % 5):
            content[place] = rng.integers(256)
        damaged.write_bytes(content)
        try:
            prepare(layout, archives, tmp_path / f"data{trial}")
            outcomes.append("harmless")
        except DatasetError as error:
            assert "\n" not in str(error) and not (tmp_path / f"data{trial}").exists()
            outcomes.append("refused")
        damaged.write_bytes(whole[trial % len(archives)])
    assert "refused" in outcomes and not list(tmp_path.glob("*.partial"))


def test_archive_of_another_dataset(tmp_path):
    other = official.dogs(tmp_path)
    refused("cub", tmp_path, "nothing in it belongs to CUB-200-2011; needed are CUB_200_2011.tgz", lambda _: other)
    for file in other:
        file.unlink()


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("cars", "cars_test_annos_withlabels.mat"),
        ("dogs", "train_list.mat"),
        ("pets", "trainval.txt"),
        ("flowers", "setid.mat"),
        ("mit67", "TestImages.txt"),
        ("action", "train.txt"),
        ("imagenet", "meta.mat"),
    ],
)
def test_archive_with_the_lists_was_not_given(name, missing, tmp_path):
    lists = {
        "dogs": "lists",
        "pets": "annotations",
        "action": "Stanford40_ImageSplits",
        "imagenet": "ILSVRC2012_devkit",
    }
    start = lists.get(name, missing)
    refused(
        name,
        tmp_path,
        f"{missing} is missing from the archives; needed are ",
        lambda archives: [path for path in archives if not path.name.startswith(start)],
    )


def test_archive_with_the_images_was_not_given(tmp_path):
    refused("pets", tmp_path, "4 of 4 files of Oxford-IIIT Pet are not in the archives", lambda archives: archives[1:])


def rewrite(change):
    def write(archives):
        files = official.cub_files()
        change(files)
        official.tar(archives[0], files, "w:gz")

    return write


def test_fewer_images_than_published(tmp_path):
    split = "CUB_200_2011/train_test_split.txt"
    message = "hold 1 test images of 1 classes, but CUB-200-2011 has 2 of 2"
    refused("cub", tmp_path, message, rewrite(lambda files: files.update({split: b"1 1\n2 0\n3 1\n"})))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("images.txt", b"1\n", "lists of CUB-200-2011 are not as expected"),
        ("images.txt", b"\x00\xff" * 1000, "lists of CUB-200-2011 are not as expected"),
        ("images.txt", b"1 ../../../etc/passwd\n2 a/b\n3 a/c\n4 a/d\n", "not as expected .*class name '..'"),
        ("images.txt", b"1 /etc/passwd\n2 a/b\n3 a/c\n4 a/d\n", "not as expected .*class name ''"),
        ("images.txt", b"1 a\x1b[2J/b.jpg\n2 a/b\n3 a/c\n4 a/d\n", r"class name 'a\\x1b\[2J'"),
        ("train_test_split.txt", b"1 1\n1 1\n3 1\n4 0\n", "name an image twice"),
        ("images/001.Black_footed_Albatross/Black_footed_Albatross_0001_1.jpg", b"", "is empty"),
    ],
)
def test_damaged_lists(name, content, message, tmp_path):
    refused("cub", tmp_path, message, rewrite(lambda files: files.update({f"CUB_200_2011/{name}": content})))


@pytest.mark.parametrize(
    "path", ["../evil.jpg", "/tmp/evil.jpg", "CUB_200_2011/images/../../../evil.jpg", "..\\evil.jpg"]
)
@pytest.mark.parametrize("form", ["tar", "zip"])
def test_path_that_leads_out(path, form, tmp_path):
    def write(archives):
        files = official.cub_files() | {path: b"evil"}
        if form == "tar":
            official.tar(archives[0], files, "w:gz")
        else:
            official.zipped(archives[0], files)

    refused("cub", tmp_path, "leads out of the archive; this is not an official archive", write)


def with_link(kind, name, target):
    def write(archives):
        official.tar(archives[0], official.cub_files())
        with tarfile.open(archives[0], "a") as archive:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)

    return write


@pytest.mark.parametrize(
    ("kind", "target"),
    [(tarfile.SYMTYPE, "/etc/passwd"), (tarfile.SYMTYPE, "../../../../x"), (tarfile.LNKTYPE, "../x")],
)
def test_link_that_leads_out(kind, target, tmp_path):
    name = "CUB_200_2011/images/001.Black_footed_Albatross/link.jpg"
    refused("cub", tmp_path, f"the link '{name}' leads out of the archive", with_link(kind, name, target))


def test_links_within_an_archive_are_not_made(tmp_path):
    layout, archives = miniature("cub", tmp_path / "downloads")
    with_link(tarfile.SYMTYPE, "CUB_200_2011/images/002.Laysan_Albatross/link.jpg", "../001.Black_footed_Albatross")(
        archives
    )
    prepare(layout, archives, tmp_path / "data")
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_bomb_of_a_gzip_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(archives_module, "MAX_GROWTH_BYTES", 2**20)
    big = {"CUB_200_2011/zeros": bytes(2**24)}
    refused("cub", tmp_path, "unpacks to more than 1 MiB", rewrite(lambda files: files.update(big)))


def test_bomb_of_a_header(tmp_path, monkeypatch):
    """A long name of zeros: tarfile reads it at once, however long it says that it is."""

    def write(archives):
        header = tarfile.TarInfo("x")
        header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**33
        with gzip.open(archives[0], "wb") as file:
            file.write(header.tobuf(tarfile.GNU_FORMAT))
            file.write(bytes(2**24))

    monkeypatch.setattr(archives_module, "MAX_GROWTH_BYTES", 2**22)
    refused("cub", tmp_path, "unpacks to more than 4 MiB", write)


def test_bomb_of_a_zip(tmp_path, monkeypatch):
    monkeypatch.setattr(archives_module, "MAX_GROWTH_BYTES", 2**20)
    bomb = {"JPEGImages/applauding_001.jpg": bytes(2**24)}
    refused(
        "action", tmp_path, "unpacks to more than 1 MiB", lambda archives: official.zipped(archives[0], bomb) and None
    )


@pytest.mark.parametrize("name", ["cub", "action"])
def test_bomb_of_many_files(name, tmp_path, monkeypatch):
    monkeypatch.setattr(archives_module, "MAX_FILES", 3)
    refused(name, tmp_path, "more than 3 files", lambda archives: None)


def test_file_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(archives_module, "MAX_FILE_BYTES", 100)
    refused("cub", tmp_path, r"'CUB_200_2011/images/.*' is larger than 0 MiB", lambda archives: None)


@pytest.mark.parametrize("damage", [lambda x: x[:200], lambda x: x[:128] + bytes(200), lambda x: b"?" * 300])
def test_damaged_matlab_file(damage, tmp_path):
    def change(archives):
        archives[2].write_bytes(damage(archives[2].read_bytes()))

    refused("flowers", tmp_path, "setid.mat|not as expected", change)


def test_bomb_of_a_matlab_file(tmp_path, monkeypatch):
    monkeypatch.setattr("vimd_jax.data.layouts.MAX_MAT_BYTES", 1000)
    bomb = official.mat(trnid=[[0] * 100_000])
    refused(
        "flowers",
        tmp_path,
        "setid.mat: not a readable .*inflates",
        lambda archives: archives[2].write_bytes(bomb),
    )


def test_folder_that_is_not_empty_stays_as_it_is(tmp_path):
    layout, archives = miniature("cub", tmp_path / "downloads")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    with pytest.raises(DatasetError, match="is not an empty folder"):
        prepare(layout, archives, tmp_path / "data")
    assert tree(tmp_path / "data") == {"mine.txt": True}


def test_empty_folder_is_filled(tmp_path):
    layout, archives = miniature("cub", tmp_path / "downloads")
    (tmp_path / "data").mkdir()
    assert prepare(layout, archives, tmp_path / "data") == layout.sizes


def test_stopped_while_reading_and_continued(tmp_path, monkeypatch):
    layout, archives = miniature("dogs", tmp_path / "downloads")
    written, opened = [], []

    def stopped_in_the_second_archive(path, content):
        if len(written) == 6:  # four images, the mark that their archive is finished, a list
            raise KeyboardInterrupt
        written.append(path.name)
        replace_file(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "replace_file", stopped_in_the_second_archive)
        with pytest.raises(KeyboardInterrupt):
            prepare(layout, archives, tmp_path / "data")
    assert not (tmp_path / "data").exists() and (tmp_path / "data.partial").exists()

    def open_archive(path):
        opened.append(path.name)
        return Archive(path)

    def write(path, content):
        written.append(path.name)
        replace_file(path, content)

    monkeypatch.setattr(prepare_module, "Archive", open_archive)
    monkeypatch.setattr(prepare_module, "replace_file", write)
    assert prepare(layout, archives, tmp_path / "data") == layout.sizes
    assert opened == ["lists.tar"] and len(set(written)) == len(written)
    assert sorted(os.listdir(tmp_path)) == ["data", "downloads"]


def test_stopped_while_arranging_and_continued(tmp_path, monkeypatch):
    layout, archives = miniature("imagenet", tmp_path / "downloads")
    moved, move = [], os.replace

    def stopped_after_two(source, target):
        if "whole" in Path(target).parts:
            if len(moved) == 2:
                raise KeyboardInterrupt
            moved.append(target)
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopped_after_two)
        with pytest.raises(KeyboardInterrupt):
            prepare(layout, archives, tmp_path / "data")
    assert len(moved) == 2 and not (tmp_path / "data").exists()
    assert prepare(layout, archives, tmp_path / "data") == layout.sizes
    assert sum(tree(tmp_path / "data").values()) == 6


def test_another_try_for_another_dataset_leaves_nothing(tmp_path):
    layout, archives = miniature("camvid", tmp_path / "downloads")
    stray = tmp_path / "data.partial" / "Pascal VOC 2012" / "staged" / "train.txt"
    stray.parent.mkdir(parents=True)
    stray.write_text("x")
    assert prepare(layout, archives, tmp_path / "data") == layout.sizes
    assert sorted(os.listdir(tmp_path)) == ["data", "downloads"]


def test_command_line_ends_with_one_line(tmp_path):
    archives = official.cub(tmp_path)
    command = [sys.executable, "-m", "vimd_jax.data.prepare", "cub", *map(str, archives), str(tmp_path / "data")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1 and not ended.stdout
    assert ended.stderr.startswith("error: the archives hold 2 train images") and ended.stderr.count("\n") == 1
