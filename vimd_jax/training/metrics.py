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
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from vimd_jax.errors import TrainingError
from vimd_jax.files import open_regular, replace_file
from vimd_jax.log import extra, warn_once
from vimd_jax.training import parallel

log = logging.getLogger(__name__)


NOT_A_TERM = ("loss", "gradient_norm", "parameter_norm")  # metrics of a step that are no term of its loss


class MetricWriter:
    """Appends to workdir/metrics.jsonl, one object a line, and to TensorBoard events in workdir/tensorboard.

    A context, which ends the event file.

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
        self._events = _Events(workdir / "tensorboard")
        for line in kept:
            self._events.add(line["step"], line["split"], line["metrics"])

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Records the metrics of a split ("train", "validation", "test") after `step` steps."""
        if not self._speaks:
            return
        epoch = round(step / self._steps_per_epoch, 3)
        line = json.dumps({"step": step, "epoch": epoch, "split": split, "metrics": metrics}) + "\n"
        try:
            with self._path.open("a") as file:
                file.write(line)
        except OSError as error:
            raise TrainingError(
                f"{self._path} cannot be written ({error.strerror}): make room there; the same command continues."
            ) from error
        self._events.add(step, split, metrics)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._speaks:
            self._events.close()


class _Events:
    """A file of TensorBoard events, written anew; given up, with a warning, if that fails.

    Written in this thread: in one of its own, as tensorboardX's SummaryWriter has, an error would be lost and the run
    would then wait for that thread for ever.
    """

    def __init__(self, folder: Path):
        self._writer: EventsWriter | None = None
        with extra(f"TensorBoard events in {folder}"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._folder, self._writer = folder, EventsWriter(str(folder / "events"))

    def add(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Adds the metrics of a split."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        with extra(f"TensorBoard events in {self._folder}"):
            for name, value in metrics.items():
                summary = scalar(f"{split}/{name}", value)
                writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            writer.flush()
            self._writer = writer
        if self._writer is None:
            with contextlib.suppress(Exception):
                writer.close()

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            with extra(f"TensorBoard events in {self._folder}"):
                self._writer.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of workdir/metrics.jsonl; one that a kill cut short or that is damaged is left out."""
    path, lines = workdir / "metrics.jsonl", []
    if not path.exists():
        return lines
    with open_regular(path) as file:
        content = file.read()
    for number, text in enumerate(content.splitlines(), 1):
        if (line := _line(text)) is not None:
            lines.append(line)
        else:
            warn_once(f"{path}: line {number} is damaged and left out.")
    return lines


def _line(text: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None if it is damaged."""
    try:
        line = json.loads(text)
        numbers = [line["step"], line["epoch"], *line["metrics"].values()]
        whole = isinstance(line["split"], str) and all(isinstance(x, int | float) for x in numbers)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return line if whole else None


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
