"""Trains a network: `python -m vimd_jax.train --config configs/student_cub.py --workdir DIR [--config.field=value]`.

The same command, given again, continues where the last one stopped. A workdir holds

    config.json      every setting of the run          classes.txt   the class names, a line each
    metrics.jsonl    one JSON object a line            tensorboard/  the same as TensorBoard events
    checkpoints/     the latest training state         best/         the best network, for evaluate and predict
    curves.png       losses, scores, learning rate     panel.png     pictures with what the network says of them

This file tells the story of a run. Its words are defined in vimd_jax/training/: workdirs, networks (what is trained),
steps (what a step computes), optimizer, parallel (devices), checkpoints, evaluation, metrics, plots.
"""

import logging
import time
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict

from vimd_jax.command import CONFIG, WORKDIR, StopRequest, readable_errors, show_log
from vimd_jax.data import load_source, steps_per_epoch, train_batches
from vimd_jax.training import checkpoints, networks, parallel, plots, steps, workdirs
from vimd_jax.training.evaluation import evaluate, save_panel
from vimd_jax.training.metrics import MetricWriter, Progress, read_metrics
from vimd_jax.training.optimizer import create_optimizer, create_schedule

log = logging.getLogger("vimd_jax.train")

_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0, to train on several hosts.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With coordinator_address: how many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With coordinator_address: which one this is, from 0.")


def train(config: ConfigDict, workdir: Path) -> None:
    """Runs one stage ("sr", "teacher" or "student") from its start, or from its latest checkpoint, to its end.

    Raises:
      ValueError, FileNotFoundError, DatasetError: the request cannot be met; found before anything is compiled.
      TrainingError: the loss is no longer finite. The latest checkpoint is from before that.
    """
    # 1. Everything that can be wrong with the request.
    networks.check_resolutions(config)
    parallel.check_batch_size("batch_size", config.batch_size)
    parallel.check_batch_size("eval_batch_size", config.eval_batch_size)
    pictures = load_source(config.dataset, "train", seed=config.seed)
    held_out = load_source(config.dataset, config.selection, seed=config.seed)
    test = load_source(config.dataset, "test", seed=config.seed)
    workdirs.claim(workdir, config, pictures.class_names)

    # 2. The network, the frozen networks around it, the optimiser.
    num_classes = len(pictures.class_names)
    network = networks.build_network(config, num_classes)
    teacher = networks.build_teacher(config, num_classes) if steps.distils(config) else None
    params, batch_stats, frozen = networks.initial_weights(config, network, teacher)
    epoch_steps = steps_per_epoch(pictures, config.dataset, config.batch_size)
    total_steps = epoch_steps * config.schedule.num_epochs
    schedule = create_schedule(config.schedule, epoch_steps)
    optimizer = create_optimizer(config.optimizer, params, schedule)
    state = steps.create_state(config, params, batch_stats, optimizer)
    log.info(
        "Stage %s: %s parameters, %d pictures of %d classes, %d epochs of %d steps, %d devices.",
        config.stage, f"{networks.count(params):,}", len(pictures), num_classes,
        config.schedule.num_epochs, epoch_steps, jax.device_count(),
    )  # fmt: skip

    # 3. The latest checkpoint, if there is one.
    latest, best = checkpoints.open_folder(workdir / "checkpoints"), checkpoints.open_folder(workdir / "best")
    state = checkpoints.restore_state(latest, state) or state
    first_step = int(state.step)
    if first_step:
        log.info("Continuing from step %d.", first_step)

    # 4. The steps.
    train_step = steps.make_train_step(config, network, teacher, optimizer)
    eval_step = steps.make_eval_step(config, network)
    batches = train_batches(
        pictures, config.dataset, batch_size=config.batch_size, seed=config.seed, start_step=first_step,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    state, frozen = parallel.replicate(state), parallel.replicate(frozen)
    writer = MetricWriter(workdir, epoch_steps, first_step)
    progress = Progress(total_steps, epoch_steps, config.batch_size)
    stop, step = StopRequest(), first_step
    for step in range(first_step + 1, total_steps + 1):
        began = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - began
        state, metrics = train_step(state, frozen, parallel.shard(batch))
        names = [pictures.name(index) for index in batch["index"]]
        progress.add(step, metrics, names, int(batch["skipped"].sum()), waited)

        epoch_ends = step % (config.eval_every_epochs * epoch_steps) == 0 or step == total_steps
        stopping = parallel.any_process(stop.requested)
        if step % config.log_every_steps == 0 or step == total_steps:
            writer.write(step, "train", progress.summary(step, float(schedule(step - 1))))
        with progress.pause():
            if epoch_ends:
                progress.flush()
                variables = steps.inference_variables(config, state, frozen)
                scores = evaluate(eval_step, variables, held_out, config, config.selection)
                writer.write(step, config.selection, scores.summary())
                if scores.score > checkpoints.best_score(best):
                    checkpoints.save_best(best, step, parallel.fetch(variables), scores.score)
            if epoch_ends or stopping or step % config.checkpoint_every_steps == 0:
                progress.flush()
                checkpoints.save_state(latest, step, parallel.fetch(state))
        if stopping:
            break
    checkpoints.finish(latest, best)
    if step < total_steps:
        log.info("Stopped after step %d of %d and saved it; the same command continues.", step, total_steps)
        raise SystemExit(0)

    # 5. What came out: the best network on the test pictures, the curves, a panel to look at.
    best_step, variables = checkpoints.load_best(workdir)
    scores = evaluate(eval_step, parallel.replicate(variables), test, config, f"test, network of step {best_step}")
    writer.write(total_steps, "test", {**scores.summary(), "best_step": best_step})
    writer.close()
    if jax.process_index() == 0:
        plots.save_curves(read_metrics(workdir), workdir / "curves.png")
        save_panel(config, network, variables, test, workdir / "panel.png")
    log.info("Done. %s holds the best network, curves.png and panel.png.", workdir)


def main(_: list[str]) -> None:
    """Trains what the config asks for: one stage, or several in a row."""
    show_log()
    with readable_errors():
        if _COORDINATOR.value:
            jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        for config, workdir in workdirs.stages(CONFIG.value, Path(WORKDIR.value)):
            train(config, workdir)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
