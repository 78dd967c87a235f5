"""Reads a pickle as data: a small machine that builds containers, numbers and strings and runs nothing.

Python's unpickler imports and calls what the pickle names. This one looks names up in a table given by the caller and
refuses all others, knows only the instructions that data needs, and keeps to memory in proportion to the pickle's size.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class PickleError(ValueError):
    """The pickle asks for something that is not data."""


@dataclass(frozen=True)
class Constructor:
    """A function that a pickle may call, under the name that the pickle has for it."""

    build: Callable[..., Any]


_PUSH = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
_PUSH |= {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MAX_BITS = 1024  # of an integer: a short pickle can use a long one a million times
_MAX_ARGUMENTS = 16  # of a constructor
_KEY_TYPES = (str, int, float, bool, bytes, type(None))  # hashing a deeply nested tuple can overflow the C stack


def interpret(pickle: bytes, names: dict[str, Any], persistent: Callable[[Any], Any]) -> Any:
    """The object that a pickle describes.

    Args:
      pickle: protocol 2 to 5, as `pickle.dumps` writes.
      names: "module name" → what stands for it: a `Constructor`, or a constant. The state that a pickle attaches to a
        built object (attributes of an `argparse.Namespace`, metadata of an `OrderedDict`) is left out.
      persistent: turns a persistent id into an object.

    Raises:
      PickleError: a name outside `names`, an instruction that data does not need, or keys that are no plain values.
      Exception: anything, where the pickle is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def take(start: int) -> list[Any]:
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(pickle):
        instruction = opcode.name
        if instruction in _PUSH:
            if type(argument) is int and argument.bit_length() > _MAX_BITS:
                raise PickleError(f"holds an integer of more than {_MAX_BITS} bits")
            stack.append(argument)
        elif instruction in _CONSTANTS:
            stack.append(_CONSTANTS[instruction])
        elif instruction in _TUPLES:
            stack.append(tuple(take(len(stack) - _TUPLES[instruction])))
        else:
            match instruction:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
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
                case "TUPLE":
                    stack.append(tuple(take(marks.pop())))
                case "APPEND":
                    _extend(stack[-2], [stack.pop()])
                case "APPENDS":
                    items = take(marks.pop())
                    _extend(stack[-1], items)
                case "SETITEM":
                    items = take(len(stack) - 2)
                    _update(stack[-1], items)
                case "SETITEMS":
                    items = take(marks.pop())
                    _update(stack[-1], items)
                case "GLOBAL":
                    stack.append(_look_up(names, argument))
                case "STACK_GLOBAL":
                    stack.append(_look_up(names, " ".join(take(len(stack) - 2))))
                case "REDUCE" | "NEWOBJ":
                    constructor, arguments = take(len(stack) - 2)
                    stack.append(_construct(constructor, arguments))
                case "BUILD":
                    stack.pop()
                case "BINPERSID":
                    stack.append(persistent(stack.pop()))
                case _:
                    raise PickleError(f"uses the pickle instruction {instruction}, which data does not need")
    raise PickleError("the pickle has no end")


def _look_up(names: dict[str, Any], name: str) -> Any:
    if name not in names:
        module, _, attribute = name.rpartition(" ")
        raise PickleError(
            f"asks for {module}.{attribute}; only tensors, containers, numbers, strings and argparse.Namespace are "
            "read, and nothing was executed; save model.state_dict() alone"
        )
    return names[name]


def _construct(constructor: Any, arguments: Any) -> Any:
    if not isinstance(constructor, Constructor) or type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS:
        raise PickleError("calls something that is not a constructor of data")
    return constructor.build(*arguments)


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise PickleError("appends to something that is not a list")
    target.extend(items)


def _update(target: Any, items: list[Any]) -> None:
    keys = items[::2]
    if type(target) is not dict or any(type(key) not in _KEY_TYPES for key in keys) or len(items) % 2:
        raise PickleError("sets items of something that is not a dict of plain keys")
    target.update(zip(keys, items[1::2]))
