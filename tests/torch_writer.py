"""Writes files like torch.save, from NumPy arrays, so that tests can create any file without PyTorch."""

import argparse
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}


class Global(str):
    """A name, "module attribute", that the pickle refers to."""


class Call(tuple):
    """(Global, arguments): the pickle calls the name with the arguments, a tuple."""


class View(tuple):
    """(storage array, offset, shape, strides): a tensor on a storage that others may share."""


class Attributed(tuple):
    """(array, attributes): a tensor with attributes."""


def save(path: Path, content: Any) -> None:
    """torch.save(content, path) for nests of dict, list, tuple, str, numbers, None, Namespace and arrays."""
    storages: dict[int, tuple[str, np.ndarray]] = {}
    description = b"\x80\x02" + _encode(content, storages) + b"."
    write_archive(path, {"data.pkl": description} | {f"data/{key}": array for key, array in storages.values()})


def write_archive(path: Path, entries: dict[str, Any], compression: int = zipfile.ZIP_STORED) -> None:
    """Writes the zip archive of a checkpoint."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in ({"byteorder": b"little", "version": b"3\n"} | entries).items():
            with archive.open(f"archive/{name}", "w", force_zip64=True) as entry:
                entry.write(np.ascontiguousarray(data).tobytes() if isinstance(data, np.ndarray) else data)


def _encode(value: Any, storages: dict[int, tuple[str, np.ndarray]]) -> bytes:
    def many(values: Any) -> bytes:
        return b"(" + b"".join(_encode(item, storages) for item in values)

    match value:
        case Global():
            module, attribute = value.split(" ")
            return f"c{module}\n{attribute}\n".encode()
        case Call():
            return _encode(value[0], storages) + _encode(value[1], storages) + b"R"
        case View():
            return _encode(_tensor_call(*value, storages), storages)
        case Attributed():
            rebuild, arguments = _tensor_call(value[0], 0, value[0].shape, (1,), storages)
            call = (rebuild, Global("torch Tensor"), arguments, value[1])
            return _encode(Call((Global("torch._tensor _rebuild_from_type_v2"), call)), storages)
        case np.ndarray():
            strides = tuple(np.cumprod((1, *value.shape[:0:-1]))[::-1].tolist()) if value.ndim else ()
            return _encode(_tensor_call(value, 0, value.shape, strides, storages), storages)
        case _Persistent():
            return _encode(tuple(value), storages) + b"Q"
        case argparse.Namespace():
            return b"cargparse\nNamespace\n)\x81" + _encode(vars(value), storages) + b"b"
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            return b"J" + struct.pack("<i", value) if abs(value) < 2**31 else b"\x8a\x0f" + value.to_bytes(15, "little")
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case dict():
            return b"}" + many(item for pair in value.items() for item in pair) + b"u"
        case list():
            return b"]" + many(value) + b"e"
        case tuple():
            return many(value) + b"t"
    raise TypeError(type(value))


class _Persistent(tuple):
    """A storage, which torch.save refers to by a persistent id."""


def _tensor_call(array: np.ndarray, offset: int, shape: Any, strides: Any, storages: dict) -> Call:
    key, _ = storages.setdefault(id(array), (str(len(storages)), array))
    storage = _Persistent(("storage", Global(f"torch {STORAGES[array.dtype.name]}"), key, "cpu", array.size))
    hooks = Call((Global("collections OrderedDict"), ()))
    return Call(
        (Global("torch._utils _rebuild_tensor_v2"), (storage, offset, tuple(shape), tuple(strides), False, hooks))
    )
