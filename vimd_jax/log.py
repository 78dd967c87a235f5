"""The log of every program, and errors as one line."""

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator

from vimd_jax.errors import TrainingError, printable

log = logging.getLogger(__name__)


class _Formatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        return printable(super().formatMessage(record), None)  # names in it may come from anywhere


def show_log(details: bool = False) -> None:
    """Sends this project's log to stderr, one plain line with the time for each message."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    for name in ("vimd_jax", "kernels", "weight_convert"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if details else logging.INFO)
        logger.propagate = False


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, if it has not been logged yet."""
    log.warning(message)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turns an error of the request into one line on stderr and exit status 1; the debug log has the traceback."""
    try:
        yield
    except (ValueError, OSError, TrainingError) as error:
        log.debug("The error came from:", exc_info=True)
        print(f"error: {printable(' '.join(str(error).split()), None)}", file=sys.stderr)
        sys.exit(1)


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """A context for an extra, as a picture or a table: if it fails, a warning says so and the work goes on."""
    try:
        yield
    except Exception as error:  # libraries that draw have no common type
        log.debug("The error came from:", exc_info=True)
        text = f"{name} could not be written ({' '.join(str(error).split())}); all else goes on."
        log.warning("%s", printable(text, None))
