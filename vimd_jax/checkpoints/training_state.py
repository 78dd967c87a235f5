"""Checkpoints of a run, through Orbax: the latest state, to continue from, and the best network, to use.

    workdir/checkpoints/<step>/state      parameters, optimiser state, averages, step: everything that training changes
    workdir/best/<step>/variables         the network alone, as `evaluate` and `predict` load it
    workdir/best/<step>/metrics           its score

Writing is asynchronous. A checkpoint counts only once it is whole, so a kill while writing leaves the one before.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vimd_jax.training import TrainingError


def open_folder(directory: Path) -> ocp.CheckpointManager:
    """A folder of checkpoints that keeps the newest; the one before it stays until the newest is whole."""
    return ocp.CheckpointManager(directory.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=1))


def save_state(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Starts to write the training state; does nothing if this step is already there.

    Raises:
      TrainingError: this or the write before it failed, as on a full disk.
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


def save_best(manager: ocp.CheckpointManager, step: int, variables: Any, score: float) -> None:
    """Starts to write the network that scored best so far; raises as `save_state`."""
    with _writing(manager):
        if manager.latest_step() == step:
            return
        items = {"variables": ocp.args.StandardSave(_arrays(variables)), "metrics": ocp.args.JsonSave({"score": score})}
        manager.save(step, args=ocp.args.Composite(**items))


def best_score(manager: ocp.CheckpointManager) -> float:
    """The score of the best network so far; minus infinity if there is none yet."""
    step = manager.latest_step()
    if step is None:
        return -np.inf
    return manager.restore(step, args=ocp.args.Composite(metrics=ocp.args.JsonRestore())).metrics["score"]


def finish(*managers: ocp.CheckpointManager) -> None:
    """Waits until everything is written; raises as `save_state`."""
    for manager in managers:
        with _writing(manager):
            manager.wait_until_finished()
        manager.close()


def load_best(workdir: Path) -> tuple[int, Any]:
    """Step and variables of the best network of a run.

    Raises:
      FileNotFoundError: the folder holds no finished checkpoint.
    """
    if not (workdir / "best").is_dir():
        raise FileNotFoundError(
            f"{workdir} holds no checkpoint of a run (no folder {workdir / 'best'}): train one first."
        )
    with open_folder(workdir / "best") as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(
                f"{workdir / 'best'} holds no finished checkpoint: train longer, until an evaluation."
            )
        return step, manager.restore(step, args=ocp.args.Composite(variables=ocp.args.StandardRestore())).variables


def _arrays(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


@contextlib.contextmanager
def _writing(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns whatever goes wrong while writing (Orbax and TensorStore have no common error) into one line."""
    try:
        yield
    except Exception as error:
        cause = str(error).split(": ")[-1]
        raise TrainingError(
            f"A checkpoint could not be written to {manager.directory}: {cause}. Make room there; the same command "
            f"continues from step {manager.latest_step() or 0}, the last whole one."
        ) from error
