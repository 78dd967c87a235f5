"""Data parallelism: the one place that knows how a step runs on several devices and hosts.

Each device holds a copy of the state and a slice of the batch. Arrays carry a leading axis of local devices. Of several
processes the first one decides: it alone reads and writes the workdir, and the others receive copies from it.
"""

import atexit
import contextlib
import logging
import os
import socket
import subprocess
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from flax import jax_utils
from jax.experimental import multihost_utils

from vimd_jax.errors import TrainingError
from vimd_jax.models.layers import DEVICES

AXIS = DEVICES  # the name under which steps average and sum over all devices of all hosts

LOST = "this or another process of this run has ended or cannot be reached; the same command, given to all, continues"


def replicate(tree: Any) -> Any:
    """A copy for every local device, placed as pmap places its results, so that no step is compiled twice."""
    return jax_utils.replicate(tree, axis_name=AXIS)


def over_devices(step: Callable, *, donate_state: bool = False) -> Callable:
    """Compiles `step` to run on every device at once; inside it, `AXIS` names the devices."""
    return jax.pmap(step, axis_name=AXIS, donate_argnums=(0,) if donate_state else ())


def shard(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Splits this host's batch (n, ...) into (local devices, n / local devices, ...)."""
    return jax.tree.map(lambda x: x.reshape(jax.local_device_count(), -1, *x.shape[1:]), batch)


def fetch(tree: Any) -> Any:
    """One copy of a replicated tree, as NumPy arrays."""
    return jax.device_get(jax.tree.map(lambda x: x.addressable_data(0)[0], tree))


def check_batch_size(field: str, batch_size: int, parts: int = 1) -> None:
    """Raises ValueError unless the devices can share a batch of this size equally, each of them in `parts`."""
    if batch_size < 1 or batch_size % (jax.device_count() * parts):
        times = f" times config.accumulation_steps, {parts}" if parts > 1 else ""
        raise ValueError(
            f"config.{field} is {batch_size}: choose a multiple of the number of devices, {jax.device_count()}{times}."
        )


def is_alone() -> bool:
    """Whether no other process trains with this one."""
    return jax.process_count() == 1


def is_first() -> bool:
    """Whether this is the process that reads and writes the workdir and speaks for all."""
    return jax.process_index() == 0


def from_first(tree: Any) -> Any:
    """The first process's copy of a tree of arrays, on every process; elsewhere the tree only says the shapes."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def any_process(number: int) -> int:
    """The largest of the processes' numbers, so not 0 if that of any process is not 0."""
    return int(np.max(multihost_utils.process_allgather(np.array(number)))) if jax.process_count() > 1 else number


def check_same_computation(text: str) -> None:
    """Raises TrainingError, on every process, unless all of them describe their computation by the same text."""
    digest = zlib.crc32(text.encode()) % 2**30
    if any_process(digest) != -any_process(-digest):
        raise TrainingError(
            f"The processes of this run do not run the same computation; this one has {text}. Give all of them the "
            "same command and data, and the same compiler, or set config.scan_implementation."
        )


def join(address: str, count: int | None, index: int | None, wait_seconds: int) -> None:
    """Makes this process one of several that train together.

    Args:
      address: host:port of the first process.
      count: how many processes there are.
      index: which one this is, from 0.
      wait_seconds: for the others to start.

    Raises:
      ValueError: the address does not resolve, or a number is missing or out of range.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host, int(port))
    except (OSError, ValueError) as error:
        raise ValueError(f"--coordinator_address={address} is not host:port of process 0: {error}") from error
    if count is None or index is None or not 0 <= index < count:
        raise ValueError(
            f"--num_processes is {count} and --process_id is {index}: give how many there are, and 0 to one less."
        )
    _initialize(wait_seconds, coordinator_address=address, num_processes=count, process_id=index)


def join_job(wait_seconds: int) -> None:
    """The same, with what SLURM, Open MPI or Kubernetes tell the processes of a job.

    Raises:
      ValueError: this process is in no such job.
    """
    try:
        _initialize(wait_seconds)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: JAX cannot tell from SLURM, Open MPI or Kubernetes whose job this is ({error}); "
            "give --coordinator_address, --num_processes and --process_id."
        ) from error


def _initialize(wait_seconds: int, **processes: Any) -> None:
    _leave_last_words()
    # JAX ends a process, through abort, this long after it last heard of the others.
    jax.distributed.initialize(initialization_timeout=wait_seconds, heartbeat_timeout_seconds=30, **processes)


def _leave_last_words() -> None:
    """Has a shell say why, should this process be aborted: it waits for a line that only an orderly exit writes."""
    script = 'read -r line || echo "error: $0" >&2'
    shell = subprocess.Popen(["sh", "-c", script, LOST], stdin=subprocess.PIPE, start_new_session=True)
    _goodbyes.append(lambda: shell.communicate(b"\n"))
    atexit.register(_say_goodbye)


_goodbyes: list[Callable[[], Any]] = []


def _say_goodbye() -> None:
    while _goodbyes:
        _goodbyes.pop()()


def leave(status: int) -> NoReturn:
    """Ends this process at once, whatever its other threads do."""
    _say_goodbye()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends this process at once, with one line, if it fails or loses the others: they wait for it, or it for them."""
    try:
        yield
    except BaseException as error:
        orderly = isinstance(error, SystemExit) and error.code != 1
        if orderly or jax.process_count() == 1:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        leave(1)  # an orderly exit would wait for the others for minutes


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turns what a failed collective raises, whose type depends on the backend, into a TrainingError."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if jax.process_count() > 1 and any(word in str(error) for word in ("Gloo", "NCCL", "UNAVAILABLE", "ABORTED")):
            raise TrainingError(LOST) from error
        raise
