"""Reads PyTorch checkpoints without PyTorch and without running anything that the file asks for.

A `.pth` file is an uncompressed zip archive: `data.pkl`, a pickle that describes the objects, and an entry for every
storage, the raw numbers behind the tensors. The pickle is read as data (`safe_pickle`), with the names in the tables
below; a storage is read when a requested tensor needs it. For any file, time is bounded, and memory is bounded by a
small multiple of its size.
"""

import io
import logging
import math
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from vimd_jax.errors import CheckpointError, PickleError, printable
from vimd_jax.files import open_regular
from weight_convert.safe_pickle import Constructor, Inert, construct, interpret

log = logging.getLogger(__name__)

# Far beyond any real checkpoint (Vim-base with its optimizer state: 2,000 tensors), as limits for hostile files.
_MAX_PICKLE_BYTES = 8 * 2**20
_MAX_DIRECTORY_BYTES = 2 * 2**20  # of a zip archive
_MAX_HEADER_BYTES = 2 * 2**20  # of a .safetensors file
_MAX_ITEMS = 200_000
_MAX_DEPTH = 16
_MAX_TENSORS = 20_000
_MAX_NAME_LENGTH = 500
_MAX_RANK = 64
_MAX_VIEWS = 4  # size of all tensors together over that of the file, since several can share a storage

_LEGACY = (
    b"l\xfc\x9cF\xf9 j\xa8P\x19.",
    b"119547037146038801333356L",
)  # the magic number at the beginning, before version 1.6
_RESAVE = (
    'if you trust its source, re-save it once where PyTorch is installed: python -c "import torch; '
    "x = torch.load('OLD.pth', map_location='cpu', weights_only=False); x = x.get('model', x.get('state_dict', x)); "
    "torch.save({k: torch.as_tensor(v) for k, v in x.items() if torch.is_tensor(v) or getattr(v, 'ndim', 0)}, "
    "'NEW.pth')\""
)
_OTHERS = {  # other contents that occur under the name of a checkpoint, by their first bytes
    b"version https://git-lfs": "a pointer of Git LFS instead of the file; fetch the file with: git lfs pull",
    b"\x1f\x8b": "compressed with gzip; unpack it first: gunzip",
    b"{": "a JSON file; if it is the index of a checkpoint in parts, join the parts into one file",
    b"<": "a web page instead of the file; download the file itself",
}
_REBUILDS = re.compile(r"_rebuild|_reconstruct$|_frombuffer$")  # functions that make tensors and NumPy arrays


def load_torch_checkpoint(path: str | Path, *, key: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of one state dict in a PyTorch file.

    Args:
      path: `.pth`, `.pt`, `.pth.tar` in PyTorch's zip format (1.6 and later), or `.safetensors`.
      key: the entry of the checkpoint to read, e.g. "model_ema". None takes "model" or "state_dict" if the file has
        one, else the file itself, its "sr" and "classifier" together, or its only state dict, under any name. A
        `.safetensors` file has no entries.

    Returns:
      Name → read-only array in the stored dtype (bfloat16 as `ml_dtypes.bfloat16`). Containers inside the state dict
      are flattened, their names joined by dots; anything but tensors is left out. Tensors that share memory still do.

    Raises:
      CheckpointError: the file is not a checkpoint, is damaged, is in the legacy format, lacks `key`, has tensors of an
        unsupported kind, or exceeds the size of any real checkpoint in some respect.
    """
    path = Path(path)
    with _errors_naming(path):
        with open_regular(path) as file:
            start = file.read(512)
        if start[8:9] == b"{":  # after the length of a JSON header
            return _load_safetensors(path, int.from_bytes(start[:8], "little"), key)
        _check_format(start)
        with _File(path) as file, zipfile.ZipFile(file) as archive:
            checkpoint = _Archive(archive, path.stat().st_size)
            file.longest_read = None
            content = interpret(checkpoint.read("data.pkl", _MAX_PICKLE_BYTES), _NAMES, _persistent)
            return {name: checkpoint.tensor(name, tensor) for name, tensor in _named_tensors(_select(content, key))}


@contextmanager
def _errors_naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, PickleError) as error:
        raise CheckpointError(f"{path}: {printable(error, 2_000)}") from error.__cause__
    except Exception as error:  # a damaged file can make any step of decoding fail in any way
        if isinstance(error, OSError) and error.filename:  # it could not be opened
            raise CheckpointError(f"{path}: {error.strerror}") from error
        reason = printable(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"{path}: truncated or damaged, download it again ({reason})") from error


def _check_format(start: bytes) -> None:
    if not start:
        raise CheckpointError("the file is empty; download it again")
    if any(number in start for number in _LEGACY) or start[257:262] == b"ustar":
        raise CheckpointError(f"PyTorch's legacy format (before 1.6); {_RESAVE}")
    for beginning, what in _OTHERS.items():
        if start.lstrip().startswith(beginning):
            raise CheckpointError(what)
    if not start.startswith(b"PK"):
        raise CheckpointError("neither a PyTorch checkpoint (no zip archive) nor .safetensors")


def _load_safetensors(path: Path, header_bytes: int, key: str | None) -> dict[str, np.ndarray]:
    if key is not None:
        raise CheckpointError(f"a .safetensors file holds one set of tensors; leave out key={key!r}")
    if header_bytes > min(_MAX_HEADER_BYTES, path.stat().st_size):
        raise CheckpointError(f"truncated or damaged, or no .safetensors (its header would have {header_bytes} bytes)")
    with path.open("rb") as file:
        small = re.search(rb'"dtype"\s*:\s*"(F[468]\w*)"', file.read(8 + header_bytes))
    if small:
        raise CheckpointError(
            f"holds {small[1].decode()} numbers, of 8 bits or fewer, which are not read; save float32"
        )
    with safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        _check_names(names)
        return {name: file.get_tensor(name) for name in names}


def _check_names(names: list[str]) -> None:
    if len(names) > _MAX_TENSORS:
        raise CheckpointError(f"holds {len(names)} tensors, more than the {_MAX_TENSORS} that any network has")
    if strange := [name for name in names if not name.isprintable() or len(name) > _MAX_NAME_LENGTH]:
        raise CheckpointError(f"a tensor has the name {printable(strange[0])}, which no network has")


class _File(io.FileIO):
    """A file that limits reads while zipfile looks for the archive's directory, whose length the file itself states."""

    longest_read: int | None = _MAX_DIRECTORY_BYTES

    def read(self, size: int = -1) -> bytes:
        if self.longest_read is not None and size > self.longest_read:
            raise CheckpointError(f"the archive's directory has {size} bytes, more than any checkpoint needs")
        return super().read(size)


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class _Tensor:
    """The layout of a tensor in its storage; offset and strides count elements."""

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Archive:
    """The zip archive of a checkpoint; returns tensors and reads each storage once."""

    def __init__(self, archive: zipfile.ZipFile, file_size: int):
        self._archive = archive
        self._file_size = file_size
        self._left = max(_MAX_VIEWS * file_size, 2**20)  # bytes that further tensors may have
        entries = archive.infolist()
        roots = [entry.filename.removesuffix("data.pkl") for entry in entries if entry.filename.endswith("data.pkl")]
        if len({entry.filename for entry in entries}) < len(entries) or len(roots) != 1:
            raise CheckpointError("not a PyTorch checkpoint (the archive needs one data.pkl, and no name twice)")
        # PyTorch never compresses, so entries that claim more bytes than the file has are an attack or damage.
        if any(e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in entries):
            raise CheckpointError("compressed entries, which torch.save never writes; save model.state_dict() with it")
        if sum(entry.file_size for entry in entries) > file_size:
            raise CheckpointError("truncated or damaged, download it again (its entries exceed its size)")
        self._root = roots[0]
        self._storages: dict[str, bytes] = {}
        if f"{self._root}byteorder" in archive.namelist() and self.read("byteorder", 16) != b"little":
            raise CheckpointError("written on a big-endian machine, which is not supported")

    def read(self, name: str, limit: int) -> bytes:
        entry = self._archive.getinfo(self._root + name)
        if entry.file_size > limit:
            raise CheckpointError(f"{name} has {entry.file_size} bytes, more than the {limit} any checkpoint needs")
        return self._archive.read(entry)

    def tensor(self, name: str, tensor: _Tensor) -> np.ndarray:
        """A read-only view of the tensor's storage."""
        storage = tensor.storage
        if storage.key not in self._storages:
            self._storages[storage.key] = self.read(f"data/{storage.key}", self._file_size)
        data = self._storages[storage.key]
        if len(data) != storage.count * storage.dtype.itemsize:
            found, expected = len(data), f"{storage.count} × {storage.dtype}"
            raise CheckpointError(f"the storage of {printable(name)} has {found} bytes, not {expected}")
        view = _view(data, tensor, self._left)
        self._left -= view.nbytes
        return view


def _view(data: bytes, tensor: _Tensor, most_bytes: int) -> np.ndarray:
    if len(tensor.shape) > _MAX_RANK:
        raise CheckpointError(f"a tensor has more than {_MAX_RANK} dimensions")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (tensor.offset, *tensor.shape, *tensor.strides)):
        raise CheckpointError("a tensor's offset, shape or strides are not natural numbers")
    size, numbers = tensor.dtype.itemsize, math.prod(tensor.shape)
    # NumPy's own check of the bounds overflows for huge strides, and strides of 0 repeat elements without bound.
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if numbers and (last + 1) * size > len(data):
        raise CheckpointError(f"a tensor of shape {tensor.shape} reaches beyond the {len(data)} bytes of its storage")
    if numbers * size > most_bytes:
        raise CheckpointError(f"a tensor of shape {tensor.shape} is larger than a file of this size can hold")
    strides = [stride * size for stride in tensor.strides]
    return np.ndarray(tensor.shape, tensor.dtype, data, tensor.offset * size, strides)


def _select(checkpoint: Any, key: str | None) -> dict:
    """The state dict in the content of a file."""

    def kind(value: Any) -> str:
        return str(value) if isinstance(value, Inert) else type(value).__name__

    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f"holds an object of type {kind(checkpoint)} instead of a state dict; save model.state_dict()"
        )
    held = ", ".join(printable(name, 40) for name in list(checkpoint)[:20])
    if key is not None:
        if not isinstance(checkpoint.get(key), dict):
            raise CheckpointError(f"has no state dict named {key!r}; it holds: {held}")
        return checkpoint[key]
    for name in ("model", "state_dict"):
        if isinstance(checkpoint.get(name), dict):
            return checkpoint[name]
    parts = {name: checkpoint.get(name) for name in ("sr", "classifier")}
    if all(isinstance(part, dict) for part in parts.values()):
        return parts
    if not _holds_tensors(checkpoint):
        state_dicts = [name for name, value in checkpoint.items() if isinstance(value, dict) and _holds_tensors(value)]
        if len(state_dicts) == 1:
            log.info("Reading %s, the only state dict of the file.", printable(state_dicts[0], 40))
            return checkpoint[state_dicts[0]]
        whole = [
            f"{name} is an object of type {kind(checkpoint[name])}; "
            for name in ("model", "state_dict")
            if name in checkpoint
        ]
        raise CheckpointError(
            f"has no state dict named model or state_dict; {''.join(whole)}name one with key (convert: --key): {held}"
        )
    return checkpoint


def _holds_tensors(container: dict) -> bool:
    return any(isinstance(value, _Tensor) for value in container.values())


def _named_tensors(state_dict: dict) -> list[tuple[str, _Tensor]]:
    """The tensors in nested containers, in order, with names joined by dots."""
    found: list[tuple[str, _Tensor]] = []
    inert: list[tuple[str, Inert]] = []
    visited = 0

    def visit(container: dict | list | tuple, prefix: str, depth: int) -> None:
        nonlocal visited
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            name, visited = f"{prefix}{key}", visited + 1
            if visited > _MAX_ITEMS or depth > _MAX_DEPTH or len(name) > _MAX_NAME_LENGTH:
                raise CheckpointError(
                    f"the state dict holds more than {_MAX_ITEMS} items, {_MAX_DEPTH} levels or names beyond "
                    f"{_MAX_NAME_LENGTH} characters"
                )
            if isinstance(value, dict | list | tuple):
                visit(value, f"{name}.", depth + 1)
            elif isinstance(value, _Tensor):
                found.append((name, value))
            elif isinstance(value, Inert):
                inert.append((name, value))

    visit(state_dict, "", 0)
    needed = [item for item in inert if _REBUILDS.match(item[1].attribute)] if found else inert
    if needed:
        name, kind = needed[0]
        what = "the state dict holds" if found else "the state dict holds no tensors, but"
        raise CheckpointError(f"{what} {printable(name, 80)}, which asks for {kind} and is not read; {_RESAVE}")
    if not found:
        raise CheckpointError("the state dict holds no tensors; name another entry with key (convert: --key)")
    if len({name for name, _ in found}) < len(found):
        raise CheckpointError("two tensors have the same name")
    _check_names([name for name, _ in found])
    return found


def _persistent(identity: Any) -> _Storage:
    kind, dtype, key, _location, count = identity
    if kind != "storage" or type(key) is not str or type(count) is not int:
        raise PickleError("refers to something that is not a tensor's storage")
    return _Storage(key, dtype, count) if isinstance(dtype, np.dtype) else dtype


def _tensor_v2(
    storage: Any, offset: int, shape: tuple, strides: tuple, grad: Any = None, hooks: Any = None, views: Any = None
) -> _Tensor | Inert:
    return _tensor_v3(storage, offset, shape, strides, grad, hooks, getattr(storage, "dtype", None), views)


def _tensor_v3(
    storage: Any, offset: int, shape: tuple, strides: tuple, _grad: Any, _hooks: Any, dtype: Any, views: Any = None
) -> _Tensor | Inert:
    if views:
        return Inert("torch._utils", "_rebuild_tensor_v2 with a conjugated or negated view")
    if not isinstance(storage, _Storage) or not isinstance(dtype, np.dtype):
        # Its storage is not read, for example because it holds quantized numbers.
        return Inert("torch._utils", "_rebuild_tensor_v2")
    return _Tensor(storage, dtype, offset, shape, strides)


_STORAGES = {"Float": "f4", "Double": "f8", "Half": "f2", "Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1"}
_STORAGES |= {"Byte": "u1", "Bool": "?", "ComplexFloat": "c8", "ComplexDouble": "c16", "BFloat16": ml_dtypes.bfloat16}
# Newer dtypes have untyped storages; their tensors name the dtype.
_DTYPES = {name: getattr(ml_dtypes, name) for name in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")}
_DTYPES |= {name: getattr(ml_dtypes, name) for name in ("float8_e4m3fnuz", "float8_e5m2fnuz")}
_DTYPES |= {name: name for name in ("uint16", "uint32", "uint64")}

_CONSTRUCTORS = {
    "collections OrderedDict": lambda: {},
    "collections defaultdict": lambda *_: {},
    "torch Size": lambda dimensions: dimensions,
    "torch._utils _rebuild_tensor_v2": _tensor_v2,
    "torch._utils _rebuild_tensor_v3": _tensor_v3,
    # Wrappers of a tensor: parameters, and tensors with attributes.
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils _rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor _rebuild_from_type_v2": lambda rebuild, _type, arguments, *_: construct(rebuild, arguments),
}

_NAMES = {f"torch {name}Storage": np.dtype(dtype) for name, dtype in _STORAGES.items()}
_NAMES |= {f"torch {name}": np.dtype(dtype) for name, dtype in _DTYPES.items()}
_NAMES |= {"torch.storage UntypedStorage": np.dtype("u1")}
_NAMES |= {name: Constructor(build) for name, build in _CONSTRUCTORS.items()}
