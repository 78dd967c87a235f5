"""Reading PyTorch files: exact content, one clear line for each failure, and no code ever executed."""

import argparse
import collections
import copy
import datetime
import decimal
import hashlib
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from signal import Signals

import golden
import ml_dtypes
import numpy as np
import pytest
import torch_writer
from safetensors.numpy import save_file
from torch_writer import Call, Global, View

from vimd_jax.errors import CheckpointError
from weight_convert import load_torch_checkpoint

FILES = golden.FOLDER / "checkpoints"


def digest(state_dict: dict[str, np.ndarray]) -> str:
    sha = hashlib.sha256()
    for name, array in sorted(state_dict.items()):
        sha.update(f"{name} {array.shape} {array.dtype}\n".encode() + array.tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize(
    ("file", "key", "expected"),  # digests of what torch.load of PyTorch 2.13 reads
    [
        ("vim_style.pth", None, "59dbe771954d8295c2fd3dc92f3c82bf6b77c166e2172f2fa572eadb8f149719"),
        ("vim_style.pth", "model", "59dbe771954d8295c2fd3dc92f3c82bf6b77c166e2172f2fa572eadb8f149719"),
        ("vim_style.pth", "model_ema", "aa4a9bbb2f503b43014c4d749b865675caef60fe35dbca428c0f20b9c1b9dc30"),
        ("vim_style_half_precision.pth", None, "bab1f4f4f652fa38db600cc5e0219a6c06d1c48061d25ca7d0d300b8b7147b1e"),
        ("views.pth", None, "5cc15ba3bd68cd4f8596f99a3d2e14e5cf4d7ada850b1b3bb1f57b0207091071"),
        ("srresnet_style.pth.tar", None, "fc1ee9ac8a0643fb3eaf3ae76a07635c9ed3e7a480a25fdee2eb38235f358e7b"),
    ],
)
def test_real_files_are_read_to_the_bit(file, key, expected):
    assert digest(load_torch_checkpoint(FILES / file, key=key)) == expected


def test_malicious_file_is_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="asks for posix.system.*nothing was executed"):
        load_torch_checkpoint(FILES / "malicious.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        ((FILES / "not_a_checkpoint.pth").read_bytes(), "neither a PyTorch checkpoint"),
        ((FILES / "vim_style.pth").read_bytes()[:591269], "truncated or damaged, download it again"),
        (
            (FILES / "vim_style_legacy_format_start.pth").read_bytes(),
            'legacy format .* re-save it once .*python -c "import torch',
        ),
        (pickle.dumps({"model": {}}), "neither a PyTorch checkpoint"),
        (b"\x80\x04\x95\x0f\0\0\0\0\0\0\0\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "legacy format.*weights_only=False"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS.*git lfs pull"),
        (b"\x1f\x8b\x08\0", "compressed with gzip; unpack it first"),
        (b'{"metadata": {}, "weight_map": {}}', "the index of a checkpoint in parts, join the parts"),
        (b"<!DOCTYPE html>", "a web page instead of the file"),
    ],
)
def test_other_files_get_one_clear_line(content, message, tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        load_torch_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert ("download it again" in str(error.value)) == (
        message in ("is empty", "truncated or damaged, download it again")
    )


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        load_torch_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="Is a directory"):
        load_torch_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [*torch_writer.STORAGES])
def test_every_storage_dtype(dtype, tmp_path):
    expected = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    torch_writer.save(tmp_path / "x.pth", {"x": expected})
    actual = load_torch_checkpoint(tmp_path / "x.pth")["x"]
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


def test_strided_and_shared_storages(tmp_path):
    storage = np.arange(24, dtype=np.float32)
    views = {
        "transposed": View((storage, 0, (6, 4), (1, 6))),
        "every_second": View((storage, 1, (3, 4), (8, 2))),
        "expanded": View((storage, 5, (2, 3), (0, 1))),
        "last": View((storage, 23, (), ())),
        "empty": View((storage, 0, (0, 3), (3, 1))),
    }
    torch_writer.save(tmp_path / "x.pth", views)
    actual = load_torch_checkpoint(tmp_path / "x.pth")
    np.testing.assert_array_equal(actual["transposed"], storage.reshape(4, 6).T)
    np.testing.assert_array_equal(actual["every_second"], [[1, 3, 5, 7], [9, 11, 13, 15], [17, 19, 21, 23]])
    np.testing.assert_array_equal(actual["expanded"], [[5, 6, 7]] * 2)
    assert actual["last"] == 23
    assert actual["empty"].shape == (0, 3)


def test_containers_are_flattened_and_everything_else_is_left_out(tmp_path):
    one, two = np.ones(1, np.float32), np.full(2, 2, np.float32)
    content = {
        "args": argparse.Namespace(lr=1e-3, names=["a", None, True, 2**40, -1]),
        "model": {"a": one, "steps": 7, "blocks": [{"w": two}, ("text", one)]},
    }
    torch_writer.save(tmp_path / "x.pth", content)
    actual = load_torch_checkpoint(tmp_path / "x.pth")
    assert list(actual) == ["a", "blocks.0.w", "blocks.1.1"]
    np.testing.assert_array_equal(actual["blocks.0.w"], two)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_since_2(protocol, tmp_path):
    content = {"model": {"x" * 300: [1, 2.5, None, True, "é", b"bytes", (1, 2), 10**30], 5: {}}, "epoch": 3}
    torch_writer.write_archive(tmp_path / "x.pth", {"data.pkl": pickle.dumps(content, protocol)})
    with pytest.raises(CheckpointError, match="the state dict holds no tensors"):  # understood to the end
        load_torch_checkpoint(tmp_path / "x.pth")


def test_numpy_scalars_and_devices_are_accepted(tmp_path):
    scalar = Call(
        (Global("numpy.core.multiarray scalar"), (Call((Global("numpy dtype"), ("f8", False, True))), "bytes"))
    )
    device = Call((Global("torch device"), ("cpu",)))
    torch_writer.save(tmp_path / "x.pth", {"best": scalar, "device": device, "model": {"x": np.ones(3, np.float32)}})
    assert load_torch_checkpoint(tmp_path / "x.pth")["x"].sum() == 3


@pytest.mark.parametrize("protocol", [2, 3])
def test_plain_containers_of_other_kinds_are_accepted(protocol, tmp_path):
    settings = {"a": {1, 2}, "b": frozenset("x"), "c": 2j, "d": collections.Counter("abba")}
    settings["e"] = collections.defaultdict(list, {"losses": [1.0]})
    torch_writer.write_archive(tmp_path / "x.pth", {"data.pkl": pickle.dumps({"model": settings}, protocol)})
    with pytest.raises(CheckpointError, match="the state dict holds no tensors"):  # understood to the end
        load_torch_checkpoint(tmp_path / "x.pth")


def test_key_chooses_the_state_dict(tmp_path):
    torch_writer.save(tmp_path / "x.pth", {"weights": {"x": np.ones(3, np.float32)}, "epoch": 3})
    assert list(load_torch_checkpoint(tmp_path / "x.pth", key="weights")) == ["x"]
    assert list(load_torch_checkpoint(tmp_path / "x.pth")) == ["x"]  # the only one
    two = {"weights": {"x": np.ones(3, np.float32)}, "average": {"x": np.ones(3, np.float32)}}
    torch_writer.save(tmp_path / "x.pth", two)
    with pytest.raises(CheckpointError, match="no state dict named model or state_dict.*weights, average"):
        load_torch_checkpoint(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no state dict named 'ema'.*weights, average"):
        load_torch_checkpoint(tmp_path / "x.pth", key="ema")


def test_only_what_is_asked_for_is_read(tmp_path):
    big = np.zeros(5_000_000, np.float32)
    torch_writer.save(tmp_path / "x.pth", {"model": {"x": np.ones(3, np.float32)}, "optimizer": {"state": {0: big}}})
    tracemalloc.start()
    load_torch_checkpoint(tmp_path / "x.pth")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000 < big.nbytes


def test_the_content_tells_the_format_not_the_name(tmp_path):
    expected = {"a": np.arange(6, dtype=np.float32)}
    save_file(expected, tmp_path / "x.pth")
    torch_writer.save(tmp_path / "x.safetensors", expected)
    assert digest(load_torch_checkpoint(tmp_path / "x.pth")) == digest(expected)
    assert digest(load_torch_checkpoint(tmp_path / "x.safetensors")) == digest(expected)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F6_E2M3", "F4"])
def test_safetensors_in_small_floats_are_named(dtype, tmp_path):
    header = b'{"a": {"dtype": "%b", "shape": [4], "data_offsets": [0, 4]}}' % dtype.encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"8888")
    with pytest.raises(
        CheckpointError, match=f"holds {dtype} numbers, of 8 bits or fewer, which are not read; save fl"
    ):
        load_torch_checkpoint(tmp_path / "x.safetensors")


def test_safetensors(tmp_path):
    expected = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((), np.int64)}
    save_file(expected, tmp_path / "x.safetensors")
    assert digest(load_torch_checkpoint(tmp_path / "x.safetensors")) == digest(expected)
    with pytest.raises(CheckpointError, match="one set of tensors"):
        load_torch_checkpoint(tmp_path / "x.safetensors", key="model")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_torch_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "\u202e", "x" * 501])
def test_names_that_act_on_a_terminal_are_refused(name, tmp_path):
    save_file({name: np.ones(3)}, tmp_path / "x.safetensors")
    torch_writer.save(tmp_path / "x.pth", {name: np.ones(3)})
    for file in ("x.safetensors", "x.pth"):
        with pytest.raises(CheckpointError) as error:
            load_torch_checkpoint(tmp_path / file)
        assert str(error.value).isprintable() and len(str(error.value)) < 500


STORAGE = np.zeros(8, np.float32)
TENSOR = Global("torch._utils _rebuild_tensor_v2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (View((STORAGE, 5, (4,), (1,))), "reaches beyond"),
        (View((STORAGE, 0, (5,), (2**62,))), "reaches beyond"),  # 4 · 2⁶² · 4 bytes is 0 in 64 bits
        (View((STORAGE, -1, (2,), (1,))), "not natural numbers"),
        (View((STORAGE, 0, (2,), (-1,))), "not natural numbers"),
        (View((STORAGE, 0, (2.0,), (1,))), "not natural numbers"),
        (View((STORAGE, 0, (2, 2), (1,))), "truncated or damaged"),
        (View((STORAGE, 0, (2**40,), (0,))), "larger than a file of this size can hold"),
        (View((STORAGE, 0, (1,) * 80, (1,) * 80)), "more than 64 dimensions"),
        (
            Call((TENSOR, (STORAGE, 0, (1,), (1,), False, {}, {"conj": True}))),
            "asks for torch._utils._rebuild_tensor_v2 with a conjugated or negated view",
        ),
        (Call((TENSOR, ("no storage", 0, (1,), (1,)))), "_rebuild_tensor_v2 and is not read"),
        (Call((Global("torch FloatStorage"), ())), "not a constructor"),
        (Call((Global("builtins eval"), ("1",))), "asks for builtins.eval"),
        (Call((Global("torch.serialization load"), ("x",))), "x, which asks for torch.serialization.load and is not"),
        (Global("os.path.__class__ x"), "asks for os.path.__class__.x.*nothing was executed"),
        (Global("evil\x1b[2J x"), r"asks for evil\\x1b\[2J.x"),
    ],
)
def test_hostile_tensors_and_names(content, message, tmp_path):
    torch_writer.save(tmp_path / "x.pth", {"model": {"x": content}})
    with pytest.raises(CheckpointError, match=message):
        load_torch_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02}r\xff\xff\xff\xffX\x01\x00\x00\x00ah\x00s.", "truncated or damaged"),  # memo index 2³² - 1
        (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.", "truncated or damaged"),  # string of 2⁶² bytes
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "truncated or damaged"),  # bytearray of 2⁴⁰ bytes
        (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "no state dict named"),  # a dict that holds itself
        (b"\x80\x02}X\x05\x00\x00\x00model}q\x00X\x01\x00\x00\x00ah\x00ss.", "200000 items, 16 levels or names beyond"),
        (
            b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
            "no state dict named model or",
        ),  # key nested 200,000 deep
        (
            b"\x80\x02cargparse\nNamespace\n}X\x03\x00\x00\x00runK\x01sb.",
            "object of type argparse.Namespace instead of a state dict",
        ),
        (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "truncated or damaged"),
        (b"\x80\x02(K\x01K\x02o.", "pickle instruction OBJ"),
        (b"\x80\x02\x82\x01.", "pickle instruction EXT1"),
        (b"\x80\x02K\x01K\x01a.", "not a list"),
        (b"\x80\x02}", "truncated or damaged"),
        (b"\x80\x02" + b"]" * (8 * 2**20), "more than the 8388608"),
        (b"\x80\x02\x8a\x90" + b"\x7f" * 144 + b".", "more than 1024 bits"),
        (b"\x80\x02ctorch\nSize\n(" + b"N" * 17 + b"tR.", "not a constructor"),
    ],
)
def test_hostile_pickles(pickled, message, tmp_path):
    torch_writer.write_archive(tmp_path / "x.pth", {"data.pkl": pickled})
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message):
        load_torch_checkpoint(tmp_path / "x.pth")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def test_containers_that_multiply(tmp_path):
    """Twenty lists, each holding the one before ten times: small in the file, 10²⁰ items when written out."""
    lists = b"]q\x00" + b"".join(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(20))
    pickled = b"\x80\x02" + lists + b"}X\x01\x00\x00\x00ah\x14s."
    model = pickled.replace(b"}", b"}X\x05\x00\x00\x00model}").replace(b"s.", b"ss.")
    torch_writer.write_archive(tmp_path / "x.pth", {"data.pkl": model})
    with pytest.raises(CheckpointError, match="more than 200000 items"):
        load_torch_checkpoint(tmp_path / "x.pth")


def test_hostile_archives(tmp_path):
    torch_writer.save(tmp_path / "good.pth", {"x": np.zeros(100_000, np.float32)})
    with zipfile.ZipFile(tmp_path / "good.pth") as archive:
        entries = {entry.filename.removeprefix("archive/"): archive.read(entry) for entry in archive.infolist()}
    path = tmp_path / "bad.pth"

    torch_writer.write_archive(path, entries, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        load_torch_checkpoint(path)
    torch_writer.write_archive(path, entries | {"byteorder": b"big"})
    with pytest.raises(CheckpointError, match="big-endian"):
        load_torch_checkpoint(path)
    torch_writer.write_archive(path, entries | {"data/0": b"1234"})
    with pytest.raises(CheckpointError, match="storage of x has 4 bytes, not 100000 × float32"):
        load_torch_checkpoint(path)
    torch_writer.write_archive(path, {name: data for name, data in entries.items() if name != "data/0"})
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_torch_checkpoint(path)
    torch_writer.write_archive(path, entries | {"more/data.pkl": b"."})
    with pytest.raises(CheckpointError, match="one data.pkl"):
        load_torch_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:  # many names for the same bytes
        archive.writestr("archive/data.pkl", entries["data.pkl"])
        archive.writestr("archive/data/0", entries["data/0"])
        for i in range(1, 10):
            alias = copy.copy(archive.filelist[-1])
            alias.filename = f"archive/data/{i}"
            archive.filelist.append(alias)
    with pytest.raises(CheckpointError, match="its entries exceed its size"):
        load_torch_checkpoint(path)


GOOD = {"x": np.ones(3, np.float32)}


def reduced(name: str, *arguments) -> Call:
    return Call((Global(name), arguments))


@pytest.mark.parametrize(
    "extra",
    [
        reduced("pathlib PosixPath", "/", "data"),
        reduced("numpy._core.multiarray _reconstruct", Global("numpy ndarray"), (0,), "b"),
        reduced("numpy.core.multiarray scalar", reduced("numpy dtype", "f8", False, True), "bytes"),
        reduced("project.config Config", {"lr": 1.0}),
        reduced("project.kinds Kind", 1),
        reduced("torch device", "cpu"),
        reduced("torch._utils _rebuild_qtensor", ("storage", 0, (3,), (1,))),
        Global("project.networks Network"),
        {(1, 2): "a tuple as key", 2**70: "a large key", reduced("project.kinds Kind", 1): "an enum as key"},
    ],
    ids=str,
)
def test_other_entries_than_the_state_dict_are_not_read(extra, tmp_path):
    torch_writer.save(tmp_path / "x.pth", {"extra": extra, "model": GOOD, "more": [extra]})
    assert load_torch_checkpoint(tmp_path / "x.pth")["x"].sum() == 3


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_objects_of_every_protocol_are_not_asked_for(protocol, tmp_path):
    plain = [
        {1},
        frozenset("a"),
        2j,
        bytearray(b"a"),
        Path("a"),
        collections.Counter("a"),
        range(3),
        argparse.Namespace(),
    ]
    plain += [
        datetime.date(2024, 1, 1),
        decimal.Decimal("1.5"),
        np.arange(3),
        np.float64(1),
        Signals.SIGINT,
        {(1, 2): 3},
    ]
    pickled = pickle.dumps({"args": plain, "model": {}}, protocol)
    torch_writer.write_archive(tmp_path / "x.pth", {"data.pkl": pickled})
    with pytest.raises(CheckpointError, match="the state dict holds no tensors; name another"):  # understood to the end
        load_torch_checkpoint(tmp_path / "x.pth")


def test_parameters_with_attributes(tmp_path):
    tensor = torch_writer.Attributed((GOOD["x"], {"note": "x"}))
    parameter = reduced("torch._utils _rebuild_parameter_with_state", GOOD["x"], True, {}, {"note": "x"})
    torch_writer.save(tmp_path / "x.pth", {"model": {"a": parameter, "b": tensor}})
    assert [x.sum() for x in load_torch_checkpoint(tmp_path / "x.pth").values()] == [3, 3]


def test_a_weight_that_is_no_tensor_is_refused_with_a_way_out(tmp_path):
    array = reduced("numpy._core.multiarray _reconstruct", Global("numpy ndarray"), (0,), "b")
    torch_writer.save(tmp_path / "x.pth", {"model": GOOD | {"y": array}})
    with pytest.raises(
        CheckpointError, match="holds y, which asks for numpy._core.multiarray._reconstruct.*re-save it"
    ):
        load_torch_checkpoint(tmp_path / "x.pth")


def test_a_whole_network_is_refused_with_its_name(tmp_path):
    torch_writer.save(tmp_path / "x.pth", reduced("project.networks Vim"))
    with pytest.raises(CheckpointError, match="an object of type project.networks.Vim instead of a state dict; save"):
        load_torch_checkpoint(tmp_path / "x.pth")
    torch_writer.save(tmp_path / "x.pth", {"model": reduced("project.networks Vim")})
    with pytest.raises(CheckpointError, match="model is an object of type project.networks.Vim"):
        load_torch_checkpoint(tmp_path / "x.pth")


def test_two_parts_are_one_state_dict(tmp_path):
    torch_writer.save(tmp_path / "x.pth", {"sr": {"a": GOOD["x"]}, "classifier": {"b": GOOD["x"]}, "epoch": 3})
    assert list(load_torch_checkpoint(tmp_path / "x.pth")) == ["sr.a", "classifier.b"]


def test_tensors_together_are_no_larger_than_a_file_can_hold(tmp_path):
    """Each view alone is valid: it repeats one number a hundred thousand times, and there are a hundred of them."""
    storage = np.zeros(1, np.float32)
    torch_writer.save(tmp_path / "x.pth", {str(i): View((storage, 0, (100_000,), (0,))) for i in range(100)})
    with pytest.raises(CheckpointError, match="larger than a file of this size can hold"):
        load_torch_checkpoint(tmp_path / "x.pth")
