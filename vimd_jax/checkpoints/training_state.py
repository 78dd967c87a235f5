"""The latest states of a run, to continue from, through Orbax.

    workdir/checkpoints/<step>/arrays     parameters, optimiser state, averages, step: everything that training changes
    workdir/checkpoints/<step>/record     what the host remembers beside them, and the checksum of both

A checkpoint counts only once it is whole, so a kill while writing leaves the one before. That one is kept until the
next is written, in case the disk damages the latest. Of several processes only the first one opens the folder.
"""

import contextlib
import errno
import json
import logging
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vimd_jax.checkpoints.format import check_finite, checksum_of
from vimd_jax.errors import CheckpointError, printable

log = logging.getLogger(__name__)

_CHECKSUM = "sha256"  # in a record


def open_folder(directory: Path) -> ocp.CheckpointManager:
    """A folder of checkpoints that keeps the newest two."""
    directory.mkdir(parents=True, exist_ok=True)
    return ocp.CheckpointManager(
        directory.resolve(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=2,
            create=False,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}),
        ),
    )


def save_state(manager: ocp.CheckpointManager, step: int, state: Any, record: dict[str, Any]) -> None:
    """Writes the training state and a record of JSON values; does nothing if this step is already there.

    Raises:
      CheckpointError: a value is not finite, or the write failed, as on a full disk; earlier checkpoints stay.
    """
    if step in manager.all_steps():
        return
    leaves = _leaves(state)
    check_finite(leaves, f"the training state of step {step}")
    record = json.loads(json.dumps(record))
    record |= {_CHECKSUM: checksum_of(leaves, record)}
    arrays = jax.tree.map(np.asarray, state)
    try:
        _check_space(manager.directory, sum(leaf.nbytes for leaf in leaves.values()))
        with _without_tracebacks():
            manager.save(
                step,
                args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)),
            )
    except Exception as error:  # Orbax and TensorStore have no common error
        raise CheckpointError(
            f"A checkpoint could not be written to {manager.directory}: {_cause(error)}. Make room there; the same "
            f"command continues from step {manager.latest_step() or 0}."
        ) from error


def restore_state(manager: ocp.CheckpointManager, state: Any) -> tuple[Any, dict[str, Any]]:
    """The latest whole state, shaped like `state`, and its record; `state` itself and {} if there is none yet.

    Raises:
      CheckpointError: there are checkpoints, but none can be read.
    """
    damaged = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            restored = _restore(manager, step, state)
        except Exception as error:  # see save_state
            damaged[step] = _cause(error)
            continue
        for other, cause in damaged.items():
            aside = manager.directory.parent / f"damaged-checkpoint-{other}"
            shutil.rmtree(aside, ignore_errors=True)
            shutil.move(manager.directory / str(other), aside)
            log.warning("Checkpoint %d of %s cannot be read (%s); moved to %s.", other, manager.directory, cause, aside)
        if damaged:
            manager.reload()
        return restored
    if damaged:
        causes = "; ".join(f"step {step}: {cause}" for step, cause in damaged.items())
        raise CheckpointError(
            f"No checkpoint in {manager.directory} can be read ({causes}). Delete that folder to start over."
        )
    return state, {}


def _restore(manager: ocp.CheckpointManager, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
    arrays = ocp.args.StandardRestore(jax.tree.map(np.asarray, state))
    restored = manager.restore(step, args=ocp.args.Composite(arrays=arrays, record=ocp.args.JsonRestore()))
    record, leaves = restored.record, _leaves(restored.arrays)
    if "checksum" in record:  # of an earlier version, over the arrays alone
        intact = record.pop("checksum") == checksum_of(leaves)
    else:
        intact = record.pop(_CHECKSUM, None) == checksum_of(leaves, record)
    if not intact:
        raise CheckpointError("its checksum differs")
    return restored.arrays, record


def _leaves(state: Any) -> dict[str, np.ndarray]:
    """Path → array of every leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def _check_space(folder: Any, needed: int) -> None:
    """Raises OSError if a file system is too full, before TensorStore finds out with half of the files written."""
    space = shutil.disk_usage(folder)
    if space.free < needed and space.total:  # some network file systems report zeros
        raise OSError(errno.ENOSPC, f"No space left on device, {needed:,} bytes are needed and {space.free:,} are free")


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keeps the threads of Orbax and TensorStore from showing what is raised anyway, unless details are asked for.

    Those of TensorStore still do so after a failure, from which there is no way back then.
    """
    logger = logging.getLogger("absl")
    if logger.isEnabledFor(logging.DEBUG):
        yield
        return
    level, hook = logger.level, sys.excepthook
    logger.setLevel(logging.CRITICAL)

    def show(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if str(error) != "Event loop is closed":
            hook(kind, error, trace)

    sys.excepthook = show
    try:
        yield
    finally:
        logger.setLevel(level)
    sys.excepthook = hook


def _cause(error: Exception) -> str:
    """The last part of a message of TensorStore, which begins with paths of its own."""
    text = re.sub(r" \[\w+='[^']*'\]", "", " ".join(str(error).split()))
    return printable(text.split(": ")[-1]) or type(error).__name__
