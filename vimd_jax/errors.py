"""The errors of this library. Each message is one line that names the file, field or shape and the remedy."""


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
