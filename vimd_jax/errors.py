"""The errors of this library. Each message is one line that names the file, field or shape and the remedy."""

import unicodedata


class DatasetError(ValueError):
    """Images or labels that cannot be used."""


class UnreadableImage(DatasetError):
    """An image that cannot be decoded; the message names the file and the cause."""


class CheckpointError(ValueError):
    """A checkpoint or weight file that cannot be read or written."""


class PickleError(ValueError):
    """A pickle stream that is damaged or holds something that cannot be read safely."""


class TrainingError(Exception):
    """A run that cannot go on."""


class Stopped(SystemExit):
    """The end of a program that was asked to stop; its exit status is that of the signal, as shells count it."""


def printable(text: object, most: int | None = 200) -> str:
    """Text from a file as it may be shown: escaped as `repr` does where it could act on a terminal.

    Args:
      text: file names, class names, messages, whatever others have written.
      most: characters after which it is cut; None: never.
    """
    text = str(text)
    shown = "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in text[:most])
    return shown + "..." * (most is not None and len(text) > most)
