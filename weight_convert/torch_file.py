"""Reads PyTorch checkpoints without PyTorch and without running anything that the file asks for.

A `.pth` file is an uncompressed zip archive: `data.pkl`, a pickle that describes the objects, and an entry for every
storage, the raw numbers behind the tensors. The pickle is read as data (`safe_pickle`), with the names in the tables
below; a storage is read when a tensor that was asked for needs it.
"""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from vimd_jax.checkpoints.network import CheckpointError
from weight_convert.safe_pickle import Constructor, PickleError, interpret

# Far beyond any real checkpoint (Vim-base with its optimizer state: 2,000 tensors); a hostile file stops here.
_MAX_PICKLE_BYTES = 8 * 2**20
_MAX_ITEMS = 200_000
_MAX_NAME_LENGTH = 1_000
_MAX_RANK = 64

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what PyTorch before 1.6 wrote first


def load_torch_checkpoint(path: str | Path, *, key: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of one state dict in a PyTorch file.

    Args:
      path: `.pth`, `.pt`, `.pth.tar` in PyTorch's zip format (1.6 and later), or `.safetensors`.
      key: which entry of the checkpoint, e.g. "model_ema". None takes "model" or "state_dict" where the file has one,
        and otherwise the file itself. A `.safetensors` file has no entries.

    Returns:
      Name → read-only array in the stored dtype (bfloat16 as `ml_dtypes.bfloat16`). Containers inside the state dict
      are flattened, their names joined by dots; what is not a tensor is left out. Tensors that shared memory still do.

    Raises:
      CheckpointError: not such a file, damaged, in the legacy format, without `key`, or asking for anything but
        tensors, containers, numbers, strings and `argparse.Namespace`.
    """
    path = Path(path)
    with _errors_naming(path):
        with path.open("rb") as file:
            start = file.read(512)
        if start[8:9] == b"{":  # behind the length of a JSON header
            return _load_safetensors(path, key)
        _check_format(start)
        with zipfile.ZipFile(path) as archive:
            checkpoint = _Archive(archive, path.stat().st_size)
            content = interpret(checkpoint.read("data.pkl", _MAX_PICKLE_BYTES), _NAMES, _persistent)
            return {name: checkpoint.tensor(name, tensor) for name, tensor in _named_tensors(_select(content, key))}


@contextmanager
def _errors_naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, PickleError) as error:
        raise CheckpointError(f"{path}: {_printable(str(error))}") from error.__cause__
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can break any step of decoding in any way
        reason = _printable(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"{path}: truncated or damaged, download it again ({reason})") from error


def _printable(message: str, most: int = 1_000) -> str:
    """One line, without the control characters that a hostile file may put into its names."""
    return "".join(c if c.isprintable() else "?" for c in message[:most])


def _check_format(start: bytes) -> None:
    if not start:
        raise CheckpointError("the file is empty")
    if start.startswith(_LEGACY_MAGIC) or start[257:262] == b"ustar":
        raise CheckpointError(
            "PyTorch's legacy format (before 1.6); re-save it once where PyTorch is installed: "
            'python -c "import argparse, torch; torch.serialization.add_safe_globals([argparse.Namespace]); '
            "torch.save(torch.load('OLD.pth', map_location='cpu'), 'NEW.pth')\""
        )
    if not start.startswith(b"PK"):
        raise CheckpointError("neither a PyTorch checkpoint (no zip archive) nor .safetensors; download it again")


def _load_safetensors(path: Path, key: str | None) -> dict[str, np.ndarray]:
    if key is not None:
        raise CheckpointError(f"a .safetensors file holds one set of tensors; leave out key={key!r}")
    with safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        if eighths := [name for name in names if file.get_slice(name).get_dtype().startswith("F8")]:
            raise CheckpointError(f"{eighths[0]} is stored in 8-bit floats, which are not read; save it as float32")
        return {name: file.get_tensor(name) for name in names}


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor's elements lie in its storage; offset and strides count elements."""

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Archive:
    """The zip archive around a checkpoint; hands out tensors and reads each storage once."""

    def __init__(self, archive: zipfile.ZipFile, file_size: int):
        self._archive = archive
        self._file_size = file_size
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
        """A read-only view on the tensor's storage."""
        storage = tensor.storage
        if storage.key not in self._storages:
            self._storages[storage.key] = self.read(f"data/{storage.key}", self._file_size)
        data = self._storages[storage.key]
        if len(data) != storage.count * storage.dtype.itemsize:
            found, expected = len(data), f"{storage.count} × {storage.dtype}"
            raise CheckpointError(f"the storage of {name} has {found} bytes, not {expected}")
        return _view(data, tensor, self._file_size)


def _view(data: bytes, tensor: _Tensor, most_bytes: int) -> np.ndarray:
    if len(tensor.shape) > _MAX_RANK:
        raise CheckpointError(f"a tensor has more than {_MAX_RANK} dimensions")
    if any(type(n) is not int or n < 0 for n in (tensor.offset, *tensor.shape, *tensor.strides)):
        raise CheckpointError("a tensor's offset, shape or strides are not natural numbers")
    size, numbers = tensor.dtype.itemsize, math.prod(tensor.shape)
    # NumPy's own check of the bounds overflows for huge strides, and strides of 0 repeat elements without bound.
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if numbers and (last + 1) * size > len(data):
        raise CheckpointError(f"a tensor of shape {tensor.shape} reaches beyond the {len(data)} bytes of its storage")
    if numbers * size > max(most_bytes, 2**20):
        raise CheckpointError(f"a tensor of shape {tensor.shape} is larger than the whole file")
    strides = [stride * size for stride in tensor.strides]
    return np.ndarray(tensor.shape, tensor.dtype, data, tensor.offset * size, strides)


def _select(checkpoint: Any, key: str | None) -> dict:
    """The state dict among what the file holds."""
    if not isinstance(checkpoint, dict):
        raise CheckpointError("holds something other than a state dict; save model.state_dict()")
    held = ", ".join(str(name)[:40] for name in list(checkpoint)[:20])
    if key is not None:
        if not isinstance(checkpoint.get(key), dict):
            raise CheckpointError(f"has no state dict named {key!r}; it holds: {held}")
        return checkpoint[key]
    for name in ("model", "state_dict"):
        if isinstance(checkpoint.get(name), dict):
            return checkpoint[name]
    if not any(isinstance(value, _Tensor) for value in checkpoint.values()):
        raise CheckpointError(f"has no state dict named model or state_dict; name one with key: {held}")
    return checkpoint


def _named_tensors(state_dict: dict) -> list[tuple[str, _Tensor]]:
    """The tensors in a nest of containers, in order, names joined by dots."""
    found: list[tuple[str, _Tensor]] = []
    pending: list[tuple[str, Any]] = [("", state_dict)]
    visited = 0  # together with the length of the names this bounds containers that hold themselves or each other
    while pending:
        prefix, value = pending.pop()
        if isinstance(value, _Tensor):
            found.append((prefix.removesuffix("."), value))
        elif isinstance(value, dict | list | tuple):
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            visited += len(items)
            names = [str(name) for name, _ in items]
            if visited > _MAX_ITEMS or len(prefix) + max(map(len, names), default=0) > _MAX_NAME_LENGTH:
                raise CheckpointError(f"more than {_MAX_ITEMS} items or names beyond {_MAX_NAME_LENGTH} characters")
            pending += [(f"{prefix}{name}.", item) for name, (_, item) in zip(reversed(names), reversed(items))]
    if not found:
        raise CheckpointError("the state dict holds no tensors")
    if len({name for name, _ in found}) < len(found):
        raise CheckpointError("two tensors have the same name")
    return found


def _persistent(identity: Any) -> _Storage:
    kind, dtype, key, _location, count = identity
    if kind != "storage" or not isinstance(dtype, np.dtype) or type(key) is not str or type(count) is not int:
        raise PickleError("refers to something that is not a tensor's storage")
    return _Storage(key, dtype, count)


def _tensor_v2(
    storage: _Storage, offset: int, shape: tuple, strides: tuple, grad: Any = None, hooks: Any = None, views: Any = None
) -> _Tensor:
    return _tensor_v3(storage, offset, shape, strides, grad, hooks, storage.dtype, views)


def _tensor_v3(
    storage: _Storage,
    offset: int,
    shape: tuple,
    strides: tuple,
    _grad: Any,
    _hooks: Any,
    dtype: np.dtype,
    views: Any = None,
) -> _Tensor:
    if views:
        raise PickleError("holds a conjugated or negated view; save it after resolve_conj() and resolve_neg()")
    return _Tensor(storage, dtype, offset, shape, strides)


def _size(dimensions: tuple) -> tuple:
    if type(dimensions) is not tuple:
        raise PickleError("a torch.Size is made of something that is not a tuple")
    return dimensions


def _number(*_: Any) -> None:
    """A NumPy scalar, a complex number, a device: nothing reads its value."""


def _container(items: Any = ()) -> Any:
    """A set or a counter: what it is made of, not copied."""
    return items


_STORAGE_TYPES = {
    "torch FloatStorage": np.float32,
    "torch DoubleStorage": np.float64,
    "torch HalfStorage": np.float16,
    "torch BFloat16Storage": ml_dtypes.bfloat16,
    "torch LongStorage": np.int64,
    "torch IntStorage": np.int32,
    "torch ShortStorage": np.int16,
    "torch CharStorage": np.int8,
    "torch ByteStorage": np.uint8,
    "torch BoolStorage": np.bool_,
    "torch ComplexFloatStorage": np.complex64,
    "torch ComplexDoubleStorage": np.complex128,
    # Younger dtypes have untyped storages; their tensors name the dtype.
    "torch.storage UntypedStorage": np.uint8,
    "torch uint16": np.uint16,
    "torch uint32": np.uint32,
    "torch uint64": np.uint64,
    "torch float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "torch float8_e5m2": ml_dtypes.float8_e5m2,
    "torch float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "torch float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "torch float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
    # Settings may name the others.
    "torch float32": np.float32,
    "torch float64": np.float64,
    "torch float16": np.float16,
    "torch bfloat16": ml_dtypes.bfloat16,
}

_BUILTINS = ("builtins", "__builtin__")  # from pickle protocol 3 on, and before
_CONSTRUCTORS = {
    "collections OrderedDict": lambda: {},
    "argparse Namespace": lambda: {},
    "torch Size": _size,
    "torch._utils _rebuild_tensor_v2": _tensor_v2,
    "torch._utils _rebuild_tensor_v3": _tensor_v3,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "collections defaultdict": lambda *_: {},
    "collections Counter": _container,
    **{f"{module} {name}": _container for module in _BUILTINS for name in ("set", "frozenset")},
    **{f"{module} {name}": _number for module in _BUILTINS for name in ("complex", "list", "dict", "int", "float")},
    "torch device": _number,
    "numpy dtype": _number,
    "numpy.core.multiarray scalar": _number,
    "numpy._core.multiarray scalar": _number,
    "_codecs encode": _number,
}

_NAMES = {name: np.dtype(dtype) for name, dtype in _STORAGE_TYPES.items()}
_NAMES |= {name: Constructor(build) for name, build in _CONSTRUCTORS.items()}
