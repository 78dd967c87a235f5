"""Trains a network: `python -m vimd_jax.train --config configs/student_cub.py --workdir DIR [--config.field=value]`.

The same command, given again, continues where the last one stopped. A workdir holds

    config.json      every setting of the run          classes.txt   the class names, one per line
    metrics.jsonl    one JSON object per line          tensorboard/  the same as TensorBoard events
    checkpoints/     the latest training states        best/         the best network, for evaluate and predict
    curves.png       losses, scores, learning rate     panel.png     images with the network's predictions
    data.json        how many images of which names    networks.json where frozen networks came from, and checksums
    report.html      the finished run on one page

This file tells the story of a run. Its words are defined in vimd_jax/tasks/ (what is learned), vimd_jax/training/:
workdirs, roles (the networks), steps, optimizer, parallel (devices), evaluation, metrics, plots; and in
vimd_jax/checkpoints/.
"""

import contextlib
import logging
import math
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

import kernels
from kernels.choice import implementation_in_use
from vimd_jax import __version__, report
from vimd_jax.checkpoints import training_state
from vimd_jax.checkpoints.format import checksum_of, read_description, save_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.command import StopRequest, is_given, run, show_log
from vimd_jax.config import check_settings
from vimd_jax.data.augment import check_augment
from vimd_jax.data.pipeline import steps_per_epoch, train_batches
from vimd_jax.data.sources import Source, Splits, check_readable, load_source
from vimd_jax.errors import Stopped, TrainingError
from vimd_jax.evaluate import Measurement
from vimd_jax.load import load_model
from vimd_jax.log import extra, readable_errors
from vimd_jax.memory import give_back
from vimd_jax.tasks.task import check_source
from vimd_jax.training import hidden_map, parallel, plots, roles, steps, workdirs
from vimd_jax.training.evaluation import check_restorer, evaluate, passes, save_panel
from vimd_jax.training.metrics import MetricWriter, Progress, read_metrics
from vimd_jax.training.optimizer import create_optimizer, create_schedule, frozen_mask, scaled_schedule, schedule_steps

log = logging.getLogger("vimd_jax.train")

SECONDS_BETWEEN_PICTURES = 10  # at least, during a run: drawing takes as long as a short epoch


def check(config: ConfigDict, workdir: Path, made_before: set[Path] = frozenset()) -> Splits:
    """Checks the settings of a stage before anything is computed, and returns its data.

    Args:
      config: of one stage.
      workdir: its folder.
      made_before: workdirs that earlier stages of the same command make.

    Raises:
      ValueError, FileNotFoundError, DatasetError: one line that names the field and the remedy.
    """
    check_settings(config)
    check_augment(config.dataset.augment)
    parallel.check_batch_size("batch_size", config.batch_size, config.accumulation_steps)
    parallel.check_batch_size("eval_batch_size", config.eval_batch_size)
    data = Splits(*(load_source(config.dataset, s, seed=config.seed) for s in ("train", config.selection, "test")))
    create_schedule(config.schedule, steps_per_epoch(data.train, config.dataset, config.batch_size))
    nets = roles.build_networks(config, data.train.class_names)
    check_source(nets.task, data.train, config.dataset.name)
    steps.check_scan(config)
    with kernels.use(scan=config.scan_implementation or None):
        steps.check_objective(config, nets)
    if config.optimizer.freeze:
        frozen_mask(roles.zeros(nets.trained)["params"], config.optimizer.freeze)
    parallel.check_same_computation(f"{implementation_in_use()} and {workdirs.identity(config, data)}")
    if parallel.is_first():
        roles.check_sources_of_weights(config, nets, workdir, made_before)
        workdirs.check(workdir, config, data)
        if not workdirs.is_begun(workdir):
            workdirs.check_continue_from(config, data.train.class_names if nets.outputs else ())
            for split, source in {config.selection: data.held_out, "test": data.test}.items():
                check_readable(source, split, config.dataset.on_error)
    return data


def train(config: ConfigDict, workdir: Path, data: Splits | None = None, stop: StopRequest | None = None) -> None:
    """Runs one stage from its start, or from its latest checkpoint, to its end.

    Args:
      config: of one stage.
      workdir: its folder.
      data: what `check` returned, where that is done already.
      stop: tells when to save and leave.

    Raises:
      ValueError, FileNotFoundError, DatasetError: see `check`.
      TrainingError: something is no longer finite. The latest checkpoint is from before that.
      Stopped: the run was asked to stop, and is saved.
    """
    workdir = workdir.expanduser()
    data = data or check(config, workdir)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest())
        stack.enter_context(workdirs.locked(workdir))
        stack.enter_context(kernels.use(scan=config.scan_implementation or None))
        if parallel.is_first():
            workdirs.check(workdir, config, data)  # since the first check another run may have begun here
        _train(config, workdir, data, stop, stack)
        stop.must_save = False


def _train(config: ConfigDict, workdir: Path, data: Splits, stop: StopRequest, until_end: contextlib.ExitStack) -> None:
    # 1. The trained network, the frozen networks around it, the optimiser.
    class_names = data.train.class_names
    nets = roles.build_networks(config, class_names)
    task = nets.task
    variables, frozen = roles.initial_variables(config, nets, workdir)
    epoch_steps = steps_per_epoch(data.train, config.dataset, config.batch_size)
    _, total_steps = schedule_steps(config.schedule, epoch_steps)
    variables = hidden_map.add(config, nets, variables)
    schedule = create_schedule(scaled_schedule(config), epoch_steps)
    optimizer = create_optimizer(config.optimizer, variables["params"], schedule, nets.trained.decays)
    state = steps.create_state(config, variables, optimizer)
    log.info(
        "Stage %s: %s parameters, %d images of %d classes, %.4g epochs of %d steps of %d images, learning rate %.3g, "
        "%d devices.",
        config.stage, f"{roles.count(state.params):,}", len(data.train), len(class_names),
        total_steps / epoch_steps, epoch_steps, config.batch_size, scaled_schedule(config).learning_rate,
        jax.device_count(),
    )  # fmt: skip

    # 2. The latest checkpoint, if there is one. Then the folder belongs to the run.
    checkpoints, record, frozen_checksums = None, {}, {}
    if parallel.is_first():
        frozen_checksums = {role: checksum_of(weights) for role, weights in frozen.items()}
        checkpoints = training_state.open_folder(workdir / "checkpoints")
        state, record = training_state.restore_state(checkpoints, state)
        workdirs.check_frozen(workdir, config, record.get("frozen", {}), frozen_checksums)
        if config.continue_from and not record:
            state = last_state(config, state, total_steps)
        workdirs.claim(workdir, config, data)
    state, frozen = parallel.from_first((state, frozen))
    first_step = int(state.step)
    evaluated_step = parallel.any_process(record.get("evaluated_step", 0))
    best_is_lost = parallel.any_process(int(parallel.is_first() and evaluated_step > 0 and not has_best(workdir)))
    if parallel.any_process(int(parallel.is_first() and first_step == total_steps and is_finished(workdir))):
        if not best_is_lost:
            log.info(
                "%s is finished. For more epochs, start a new workdir with --config.continue_from=%s and a higher "
                "--config.schedule.num_epochs.", workdir, workdir
            )  # fmt: skip
            if parallel.is_first() and not has_pictures(workdir):
                save_pictures(workdir, config, nets, load_model(workdir).variables, data.test)
            return
    elif first_step:
        log.info("Continuing from step %d.", first_step)
    elif parallel.is_first() and nets.restorer is not None:
        with extra("A comparison of the SR network with bicubic interpolation"):
            check_restorer(config, nets, frozen[nets.stage.restorer], data.held_out)

    # 3. The steps. After some of them the network is evaluated; the best is kept, with all that is needed to continue.
    train_step = steps.make_train_step(config, nets, optimizer)
    eval_step = steps.make_eval_step(config, nets)
    batches = train_batches(
        data.train, config.dataset, batch_size=config.batch_size, seed=config.seed, start_step=first_step,
        views=nets.views, target=task.target, process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    held_out = passes(data.held_out, config, nets)
    state, replicated_frozen = parallel.replicate(state), parallel.replicate(frozen)
    writer = until_end.enter_context(MetricWriter(workdir, epoch_steps, first_step, evaluated_step))
    until_end.callback(batches.close)
    progress = Progress(total_steps, epoch_steps, config.batch_size, record)
    drawn = time.monotonic()  # when the pictures were, or the run began

    def evaluation_is_due(step: int) -> bool:
        return step != evaluated_step and (step % (config.eval_every_epochs * epoch_steps) == 0 or step == total_steps)

    def evaluate_now(step: int) -> None:
        nonlocal evaluated_step, drawn
        progress.flush()
        trained = parallel.fetch(steps.trained_variables(config, state))
        variables = nets.product_variables(trained, frozen)
        replicated = parallel.replicate(variables)
        scores, _ = evaluate(task, eval_step, replicated, next(held_out), config.selection, stop.check)
        if evaluation_is_due(step):  # and not only the best network lost
            writer.write(step, config.selection, scores)
        compare_with_trained(step, scores)
        save_if_best(workdir, config, nets, variables, step, scores[task.drawn[0]], data.train.colours)
        if time.monotonic() - drawn >= SECONDS_BETWEEN_PICTURES:
            save_pictures(workdir, config, nets, variables, data.held_out)
            drawn = time.monotonic()
        evaluated_step = step

    def compare_with_trained(step: int, scores: dict[str, float]) -> None:
        """Warns of an average that the initial weights still weigh down."""
        if not steps.average_is_young(config, step):
            return
        variables = nets.product_variables(parallel.fetch(steps.trained_variables(config, state, False)), frozen)
        title = f"{config.selection}, without averaging"
        trained, _ = evaluate(task, eval_step, parallel.replicate(variables), next(held_out), title, stop.check)
        name = task.drawn[0]
        if trained[name] - scores[name] > 0.1 * abs(trained[name]):
            log.warning(
                "The averaged network, which is evaluated and saved, has %s %.2f, the trained one %.2f: %.0f %% of the "
                "average are still the initial weights. Set config.ema_warmup=True, or a lower config.ema_decay.",
                name, scores[name], trained[name], 100 * config.ema_decay**step,
            )  # fmt: skip

    def save() -> None:
        """Writes the state after the last whole step, if that is not the one it began with."""
        snapshot = parallel.fetch(state)
        if parallel.is_first() and snapshot.step > first_step:
            memory = progress.record() | {"evaluated_step": evaluated_step, "frozen": frozen_checksums}
            training_state.save_state(checkpoints, int(snapshot.step), snapshot, memory)

    step = first_step
    try:
        if best_is_lost or (first_step and evaluation_is_due(first_step)):
            evaluate_now(first_step)
        for step in range(first_step + 1, total_steps + 1):
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            arguments = state, replicated_frozen, parallel.shard(batch)
            if step == first_step + 1:  # what compiling needed is given back before the step needs its own memory
                train_step.lower(*arguments).compile()
                give_back()
            state, metrics = train_step(*arguments)
            stop.must_save = True
            names = [data.train.name(index) for index in batch["index"]]
            progress.add(step, metrics, names, int(batch["skipped"].sum()), waited)
            if step % config.log_every_steps == 0 or step == total_steps:
                writer.write(step, "train", progress.summary(step, float(schedule(step - 1))))
            stop.check(step)
            with progress.pause():
                evaluates = evaluation_is_due(step)
                if evaluates:
                    evaluate_now(step)
                if evaluates or step % config.checkpoint_every_steps == 0:
                    save()
    except Stopped:
        save()
        log.info("Stopped after step %d of %d and saved it; the same command continues.", step, total_steps)
        raise
    except TrainingError:
        raise
    except Exception:
        with contextlib.suppress(Exception):  # the first error is the one to report
            save()
        stop.check_here()  # a signal to the whole process group ends input processes that are just starting
        raise

    # 4. The results: the best network on the test images, the curves, a panel to look at.
    best_variables, best_step = roles.zeros(nets.product), 0
    if parallel.is_first():
        best = load_model(workdir)
        best_variables, best_step = best.variables, best.provenance.get("step", 0)
    best_variables, best_step = parallel.from_first(best_variables), parallel.any_process(best_step)
    title, replicated = f"test, network of step {best_step}", parallel.replicate(best_variables)
    scores, sums = evaluate(task, eval_step, replicated, next(passes(data.test, config, nets)), title, stop.check)
    writer.write(total_steps, "test", {**scores, "best_step": best_step})
    if remark := task.remark(scores):
        log.warning("%s: %s", title, remark)
    save_pictures(workdir, config, nets, best_variables, data.test)
    if parallel.is_first():
        with extra(f"{workdir / 'report.html'}"):
            found = Measurement(scores, sums, nets, config, data.test, best_variables)
            report.save([report.Run(workdir.name, workdir, found)], workdir / "report.html")
    log.info("Done. %s holds the best network, and report.html to look at.", workdir)


def last_state(config: ConfigDict, state: steps.TrainState, total_steps: int) -> steps.TrainState:
    """The last state of the run that config.continue_from names.

    Raises:
      ValueError: it cannot be read or does not fit, or this run would be no longer.
    """
    workdir = Path(config.continue_from).expanduser()
    with steps.blaming("config.continue_from"):
        found, _ = training_state.restore_state(training_state.open_folder(workdir / "checkpoints"), state)
        if int(found.step) >= total_steps:
            raise ValueError(
                f"{workdir} is at step {int(found.step)}, and this run ends at {total_steps}: raise "
                "config.schedule.num_epochs."
            )
    return found


def has_best(workdir: Path) -> bool:
    """Whether best/ can be read; if not, logs it and removes it, so that another network can take its place."""
    try:
        load_model(workdir / "best")
    except (OSError, ValueError) as error:
        log.warning("The best network is lost (%s); that of the step to continue from takes its place.", error)
        workdirs.set_aside(workdir / "best")
        return False
    return True


def is_finished(workdir: Path) -> bool:
    """Whether the run has written its last line."""
    lines = read_metrics(workdir)
    return bool(lines) and "best_step" in lines[-1]["metrics"]


def has_pictures(workdir: Path) -> bool:
    """Whether the pictures have been drawn since the last line was written."""
    files = [workdir / name for name in ("metrics.jsonl", "curves.png", "panel.png")]
    return all(file.exists() and file.stat().st_mtime >= files[0].stat().st_mtime for file in files)


def save_pictures(workdir: Path, config: ConfigDict, nets: roles.Networks, variables: dict, images: Source) -> None:
    """Draws the curves, and the panel of a network's answers to some images, in place of earlier ones."""
    if not parallel.is_first():
        return
    with extra(f"{workdir / 'curves.png'}"):
        plots.save_curves(read_metrics(workdir), workdir / "curves.png", nets.task.drawn, nets.task.axis)
    with extra(f"{workdir / 'panel.png'}"):
        save_panel(config, nets, variables, images, workdir / "panel.png")


def save_if_best(
    workdir: Path,
    config: ConfigDict,
    nets: roles.Networks,
    variables: dict,
    step: int,
    score: float,
    colours: np.ndarray | None = None,
) -> None:
    """Writes the network to best/ unless the one that is there scored as well."""
    folder = workdir / "best"
    if not parallel.is_first():
        return
    if (folder / "network.json").exists() and score <= read_description(folder)["provenance"].get("score", -math.inf):
        return
    provenance = {"library": f"vimd_jax {__version__}", "stage": config.stage, "step": step, "score": score}
    if nets.task.maps:  # how predict prepares an image, and draws its label map
        provenance["size_limits"] = list(config.dataset.size_limits)
        provenance["colours"] = None if colours is None else colours.tobytes().hex()
    save_model(
        folder,
        TrainedModel(
            nets.product,
            variables,
            nets.outputs,
            low_resolution=config.dataset.low_resolution if nets.view == "low" else 0,
            crop=config.dataset.eval_crop,
            provenance=provenance,
            value_range=tuple(config.dataset.value_range),
        ),
    )


def main(config: ConfigDict, workdir: Path) -> None:
    """Trains the stage of a config, or its several stages in a row, all of them checked first."""
    show_log()
    with parallel.together(), readable_errors(), parallel.naming_lost_processes():
        given = flags.FLAGS
        if given.coordinator_address:
            parallel.join(given.coordinator_address, given.num_processes, given.process_id, given.wait_seconds)
        elif given.distributed:
            parallel.join_job(given.wait_seconds)
        stop = StopRequest(at_once=True)
        stages = workdirs.stages(config, workdir, is_given)
        made_before, checked = set(), []
        for stage, folder in stages:
            with workdirs.naming_the_stage(stage, len(stages)):
                checked.append(check(stage, folder, made_before))
            made_before.add(folder.resolve())
        for (stage, folder), data in zip(stages, checked):
            train(stage, folder, data, stop)
            stop.check()


def define_flags() -> None:
    """Defines the flags beside --config and --workdir, for several processes."""
    flags.DEFINE_bool("distributed", False, "Train with the other processes of this SLURM, Open MPI or Kubernetes job.")
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0, to train on several hosts by hand.")
    flags.DEFINE_integer("num_processes", None, "With coordinator_address: how many processes there are.")
    flags.DEFINE_integer("process_id", None, "With coordinator_address: which one this is, from 0.")
    flags.DEFINE_integer("wait_seconds", 45, "With several processes: for the others to start.")


def program() -> None:
    """The command `vimd-train`."""
    run(main, define_flags)


if __name__ == "__main__":
    program()
