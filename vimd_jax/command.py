"""Flags of the programs that read a config, and an orderly end on SIGTERM and Ctrl-C."""

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from vimd_jax import log as logs
from vimd_jax.compilation_cache import keep_programs
from vimd_jax.configs import find_config
from vimd_jax.errors import Stopped
from vimd_jax.memory import use_large_pages
from vimd_jax.training import parallel

log = logging.getLogger(__name__)


class _ConfigParser(ConfigFileFlagParser):
    """Reads a config file; one of configs/ is found by its name too."""

    def parse(self, text: str) -> ConfigDict:
        try:
            return super().parse(find_config(text))
        except AttributeError as error:
            if error.name != "get_config":
                raise
            raise ValueError(f"{text} is no config, but what configs share: it has no get_config") from None


def run(main: Callable[[ConfigDict, Path], None], define_flags: Callable[[], None]) -> None:
    """Runs a program; a flag or a field that is not right ends it with one line.

    Args:
      main: takes the values of --config and --workdir.
      define_flags: defines the others. Importing a program defines none.
    """
    use_large_pages()
    others = set(flags.FLAGS)
    config = config_flags.DEFINE_config_file("config", None, "A config file, or the name of one of configs/.")
    flags.FLAGS["config"].parser = _ConfigParser("config")
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run; made if it is not there.")
    define_flags()
    flags.mark_flags_as_required(["config", "workdir"])
    flags.register_validator("workdir", lambda text: text != "", "name a folder")
    # The text of --help, also where the command vimd-train or vimd-evaluate is the main module.
    sys.modules["__main__"].__doc__ = sys.modules[main.__module__].__doc__
    for name in set(flags.FLAGS) - others:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    keep_programs()
    app.run(lambda _: main(config.value, Path(workdir.value).expanduser()), flags_parser=_parse)


def is_given(field: str) -> bool:
    """Whether the command line sets a field of the config, or of one of its stages."""
    given = config_flags.get_override_values(flags.FLAGS["config"])
    return any(f".{name}".endswith(f".{field}") for name in given)


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
    logs.show_log(details)


class StopRequest:
    """Remembers SIGTERM, SIGUSR1 and Ctrl-C, so that a run can save and leave. A second Ctrl-C ends it at once.

    Used as a context, it gives the signals back at its end. Only the main thread can take them; elsewhere nothing is
    ever asked.

    Attributes:
      must_save: whether there is something to save.
    """

    def __init__(self, at_once: bool = False):
        """Takes the signals.

        Args:
          at_once: while there is nothing to save, the first signal ends the process, even in the middle of a
            compilation, during which Python's own handlers of signals wait. For a program, which owns its process.
        """
        self.must_save = False
        self._signal = 0
        self._writing: int | None = None
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return
        if at_once and os.name == "posix":
            reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            threading.Thread(target=self._watch, args=(reading,), daemon=True).start()
            self._fd_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if number := getattr(signal, name, None):
                self._before[number] = signal.signal(number, self._remember)

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._writing is not None:
            signal.set_wakeup_fd(self._fd_before)
            os.close(self._writing)

    def _watch(self, reading: int) -> None:
        """Ends the process if one of the signals arrives while there is nothing to save."""
        while received := os.read(reading, 1):
            if received[0] in self._before and not self.must_save:
                log.info("Asked to stop before there was anything to save.")
                parallel.leave(128 + received[0])
        os.close(reading)

    def _remember(self, number: int, _: object) -> None:
        self._signal = number
        if self.must_save or self._writing is None:
            log.info("Asked to stop; stopping after the current step or batch.")
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
