"""What every program shares: a log, and errors that a person can read."""

import contextlib
import logging
import sys
from collections.abc import Iterator

from vimd_jax.errors import TrainingError

log = logging.getLogger(__name__)


def show_log(details: bool = False) -> None:
    """Sends this project's log to stderr, one plain line with the time for each message."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
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
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
