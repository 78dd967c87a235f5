"""What the command-line programs share: flags, a log, errors that a person can read, and a polite end on SIGTERM."""

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from vimd_jax.data import DatasetError
from vimd_jax.training import TrainingError

log = logging.getLogger(__name__)

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if it is not there.")


def show_log() -> None:
    """Sends this project's log to stderr, one plain line with the time for each message; `--verbosity=1` shows more.

    The log of the libraries, which Orbax fills with dozens of lines a checkpoint, is shown with `--verbosity=1` only.
    """
    details = absl_logging.get_verbosity() >= absl_logging.DEBUG
    if not details:
        absl_logging.set_verbosity(absl_logging.FATAL)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    for name in ("vimd_jax", "kernels", "weight_convert"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if details else logging.INFO)
        logger.propagate = False


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turns an error of the request into one line on stderr and exit status 1; `--verbosity=1` adds the traceback."""
    try:
        yield
    except (ValueError, OSError, DatasetError, TrainingError) as error:
        log.debug("The error came from:", exc_info=True)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


class StopRequest:
    """Remembers SIGTERM, so that a run can finish its step, save and leave."""

    def __init__(self):
        self.requested = False
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, *_: object) -> None:
        self.requested = True
