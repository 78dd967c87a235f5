"""One setting of a run, and the rules for its value. The settings themselves: config.py, and a task's own in tasks/."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """The values that a setting may have: in words, and as a test."""

    words: str
    fits: Callable[[Any], bool]


def at_least(low: int) -> Rule:
    return Rule(f"at least {low}", lambda x: x >= low)


def one_of(*choices: str) -> Rule:
    return Rule(" or ".join(choice or "empty" for choice in choices), lambda x: x in choices)


ANY = Rule("", lambda x: True)
ABOVE_0 = Rule("above 0", lambda x: x > 0)
BELOW_1 = Rule("at least 0 and below 1", lambda x: 0 <= x < 1)
SHARE_OR_0 = Rule("from 0 to 1", lambda x: 0 <= x <= 1)
SHARE = Rule("above 0 and at most 1", lambda x: 0 < x <= 1)
SIZE = Rule("a side or (height, width), each at least 1", lambda x: _is_size((x, x) if type(x) is int else x))
SHARES = Rule("two shares above 0 and at most 1, the smaller first", lambda x: len(x) == 2 and 0 < x[0] <= x[1] <= 1)


def _is_size(value: Any) -> bool:
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    return is_pair and all(type(side) is int and side >= 1 for side in value)


class Setting(NamedTuple):
    """One field of a config.

    Attributes:
      default: its value; a type stands for None, and is the type of other values.
      rule: the values that it may have.
      meaning: its effect.
      changeable: whether it may differ between a run and its continuation, because it changes no number of the run.
      kind: the type of its values, where that is not the default's; object is any value.
    """

    default: Any
    rule: Rule
    meaning: str
    changeable: bool = False
    kind: type | None = None
