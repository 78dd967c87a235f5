"""Flags of the programs that read a config, and an orderly end on SIGTERM and Ctrl-C."""

import logging
import re
import signal
import sys
from collections.abc import Callable

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from vimd_jax import log
from vimd_jax.configs import find_config
from vimd_jax.errors import Stopped
from vimd_jax.training import parallel


class _ConfigParser(ConfigFileFlagParser):
    """Reads a config file; one of configs/ is found by its name too."""

    def parse(self, text: str) -> ConfigDict:
        try:
            return super().parse(find_config(text))
        except AttributeError as error:
            if error.name != "get_config":
                raise
            raise ValueError(f"{text} is no config, but what configs share: it has no get_config") from None


CONFIG = config_flags.DEFINE_config_file("config", None, "A config file, or the name of one of configs/.")
flags.FLAGS["config"].parser = _ConfigParser("config")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if it is not there.")


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a program that needs both flags; a flag or a field that is not right ends it with one line."""
    flags.mark_flags_as_required(["config", "workdir"])
    flags.register_validator("workdir", lambda text: text != "", "name a folder")
    # The text of --help, also where the command vimd-train or vimd-evaluate is the main module.
    sys.modules["__main__"].__doc__ = sys.modules[main.__module__].__doc__
    for flag in (CONFIG, WORKDIR, *flags.FLAGS.get_flags_for_module(main.__module__)):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
    app.run(main, flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except Exception as error:  # what ml_collections and config files raise has no common type
        text = str(error)
        if isinstance(error, KeyError | AttributeError):
            field, guess = re.search(r"\w+", text), re.search(r'Did you mean "(\w+)"', text)
            text = f"the config has no field {field[0]!r}" + (f", did you mean {guess[1]!r}?" if guess else "")
        if "Traceback (most recent call last)" in text:  # of a config file; its last line says what happened
            text = text.strip().splitlines()[-1]
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(1)


def show_log() -> None:
    """Shows this project's log; `--verbosity=1` adds details, and the log of the libraries, which Orbax fills."""
    details = absl_logging.get_verbosity() >= absl_logging.DEBUG
    if not details:
        absl_logging.set_verbosity(absl_logging.FATAL)
    log.show_log(details)


class StopRequest:
    """Remembers SIGTERM and Ctrl-C, so that a run can save and leave. A second Ctrl-C ends it at once."""

    def __init__(self):
        self._signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _: object) -> None:
        self._signal = number
        logging.getLogger("vimd_jax.command").info("Asked to stop; stopping after the current step or batch.")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self, step: int = 0) -> None:
        """Raises Stopped if this process, or another one that trains with it, was asked to stop.

        Asking the others makes a process wait for its devices, so several processes do so at every tenth step only.
        """
        if parallel.is_alone() or step % 10 == 0:
            self._raise(parallel.any_process(self._signal))

    def check_here(self) -> None:
        """Raises Stopped if this process was asked to stop, without asking the others."""
        self._raise(self._signal)

    @staticmethod
    def _raise(number: int) -> None:
        if number:
            raise Stopped(128 + number)
