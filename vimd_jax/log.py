"""The log of every program, and errors as one line."""

import contextlib
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


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turns an error of the request into one line on stderr and exit status 1; the debug log has the traceback."""
    try:
        yield
    except (ValueError, OSError, TrainingError) as error:
        log.debug("The error came from:", exc_info=True)
        print(f"error: {printable(' '.join(str(error).split()), None)}", file=sys.stderr)
        sys.exit(1)
