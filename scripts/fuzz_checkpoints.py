"""Reads damaged and hostile checkpoints in a monitored process: each must be read, or refused by the reader's own error
in one line, in less than 2 s of processor time and with less than 200 MB beyond the file's size.

    python scripts/fuzz_checkpoints.py [--files 10000] [--seed 0]     (Linux only: it reads a process's peak memory)
"""

import argparse
import collections
import functools
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch_writer  # noqa: E402
from torch_writer import View  # noqa: E402

MOST_SECONDS, MOST_MB = 2.0, 200.0
PATIENCE = 30.0  # seconds until an unresponsive process is killed


def small_files(folder: Path) -> dict[str, bytes]:
    """Small intact files, by suffix, to be mutated."""
    storage = np.arange(24, dtype=np.float32)
    tensors = {"a": np.ones((2, 3), np.float16), "b": View((storage, 2, (3, 4), (4, 1))), "n": np.array(7)}
    state = {"state": {0: {"step": 3, "m": storage}}, "groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]}
    content = {"model": tensors, "optimizer": state, "args": argparse.Namespace(name="x", size=224)}
    torch_writer.save(folder / "small.pth", content)
    plain = {"a": np.ones((2, 3), np.float32), "b": np.arange(5), "n": np.array(7)}
    return {"pth": (folder / "small.pth").read_bytes(), "safetensors": save(plain, {"format": "pt"})}


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Changes a few bytes (randomly, by one bit, to an extreme), often near the ends; may cut or repeat a part."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        near_end = len(data) - 1 - chance.randrange(min(len(data), 1500))
        place = chance.choice([chance.randrange(len(data)), chance.randrange(min(len(data), 6000)), near_end])
        data[place] = chance.choice([chance.randrange(256), data[place] ^ (1 << chance.randrange(8)), 0, 255])
    start = chance.randrange(len(data))
    piece = slice(start, start + chance.randrange(1, 64))
    match chance.randrange(20):
        case 0:
            del data[start:]
        case 1:
            del data[piece]
        case 2:
            data[start:start] = data[piece]
    return bytes(data)


def mutations(folder: Path, count: int, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yields `count` mutated files of each kind; half of the .pth in the pickle alone, with valid checksums."""
    files = small_files(folder)
    with zipfile.ZipFile(io.BytesIO(files["pth"])) as archive:
        entries = {entry.filename.removeprefix("archive/"): archive.read(entry) for entry in archive.infolist()}
    for i in range(count):
        if i % 2:
            yield f"mutated {i} .pth", mutated(files["pth"], chance)
        else:
            yield f"mutated {i} .pth pickle", pth(mutated(entries["data.pkl"], chance), entries)
        yield f"mutated {i} .safetensors", mutated(files["safetensors"], chance)


def pth(pickled: bytes, entries: dict[str, bytes] | None = None) -> bytes:
    """A .pth file with this pickle."""
    file = io.BytesIO()
    torch_writer.write_archive(file, (entries or {}) | {"data.pkl": pickled})
    return file.getvalue()


def safetensors(header: bytes, length: int | None = None) -> bytes:
    """A file with only a header, which claims this length."""
    return struct.pack("<Q", len(header) if length is None else length) + header


def archive(count: int, name: bytes = b"") -> bytes:
    """A zip archive with only a directory, of this many empty entries."""
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, *[0] * 7, len(name), *[0] * 6) + name
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, min(count, 65535), min(count, 65535), len(entry) * count, 0, 0)
    return entry * count + end


def text(value: str | bytes) -> bytes:
    """A pickle's instruction that pushes a string."""
    value = value.encode() if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(value)) + value


def model(pickled: bytes) -> bytes:
    """The file {"model": {"x": the pickled object}}."""
    return pth(b"\x80\x04}" + text("model") + b"}" + text("x") + pickled + b"ss.")


def tensors(count: int, shape: Sequence[int], strides: Sequence[int]) -> bytes:
    """A file of this many tensors, which share one storage of 1,000 numbers."""
    file, storage = io.BytesIO(), np.zeros(1000, np.float32)
    torch_writer.save(file, {str(i): View((storage, 0, shape, strides)) for i in range(count)})
    return file.getvalue()


_COLLIDING = b"".join(b"\x8a\x0b" + ((2**61 - 1) * i).to_bytes(11, "little") + b"N" for i in range(1, 50_000))
_MULTIPLYING = b"]q\x00" + b"".join(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(20))
_NAME = "long" * 200_000
_TENSOR = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}

HOSTILE: dict[str, Callable[[], bytes]] = {
    "keys that all have one hash": lambda: model(b"}(" + _COLLIDING + b"u"),
    "a list of 8 million dicts": lambda: model(b"](" + b"}" * 8_000_000 + b"e"),
    "a long key over a large list": lambda: model(b"}" + text("π" * 200_000) + b"](" + b"N" * 190_000 + b"es"),
    "the longest key over the largest list": lambda: model(b"}" + text("𝔁" * 480) + b"](" + b"N" * 199_000 + b"es"),
    "equal long keys, set again and again": lambda: model(
        text(_NAME) + b"q\0" + text(_NAME) + b"q\1}(" + b"h\0Nh\1N" * 70_000 + b"u"
    ),
    "long names, asked for again and again": lambda: model(text(_NAME) + b"q\0](" + b"h\0h\0\x93" * 90_000 + b"e"),
    "names that are not data": lambda: model(b"](" + b"ca\nb\n" * 290_000 + b"e"),
    "8 million memo entries": lambda: model(b"N" + b"\x94" * 8_000_000),
    "far memo entries": lambda: model(b"N" + b"".join(b"r" + struct.pack("<I", i * 7919) for i in range(290_000))),
    "8 million nested tuples": lambda: model(b")" + b"\x85" * 8_000_000),
    "290,000 nested tuples": lambda: model(b")" + b"\x85" * 290_000),
    "a key of 290,000 nested tuples": lambda: model(b"})" + b"\x85" * 290_000 + b"Ns"),
    "140,000 nested lists": lambda: model(b"]" * 140_000 + b"a" * 139_999),
    "lists that multiply": lambda: model(_MULTIPLYING),
    "a dict in itself": lambda: model(b"}q\0" + text("y") + b"h\0s"),
    "an integer of 8 million bytes": lambda: model(b"\x8b" + struct.pack("<i", 8_000_000) + b"\x7f" * 8_000_000),
    "an integer of a million digits": lambda: model(b"L" + b"9" * 1_000_000 + b"L\n"),
    "a string of 2^62 bytes": lambda: model(b"\x8d" + struct.pack("<Q", 2**62)),
    "calls with many arguments": lambda: model(
        b"(" + b"N" * 100_000 + b"tq\0](" + b"ctorch\nSize\nh\0R" * 60_000 + b"e"
    ),
    "a rebuilding of itself": lambda: model(b"ctorch._tensor\n_rebuild_from_type_v2\nq\0](h\0Neq\1h\0h\1N\x87R"),
    "20,000 tensors that repeat one number": lambda: tensors(20_000, (500, 500), (0, 0)),
    "a tensor of 2^60 numbers": lambda: tensors(1, (2**30, 2**30), (0, 0)),
    "tensors of huge strides": lambda: tensors(5_000, (2,) * 64, (2**62,) * 64),
    "tensors of many axes": lambda: tensors(1, (1,) * 10_000, (1,) * 10_000),
    "names with escape codes": lambda: pth(b"\x80\x04}" + text("\x1b[2J\n") + b"Ns."),
    "a million entries": lambda: archive(1_000_000),
    "40,000 entries": lambda: archive(40_000),
    "40,000 entries of one name": lambda: archive(35_000, b"a/data.pkl"),
    "a directory of 4 GB": lambda: b"PK" + archive(0)[:12] + struct.pack("<2IH", 2**32 - 16, 0, 0),
    "a million empty tensors": lambda: safetensors(_empty_tensors(1_000_000)),
    "30,000 empty tensors": lambda: safetensors(_empty_tensors(30_000)),
    "a header of 2^63 bytes": lambda: safetensors(b"{" + b" " * 100, 2**63),
    "a header of nested lists": lambda: safetensors(b'{"a":' + b"[" * 2_000_000),
    "a tensor of 0 times 2^62": lambda: safetensors(json.dumps({"a": _TENSOR | {"shape": [0, 2**62]}}).encode()),
    "a header with escape codes": lambda: safetensors(json.dumps({"\x1b[2J\n": _TENSOR}).encode()),
    "compressed zeros": lambda: _compressed(200),
}  # fmt: skip


def _empty_tensors(count: int) -> bytes:
    tensor = json.dumps(_TENSOR).encode()
    return b"{" + b",".join(b'"%d":%b' % (i, tensor) for i in range(count)) + b"}"


def _compressed(megabytes: int) -> bytes:
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
        bomb.open("a/data.pkl", "w") as entry,
    ):
        for _ in range(megabytes):
            entry.write(bytes(1_000_000))
    return file.getvalue()


# Fields of the description of a small network that could make its reader build or trust too much.
HOSTILE_DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "nested 100,000 deep": {"provenance": "[" * 100_000 + "]" * 100_000},
    "nested 900 deep": {"provenance": {"x": functools.reduce(lambda inner, _: [inner], range(900), [])}},
    "a million lists": {"provenance": {"x": [[]] * 1_000_000}},
    "an integer of a million digits": {"provenance": "9" * 1_000_000},
    "100,000 options": {"options": {f"o{i}": 1 for i in range(100_000)}},
    "100,000 class names": {"class_names": ["x" * 20] * 100_000},
    "class names with escape codes": {"class_names": ["\x1b[2J\n"] * 3},
    "class names as a text": {"class_names": "owl"},
    "class names as a dict": {"class_names": {"owl": 0}},
    "a crop that is no number": {"view": {"low_resolution": 0, "crop": "x"}},
    "a low resolution below 0": {"view": {"low_resolution": -5, "crop": 1.0}},
    "a low resolution of a million": {"view": {"low_resolution": 10**6, "crop": 1.0}},
    "variables elsewhere": {"variables": "../../etc/passwd"},
    "variables in a pipe": {"variables": "variables-0123456789abcdef.safetensors"},
    "an architecture with escape codes": {"architecture": "\x1b[2J\n"},
}
HOSTILE_NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "images of a million pixels": ("vim_tiny", {"image_size": 10**6}),
    "2^63 channels": ("vim_tiny", {"embed_dim": 2**63}),
    "a million channels": ("vim_tiny", {"embed_dim": 10**6}),
    "a million layers": ("vim_tiny", {"depth": 10**6}),
    "a million layers of LocalVim": ("local_vim_search", {"depth": 10**6}),
    "16,000 pixels of LocalVim": ("local_vim_tiny", {"image_size": 16_000}),
    "the most patches of LocalVim": ("local_vim_tiny", {"image_size": 2048, "stride": 12, "patch_size": 16}),
    "the most steps of LocalVim": ("local_vim_search", {"image_size": 2048, "depth": 24}),
    "many layers of LocalVim": ("local_vim_tiny", {"depth": 5000}),
    "many directions of LocalVim": ("local_vim_tiny", {"directions": [["h", "v", "w2", "w3"] * 32], "depth": 128}),
    "a million states": ("vim_tiny", {"state_size": 10**6}),
    "a million classes": ("vim_tiny", {"num_classes": 10**6}),
    "the largest images of LocalVMamba": ("local_vmamba_tiny", {"image_size": 2048}),
    "the largest images of V2M": ("v2m_tiny", {"image_size": 2048}),
    "the largest images of EfficientVMamba": ("efficient_vmamba_tiny", {"image_size": 2048}),
    "eight stages": ("vmamba_tiny", {"depths": [1] * 8, "image_size": 2048}),
    "100 stages": ("vmamba_tiny", {"depths": [1] * 100}),
    "a million blocks": ("srresnet_x4", {"num_blocks": 10**6}),
    "many hidden channels": ("efficient_vmamba_tiny", {"mlp_ratio": 1e300}),
    "a student of a million layers": ("srvm_tiny", {"depth": 10**6}),
}  # fmt: skip


def hostile_folders(folder: Path) -> Iterator[str]:
    """Writes one hostile folder after the other, each with a valid checksum, and yields its name."""
    from vimd_jax.checkpoints.description import digest

    whole, text = small_network(folder / "whole"), "description_checksum"
    os.mkfifo(folder / "whole" / "variables-0123456789abcdef.safetensors")
    networks = {what: {"architecture": name, "options": options} for what, (name, options) in HOSTILE_NETWORKS.items()}
    for what, fields in (HOSTILE_DESCRIPTIONS | networks).items():
        content = whole | fields
        if isinstance(fields.get("provenance"), str):  # text that json.dumps would not write
            written = json.dumps(content | {text: ""}).replace(json.dumps(fields["provenance"]), fields["provenance"])
        else:
            written = json.dumps(content | {text: digest(content)})
        (folder / "whole" / "network.json").write_text(written)
        yield what
    (folder / "whole" / "network.json").unlink()
    os.mkfifo(folder / "whole" / "network.json")
    yield "a pipe for a description"


def small_network(folder: Path) -> dict[str, Any]:
    """Writes a complete network and returns its description, without the description's checksum."""
    import jax

    from vimd_jax.checkpoints.format import read_description, save_model
    from vimd_jax.checkpoints.trained_model import TrainedModel
    from vimd_jax.models import create_model
    from vimd_jax.models.network import input_images

    model = create_model("vim_tiny", embed_dim=16, depth=1, image_size=32, num_classes=3)
    variables = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(model.init, jax.random.key(0), input_images(model))
    )
    save_model(folder, TrainedModel(model, variables, ("a", "b", "c")))
    return read_description(folder)


def serve(connection: Connection) -> None:
    """Reads the files named on a pipe; answers with each one's outcome, seconds, and peak memory in MB."""
    from vimd_jax import load_model
    from vimd_jax.errors import CheckpointError, printable
    from weight_convert import load_torch_checkpoint

    with tempfile.TemporaryDirectory() as folder:  # imports and compiles first, so that no file is charged for it
        small_network(Path(folder) / "x")
        load_model(Path(folder) / "x")
    for path in iter(connection.recv, None):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before, start = _megabytes("VmRSS"), time.process_time()
        try:
            if Path(path).is_dir():
                load_model(path)
            else:
                for array in load_torch_checkpoint(path).values():
                    array.tobytes()
            outcome = "read"
        except CheckpointError as error:
            message = str(error)
            outcome = "refused" if printable(message, 3000) == message else f"message {message[:300]!r}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        connection.send((outcome, time.process_time() - start, _megabytes("VmHWM") - before))


def _megabytes(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


class Watched:
    """A process that reads files, and is restarted after a file has ended it."""

    def __init__(self):
        self._process = None

    def read(self, path: Path) -> tuple[str, float, float]:
        """Returns a file's outcome, seconds, and peak memory in MB."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, there = context.Pipe()
            self._process = context.Process(target=serve, args=(there,), daemon=True)
            self._process.start()
            there.close()
        self._connection.send(str(path))
        try:
            if self._connection.poll(PATIENCE):
                return self._connection.recv()
            outcome = "no answer"
        except EOFError:
            outcome = "the process ended"
        self.stop()
        return outcome, PATIENCE, 0.0

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self._process = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the number of files that were neither read nor refused as required."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--files", type=int, default=10_000, help="mutated files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    watched, outcomes, bad, slowest, largest = Watched(), collections.Counter(), 0, (0.0, ""), (0.0, "")

    def watch(name: str, path: Path, size: int) -> None:
        nonlocal bad, slowest, largest
        outcome, seconds, megabytes = watched.read(path)
        beyond = megabytes - size / 2**20
        outcomes[outcome] += 1
        slowest, largest = max(slowest, (seconds, name)), max(largest, (beyond, name))
        if outcome not in ("read", "refused") or seconds > MOST_SECONDS or beyond > MOST_MB:
            bad += 1
            print(f"{name}: {outcome}, {seconds:.2f} s, {beyond:.0f} MB beyond its {size} bytes")
            if path.is_file():
                shutil.copy(path, Path(tempfile.gettempdir()) / f"fuzz_checkpoints_{bad}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        handcrafted = ((name, make()) for name, make in HOSTILE.items())
        for files in (handcrafted, mutations(Path(folder), flags.files, random.Random(flags.seed))):
            for name, data in files:
                path.write_bytes(data)
                watch(name, path, len(data))
        for name in hostile_folders(Path(folder)):
            watch(name, Path(folder) / "whole", 0)
    watched.stop()
    print(f"{dict(outcomes)}; slowest {slowest[0]:.2f} s ({slowest[1]}), most {largest[0]:.0f} MB ({largest[1]})")
    return bad


if __name__ == "__main__":
    sys.exit(bool(main()))
