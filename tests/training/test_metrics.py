"""The log of a run that is interrupted reads like the log of one that is not."""

import jax
import jax.numpy as jnp
import pytest

from vimd_jax.errors import TrainingError
from vimd_jax.training.metrics import MetricWriter, Progress, read_metrics


def split_and_step(workdir):
    return [(line["split"], line["step"]) for line in read_metrics(workdir)]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_resumed_log_drops_what_comes_again(tmp_path, split):
    writer = MetricWriter(tmp_path, 4, 0, 0)
    for step in range(1, 9):
        writer.write(step, "train", {"loss": 1.0})
        if step % 4 == 0:
            writer.write(step, split, {"top1": 5.0})
    writer.write(8, "test", {"top1": 4.0, "best_step": 8})
    writer.close()
    MetricWriter(tmp_path, 4, 6, 4).close()
    trained = [("train", step) for step in range(1, 7)]
    assert split_and_step(tmp_path) == [*trained[:4], (split, 4), *trained[4:]]
    MetricWriter(tmp_path, 4, 4, 0).close()  # stopped in the evaluation after step 4
    assert split_and_step(tmp_path) == trained[:4]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    MetricWriter(tmp_path, 4, 0, 0).write(1, "train", {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "epo')
    MetricWriter(tmp_path, 4, 1, 0).write(2, "train", {"loss": 2.0})
    assert split_and_step(tmp_path) == [("train", 1), ("train", 2)]


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
