"""Trains a network: `python -m vimd_jax.train --config configs/student_cub.py --workdir DIR [--config.field=value]`.

The same command, given again, continues where the last one stopped. A workdir holds

    config.json      every setting of the run          classes.txt   the class names, one per line
    metrics.jsonl    one JSON object per line          tensorboard/  the same as TensorBoard events
    checkpoints/     the latest training state         best/         the best network, for evaluate and predict
    curves.png       losses, scores, learning rate     panel.png     images with the network's predictions

This file tells the story of a run. Its words are defined in vimd_jax/training/: workdirs, networks (what is trained),
steps (what a step computes), optimizer, parallel (devices), evaluation, metrics, plots; and in vimd_jax/checkpoints/.
"""

import logging
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from vimd_jax.checkpoints import training_state
from vimd_jax.checkpoints.network import TrainedModel, load_model, read_description, save_model
from vimd_jax.command import CONFIG, WORKDIR, StopRequest, run, show_log
from vimd_jax.config import check_ranges
from vimd_jax.data.pipeline import check_config, steps_per_epoch, train_batches
from vimd_jax.data.sources import Source, load_source
from vimd_jax.log import readable_errors
from vimd_jax.training import networks, parallel, plots, steps, workdirs
from vimd_jax.training.evaluation import evaluate, save_panel
from vimd_jax.training.metrics import MetricWriter, Progress, read_metrics
from vimd_jax.training.optimizer import create_optimizer, create_schedule

log = logging.getLogger("vimd_jax.train")

_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0, to train on several hosts.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With coordinator_address: how many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With coordinator_address: which one this is, from 0.")


class Data(NamedTuple):
    """The three splits of a run; `held_out` picks the best network."""

    train: Source
    held_out: Source
    test: Source


def check(config: ConfigDict, workdir: Path, made_before: set[Path] = frozenset()) -> Data:
    """Finds everything that can be wrong with the settings of a stage before anything is computed, and its data.

    Args:
      config: of one stage.
      workdir: its folder.
      made_before: workdirs that earlier stages of the same command make.

    Raises:
      ValueError, FileNotFoundError, DatasetError: one line that names the field and the remedy.
    """
    check_ranges(config)
    check_config(config.dataset)
    parallel.check_batch_size("batch_size", config.batch_size)
    parallel.check_batch_size("eval_batch_size", config.eval_batch_size)
    splits = ("train", config.selection, "test")
    data = Data(*(load_source(config.dataset, split, seed=config.seed) for split in splits))
    create_schedule(config.schedule, steps_per_epoch(data.train, config.dataset, config.batch_size))
    steps.check_objective(config, networks.build_networks(config, len(data.train.class_names)))
    networks.check_sources_of_weights(config, made_before)
    workdirs.check(workdir, config, data.train.class_names)
    return data


def train(config: ConfigDict, workdir: Path, data: Data | None = None) -> None:
    """Runs one stage from its start, or from its latest checkpoint, to its end.

    Args:
      config: of one stage.
      workdir: its folder.
      data: what `check` returned, where that is done already.

    Raises:
      ValueError, FileNotFoundError, DatasetError: see `check`.
      TrainingError: the loss is no longer finite. The latest checkpoint is from before that.
    """
    # 1. The request: its data, and the folder that now belongs to it.
    data = data or check(config, workdir)
    class_names = data.train.class_names
    workdirs.claim(workdir, config, class_names)

    # 2. The trained network, the frozen networks around it, the optimiser.
    nets = networks.build_networks(config, len(class_names))
    variables, frozen = networks.initial_variables(config, nets)
    epoch_steps = steps_per_epoch(data.train, config.dataset, config.batch_size)
    total_steps = epoch_steps * config.schedule.num_epochs
    schedule = create_schedule(config.schedule, epoch_steps)
    optimizer = create_optimizer(config.optimizer, variables["params"], schedule, nets.trained.decays)
    state = steps.create_state(config, variables, optimizer)
    log.info(
        "Stage %s: %s parameters, %d images of %d classes, %d epochs of %d steps, %d devices.",
        config.stage, f"{networks.count(state.params):,}", len(data.train), len(class_names),
        config.schedule.num_epochs, epoch_steps, jax.device_count(),
    )  # fmt: skip

    # 3. The latest checkpoint, if there is one.
    latest = training_state.open_folder(workdir / "checkpoints")
    state = training_state.restore_state(latest, state) or state
    first_step = int(state.step)
    if first_step:
        log.info("Continuing from step %d.", first_step)

    # 4. The steps.
    train_step = steps.make_train_step(config, nets, optimizer)
    eval_step = steps.make_eval_step(nets)
    batches = train_batches(
        data.train, config.dataset, batch_size=config.batch_size, seed=config.seed, start_step=first_step,
        views=nets.views, process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    state, replicated_frozen = parallel.replicate(state), parallel.replicate(frozen)
    writer = MetricWriter(workdir, epoch_steps, first_step)
    progress = Progress(total_steps, epoch_steps, config.batch_size)
    stop, step = StopRequest(), first_step
    for step in range(first_step + 1, total_steps + 1):
        began = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - began
        state, metrics = train_step(state, replicated_frozen, parallel.shard(batch))
        names = [data.train.name(index) for index in batch["index"]]
        progress.add(step, metrics, names, int(batch["skipped"].sum()), waited)

        epoch_ends = step % (config.eval_every_epochs * epoch_steps) == 0 or step == total_steps
        stopping = parallel.any_process(stop.requested)
        if step % config.log_every_steps == 0 or step == total_steps:
            writer.write(step, "train", progress.summary(step, float(schedule(step - 1))))
        with progress.pause():
            if epoch_ends:
                progress.flush()
                trained = parallel.fetch(steps.trained_variables(config, state))
                variables = nets.product_variables(trained, frozen)
                title = config.selection
                scores = evaluate(eval_step, parallel.replicate(variables), data.held_out, config, title)
                writer.write(step, config.selection, scores.summary())
                save_if_best(workdir, config, nets, variables, class_names, step, scores.score)
            if epoch_ends or stopping or step % config.checkpoint_every_steps == 0:
                progress.flush()
                training_state.save_state(latest, step, parallel.fetch(state))
        if stopping:
            break
    training_state.finish(latest)
    if step < total_steps:
        log.info("Stopped after step %d of %d and saved it; the same command continues.", step, total_steps)
        raise SystemExit(0)

    # 5. What came out: the best network on the test images, the curves, a panel to look at.
    best = load_model(workdir)
    best_step = best.provenance["step"]
    title = f"test, network of step {best_step}"
    scores = evaluate(eval_step, parallel.replicate(best.variables), data.test, config, title)
    writer.write(total_steps, "test", {**scores.summary(), "best_step": best_step})
    writer.close()
    if jax.process_index() == 0:
        plots.save_curves(read_metrics(workdir), workdir / "curves.png")
        save_panel(config, nets, best.variables, data.test, workdir / "panel.png")
    log.info("Done. %s holds the best network, curves.png and panel.png.", workdir)


def save_if_best(
    workdir: Path,
    config: ConfigDict,
    nets: networks.Networks,
    variables: dict,
    class_names: tuple[str, ...],
    step: int,
    score: float,
) -> None:
    """Writes the network to best/ unless the one that is there scored as well."""
    folder = workdir / "best"
    if jax.process_index() != 0:
        return
    if (folder / "network.json").exists() and score <= read_description(folder)["provenance"]["score"]:
        return
    provenance = {"library": f"vimd_jax {version('vimd-jax')}", "stage": config.stage, "step": step, "score": score}
    save_model(
        folder,
        TrainedModel(
            nets.product,
            variables,
            class_names if config.stage != "sr" else (),
            low_resolution=config.dataset.low_resolution if nets.reads_low else 0,
            crop=config.dataset.eval_crop,
            provenance=provenance,
        ),
    )


def main(_: list[str]) -> None:
    """Trains what the config asks for: one stage, or several in a row, all of them checked first."""
    show_log()
    with readable_errors():
        if _COORDINATOR.value:
            jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        stages = workdirs.stages(CONFIG.value, Path(WORKDIR.value))
        made_before, checked = set(), []
        for config, workdir in stages:
            with workdirs.naming_the_stage(config, len(stages)):
                checked.append(check(config, workdir, made_before))
            made_before.add(workdir.resolve())
        for (config, workdir), data in zip(stages, checked):
            train(config, workdir, data)


if __name__ == "__main__":
    run(main)
