"""What the programs that read a config share: their flags, and a polite end on SIGTERM."""

import signal

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from vimd_jax import log

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if it is not there.")


def show_log() -> None:
    """Shows this project's log; `--verbosity=1` adds details, and the log of the libraries, which Orbax fills."""
    details = absl_logging.get_verbosity() >= absl_logging.DEBUG
    if not details:
        absl_logging.set_verbosity(absl_logging.FATAL)
    log.show_log(details)


class StopRequest:
    """Remembers SIGTERM, so that a run can finish its step, save and leave."""

    def __init__(self):
        self.requested = False
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, *_: object) -> None:
        self.requested = True
