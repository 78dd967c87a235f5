"""Keeping two runs out of one folder, also where the file system has no locks."""

import contextlib
import errno
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

BEAT = 15.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one after which a run counts as ended

# Lustre without -o flock, NFS without a lock daemon, file systems in user space.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Holds workdir/.lock; where files cannot be locked, keeps workdir/.running fresh instead.

    Raises:
      ValueError: another process holds it, or .lock is a link.
    """
    path = workdir / ".lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a link: remove it.") from None
        raise
    with os.fdopen(descriptor, "rb+"):
        cause = _lock(descriptor, workdir)
        with contextlib.nullcontext() if cause is None else _signs_of_life(workdir, cause):
            yield


def _lock(descriptor: int, workdir: Path) -> str | None:
    """Locks an open file until its process ends, however that ends; the reason where files cannot be locked."""
    if fcntl is None:
        return "no flock on this system"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{workdir}: another process is already training there; wait for it or stop it.") from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return str(error.strerror)
    return None


@contextlib.contextmanager
def _signs_of_life(workdir: Path, cause: str) -> Iterator[None]:
    """Makes workdir/.running, which names this process, and touches it every few seconds until the end."""
    path, ended = workdir / ".running", threading.Event()
    _create(path)
    log.warning(
        "%s cannot be locked (%s). %s, touched every %.0f s, keeps other runs out instead.", workdir, cause, path, BEAT
    )

    def beat() -> None:
        while not ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def _create(path: Path) -> None:
    """Makes the file of this process, which only one can; that of a process that has ended is removed first."""
    for _ in range(2):
        try:
            with path.open("x") as file:
                json.dump(_this_process(), file)
            return
        except FileExistsError:
            _remove_if_ended(path)
    raise ValueError(f"{path.parent}: another process is just starting to train there.")


def _remove_if_ended(path: Path) -> None:
    """Raises ValueError if the process of this file may still be running."""
    other: object = None
    try:
        silence = _now(path.parent) - path.stat().st_mtime
        with contextlib.suppress(ValueError):  # it was just made, or is damaged
            other = json.loads(path.read_text())
    except FileNotFoundError:
        return
    other = other if isinstance(other, dict) else {}
    if silence < SILENCE and not _has_ended(other):
        raise ValueError(
            f"{path.parent}: another process is training there (process {other.get('process')} on {other.get('host')}, "
            f"last sign of life {silence:.0f} s ago); wait for it or stop it. If it was killed, try again in "
            f"{SILENCE - silence:.0f} s."
        )
    path.unlink(missing_ok=True)


def _now(folder: Path) -> float:
    """The time by the clock of the folder's file system, which may be another machine's."""
    probe = folder / f".clock.{os.getpid()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _this_process() -> dict[str, object]:
    """The host, the space of process numbers (containers have their own), and the number of this process."""
    space = Path("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "space": os.readlink(space) if space.exists() else "", "process": os.getpid()}


def _has_ended(other: dict[str, object]) -> bool:
    """Whether a process is known to have ended: only where its number means something here."""
    here, number = _this_process(), other.get("process")
    if os.name != "posix" or not isinstance(number, int) or {**other, "process": 0} != {**here, "process": 0}:
        return False
    try:
        os.kill(number, 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False
