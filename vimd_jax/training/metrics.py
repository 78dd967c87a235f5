"""Progress of a run: lines to read, metrics.jsonl, TensorBoard events."""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from vimd_jax.errors import TrainingError
from vimd_jax.files import replace_file
from vimd_jax.training import parallel

log = logging.getLogger(__name__)


NOT_A_TERM = ("loss", "gradient_norm", "parameter_norm")  # metrics of a step that are no term of its loss


class MetricWriter:
    """Appends to workdir/metrics.jsonl, one object a line, and to TensorBoard events in workdir/tensorboard.

    Lines that an interrupted run wrote after `resumed_step` are dropped first, since those steps are run again. The
    events are written again from the lines that stay.
    """

    def __init__(self, workdir: Path, steps_per_epoch: int, resumed_step: int, evaluated_step: int):
        """Opens the files.

        Args:
          workdir: of the run.
          steps_per_epoch: optimiser steps in an epoch.
          resumed_step: the step that the run continues from.
          evaluated_step: the last one whose evaluation is done.
        """
        self._path = workdir / "metrics.jsonl"
        self._steps_per_epoch = steps_per_epoch
        self._speaks = parallel.is_first()
        if not self._speaks:
            return
        kept = [
            line
            for line in read_metrics(workdir)
            if line["step"] <= (resumed_step if line["split"] == "train" else evaluated_step)
            and "best_step" not in line["metrics"]  # the last line, which is written again
        ]
        replace_file(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        shutil.rmtree(workdir / "tensorboard", ignore_errors=True)
        self._events = SummaryWriter(str(workdir / "tensorboard"))
        for line in kept:
            self._add_events(line["step"], line["split"], line["metrics"])

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Records the metrics of a split ("train", "validation", "test") after `step` steps."""
        if not self._speaks:
            return
        epoch = round(step / self._steps_per_epoch, 3)
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "epoch": epoch, "split": split, "metrics": metrics}) + "\n")
        self._add_events(step, split, metrics)
        self._events.flush()

    def _add_events(self, step: int, split: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._events.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Ends the event file."""
        if self._speaks:
            self._events.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of workdir/metrics.jsonl; a last line that a kill cut short is left out."""
    path, lines = workdir / "metrics.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Progress:
    """Averages metrics between two lines of the log and watches that they stay finite.

    The metrics of a step are read one step later, so that the devices work on while the host looks.
    """

    def __init__(self, total_steps: int, steps_per_epoch: int, batch_size: int, record: dict[str, Any]):
        """Begins, or continues where the `record` of a checkpoint left off."""
        self._total_steps, self._steps_per_epoch, self._batch_size = total_steps, steps_per_epoch, batch_size
        self._pending: tuple[int, Any, list[str]] | None = None
        self._restart_window()
        self._window: list[dict[str, float]] = record.get("window", [])
        self.skipped = record.get("skipped", 0)

    def record(self) -> dict[str, Any]:
        """The state to save in a checkpoint, so that the next line of the log averages over all its steps."""
        self.flush()
        return {"window": self._window, "skipped": self.skipped}

    def add(self, step: int, metrics: Any, names: list[str], skipped: int, input_wait: float) -> None:
        """Takes the (unread) metrics of a step, the file names of its batch, and the seconds it waited for them.

        Raises:
          TrainingError: the step before this one had a loss that is not finite.
        """
        self.flush()
        self._pending = step, metrics, names
        self.skipped += skipped
        self._input_wait += input_wait

    def flush(self) -> None:
        """Reads the metrics that are still on the devices; raises TrainingError if they are not finite."""
        if self._pending is None:
            return
        step, metrics, names = self._pending
        self._pending = None
        values = {name: float(value.addressable_data(0)[0]) for name, value in metrics.items()}
        if not all(np.isfinite(value) for value in values.values()):
            terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            raise TrainingError(
                f"The loss or the weights are not finite at step {step} ({terms}). Images of the batch: "
                f"{', '.join(names)}. Checkpoints from before are intact; a lower config.schedule.learning_rate or a "
                "config.optimizer.clip_norm may help."
            )
        self._window.append(values)
        self._timed += 1

    def summary(self, step: int, learning_rate: float) -> dict[str, float]:
        """Means since the last summary; logs them in one line."""
        self.flush()
        means = {name: float(np.mean([values[name] for values in self._window])) for name in self._window[0]}
        seconds = time.perf_counter() - self._start
        pace = seconds / max(self._timed, 1)
        means |= {
            "learning_rate": learning_rate,
            "images_per_second": self._batch_size / pace,
            "input_wait": self._input_wait / seconds,
        }
        terms = ", ".join(f"{name} {means[name]:.4f}" for name in self._window[0] if name not in NOT_A_TERM)
        log.info(
            "epoch %.2f  step %d/%d  loss %.4f (%s)  lr %.2e  %.0f img/s  input wait %.0f %%  %s left%s",
            step / self._steps_per_epoch, step, self._total_steps, means["loss"], terms, learning_rate,
            means["images_per_second"], 100 * means["input_wait"], duration(pace * (self._total_steps - step)),
            f"  {self.skipped} unreadable images replaced" if self.skipped else "",
        )  # fmt: skip
        self._restart_window()
        return means

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """A context whose time does not count as training time (an evaluation, say)."""
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began

    def _restart_window(self) -> None:
        self._window = []
        self._timed = 0  # steps of the window that this process has run
        self._input_wait = 0.0
        self._start = time.perf_counter()


def duration(seconds: float) -> str:
    """Seconds as text: "45 s", "3 min 20 s", "5 h 12 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
