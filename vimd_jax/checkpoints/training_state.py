"""The latest state of a run, to continue from, through Orbax.

    workdir/checkpoints/<step>/state      parameters, optimiser state, averages, step: everything that training changes

Writing is asynchronous. A checkpoint counts only once it is whole, so a kill while writing leaves the one before.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vimd_jax.checkpoints.network import CheckpointError


def open_folder(directory: Path) -> ocp.CheckpointManager:
    """A folder of checkpoints that keeps the newest; the one before it stays until the newest is whole."""
    return ocp.CheckpointManager(directory.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=1))


def save_state(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Starts to write the training state; does nothing if this step is already there.

    Raises:
      CheckpointError: this or the write before it failed, as on a full disk.
    """
    with _writing(manager):
        if manager.latest_step() == step:
            return
        manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(_arrays(state))))


def restore_state(manager: ocp.CheckpointManager, state: Any) -> Any | None:
    """The latest state, shaped like `state`; None if there is none yet."""
    step = manager.latest_step()
    if step is None:
        return None
    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_arrays(state)))).state


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits until everything is written; raises as `save_state`."""
    with _writing(manager):
        manager.wait_until_finished()
    manager.close()


def _arrays(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


@contextlib.contextmanager
def _writing(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns whatever goes wrong while writing (Orbax and TensorStore have no common error) into one line."""
    try:
        yield
    except Exception as error:
        cause = str(error).split(": ")[-1]
        raise CheckpointError(
            f"A checkpoint could not be written to {manager.directory}: {cause}. Make room there; the same command "
            f"continues from step {manager.latest_step() or 0}, the last whole one."
        ) from error
