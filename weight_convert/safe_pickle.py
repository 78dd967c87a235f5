"""Reads a pickle as data, by a small interpreter that builds containers, numbers and strings and runs no code.

Python's unpickler imports and calls what the pickle names. This one looks names up in a table given by the caller; any
other name becomes an `Inert`, an object that only stores the name. Time and memory are bounded.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vimd_jax.errors import PickleError, printable


@dataclass(frozen=True)
class Constructor:
    """A function that a pickle may call."""

    build: Callable[..., Any]


@dataclass(frozen=True, eq=False, slots=True)
class Inert:
    """A stand-in for an object that is not read; calls, items and attributes have no effect on it."""

    module: str
    attribute: str

    def __str__(self):
        return printable(f"{self.module}.{self.attribute}")


_PUSH = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BYTEARRAY8"}
_PUSH |= {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
_SET = Inert("builtins", "set")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_SET": _SET}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CALLS = {"REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3}
_MAX_INSTRUCTIONS = 300_000  # Vim-tiny with its optimizer state and average: 69,000
_MAX_BITS = 1024  # of an integer, since a short pickle can use a long integer a million times
_MAX_ARGUMENTS = 16  # of a constructor
_MAX_KEY = 1_000  # characters of a key or name, since a pickle can have equal keys compared in full very often

# No data needs these. They would be as inert as any name here, but users who open the file elsewhere should be warned.
_BUILTINS = ("builtins", "__builtin__")  # from pickle protocol 3 on, and before
_COMMANDS = {"os", "posix", "nt", "sys", "subprocess", "pty", "shutil", "socket", "runpy", "importlib", "ctypes"}
_COMMANDS |= {
    f"{builtins} {name}" for builtins in _BUILTINS for name in ("eval", "exec", "compile", "open", "__import__")
}


def interpret(pickle: bytes, names: dict[str, Any], persistent: Callable[[Any], Any]) -> Any:
    """The object that a pickle describes.

    Args:
      pickle: protocol 2 to 5, as `pickle.dumps` writes.
      names: "module name" → the `Constructor` or constant to use. The state that a pickle attaches to a built object
        (attributes, metadata of an `OrderedDict`) is left out. Sets are inert, and so are dict keys other than plain
        values.
      persistent: turns a persistent id into an object.

    Raises:
      PickleError: a name that runs commands, an instruction that data does not need, or too many instructions.
      Exception: of any kind, if the pickle is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def take(start: int) -> list[Any]:
        items = stack[start:]
        del stack[start:]
        return items

    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
        instruction = opcode.name
        if count > _MAX_INSTRUCTIONS:
            raise PickleError(
                f"its pickle has more than {_MAX_INSTRUCTIONS} instructions; save model.state_dict() alone"
            )
        if instruction in _PUSH:
            if type(argument) is int and argument.bit_length() > _MAX_BITS:
                raise PickleError(f"holds an integer of more than {_MAX_BITS} bits")
            stack.append(argument)
        elif instruction in _CONSTANTS:
            stack.append(_CONSTANTS[instruction])
        elif instruction in _TUPLES:
            stack.append(tuple(take(len(stack) - _TUPLES[instruction])))
        elif instruction in _CALLS:
            constructor, arguments, *_ = take(len(stack) - _CALLS[instruction])
            stack.append(construct(constructor, arguments))
        else:
            match instruction:
                case "GLOBAL":
                    module, _, attribute = argument.partition(" ")
                    stack.append(_look_up(names, module, attribute))
                case "MARK":
                    marks.append(len(stack))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "FROZENSET":
                    take(marks.pop())
                    stack.append(_SET)
                case "TUPLE":
                    stack.append(tuple(take(marks.pop())))
                case "APPEND" | "APPENDS" | "ADDITEMS":
                    items = take(len(stack) - 1 if instruction == "APPEND" else marks.pop())
                    _extend(stack[-1], items)
                case "SETITEM" | "SETITEMS":
                    items = take(len(stack) - 2 if instruction == "SETITEM" else marks.pop())
                    _update(stack[-1], items)
                case "STACK_GLOBAL":
                    stack.append(_look_up(names, *take(len(stack) - 2)))
                case "BUILD" | "POP":
                    stack.pop()
                case "POP_MARK":
                    take(marks.pop())
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "BINPERSID":
                    stack.append(persistent(stack.pop()))
                case _:
                    raise PickleError(f"uses the pickle instruction {instruction}, which data does not need")
    raise PickleError("the pickle has no end")


def _look_up(names: dict[str, Any], module: str, attribute: str) -> Any:
    if len(module) > _MAX_KEY or len(attribute) > _MAX_KEY:
        raise PickleError(f"asks for a name of more than {_MAX_KEY} characters")
    name = f"{module} {attribute}"
    if name in names:
        return names[name]
    inert = Inert(module, attribute)
    if module.partition(".")[0] in _COMMANDS or name in _COMMANDS:
        raise PickleError(
            f"asks for {inert}, which no checkpoint needs: it may be meant to run commands, so do not open it with "
            "PyTorch; nothing was executed"
        )
    return inert


def construct(constructor: Any, arguments: Any) -> Any:
    """Calls `constructor`; an `Inert` returns itself."""
    if isinstance(constructor, Inert):
        return constructor
    if not isinstance(constructor, Constructor) or type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS:
        raise PickleError("calls something that is not a constructor of data")
    return constructor.build(*arguments)


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is list:
        target.extend(items)
    elif not isinstance(target, Inert):
        raise PickleError("appends to something that is not a list")


def _update(target: Any, items: list[Any]) -> None:
    if type(target) is dict and len(items) % 2 == 0:
        target.update(zip(map(_key, items[::2]), items[1::2]))
    elif not isinstance(target, Inert):
        raise PickleError("sets items of something that is not a dict")


def _key(key: Any) -> Any:
    """The key, or an `Inert` for one that could make a dict slow: large integers share hashes, and tuples nest."""
    plain = key is None or type(key) in (bool, float)
    plain = plain or (type(key) is int and key.bit_length() < 60)
    plain = plain or (type(key) in (str, bytes) and len(key) <= _MAX_KEY)
    return key if plain else Inert("a key of type", type(key).__name__)
