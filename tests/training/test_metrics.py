"""The log of a run that is interrupted reads like the log of one that is not."""

import os

import jax
import jax.numpy as jnp
import pytest

from vimd_jax.errors import TrainingError
from vimd_jax.training import metrics as metrics_module
from vimd_jax.training.metrics import MetricWriter, Progress, read_metrics


def split_and_step(workdir):
    return [(line["split"], line["step"]) for line in read_metrics(workdir)]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_resumed_log_drops_what_comes_again(tmp_path, split):
    with MetricWriter(tmp_path, 4, 0, 0) as writer:
        for step in range(1, 9):
            writer.write(step, "train", {"loss": 1.0})
            if step % 4 == 0:
                writer.write(step, split, {"top1": 5.0})
        writer.write(8, "test", {"top1": 4.0, "best_step": 8})
    reopen(tmp_path, 6, 4)
    trained = [("train", step) for step in range(1, 7)]
    assert split_and_step(tmp_path) == [*trained[:4], (split, 4), *trained[4:]]
    reopen(tmp_path, 4, 0)  # stopped in the evaluation after step 4
    assert split_and_step(tmp_path) == trained[:4]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def reopen(workdir, resumed_step, evaluated_step):
    with MetricWriter(workdir, 4, resumed_step, evaluated_step):
        pass


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    with MetricWriter(tmp_path, 4, 0, 0) as writer:
        writer.write(1, "train", {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "epo')
    with MetricWriter(tmp_path, 4, 1, 0) as writer:
        writer.write(2, "train", {"loss": 2.0})
    assert split_and_step(tmp_path) == [("train", 1), ("train", 2)]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[1]", b"null", b"\xff\x00", b'{"step": 2}', b'{"step": "a"}'], ids=repr
)
def test_a_damaged_line_costs_that_line_alone(tmp_path, damage):
    with MetricWriter(tmp_path, 4, 0, 0) as writer:
        for step in (1, 2, 3):
            writer.write(step, "train", {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    first, _, last = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, damage, last, b""]))
    reopen(tmp_path, 3, 0)
    assert split_and_step(tmp_path) == [("train", 1), ("train", 3)]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="not a regular file"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("when", ["start", "later"])
def test_event_files_never_stop_a_run(tmp_path, monkeypatch, caplog, when):
    if when == "start":
        (tmp_path / "tensorboard").symlink_to("/dev/null")
    with MetricWriter(tmp_path, 4, 0, 0) as writer:
        monkeypatch.setattr(metrics_module, "scalar", None)
        writer.write(1, "train", {"loss": 1.0})
        writer.write(2, "train", {"loss": 1.0})
    assert split_and_step(tmp_path) == [("train", 1), ("train", 2)]
    assert len([line for line in caplog.messages if "TensorBoard events in" in line]) == 1


def metrics(loss):
    return {"loss": jax.device_put(jnp.array([loss]))}


def test_the_first_line_after_a_resume_averages_over_all_its_steps():
    whole = Progress(10, 5, 8, {})
    first = Progress(10, 5, 8, {})
    for step in (1, 2):
        whole.add(step, metrics(step), [], 1, 0.0)
        first.add(step, metrics(step), [], 1, 0.0)
    second = Progress(10, 5, 8, first.record())
    for progress in (whole, second):
        progress.add(3, metrics(9), [], 0, 0.0)
    assert whole.summary(3, 0.1)["loss"] == second.summary(3, 0.1)["loss"] == 4
    assert second.skipped == 2


def test_ruined_weights_are_found_at_once():
    progress = Progress(10, 5, 8, {})
    progress.add(4, metrics(1.0) | {"parameter_norm": jnp.array([jnp.inf])}, ["a.jpg"], 0, 0.0)
    with pytest.raises(TrainingError, match="not finite at step 4 .*parameter_norm inf.*a.jpg"):
        progress.flush()
