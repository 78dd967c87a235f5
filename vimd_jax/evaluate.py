"""Measures a network: `python -m vimd_jax.evaluate --config configs/student_cub.py --workdir DIR [--split test]`.

The network is the best of the run in the workdir, or that of --checkpoint; the config names the dataset. Prints the
scores of its task (top-1 and top-5 accuracy; PSNR for an SR network) and writes the task's tables into the workdir, for
a classifier <split>_per_class.csv, <split>_confusion.csv and <split>_confusion.png.
"""

import csv
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

import kernels
from vimd_jax.command import is_given, run, show_log
from vimd_jax.config import STAGES, check_settings
from vimd_jax.data.sources import Source, load_source
from vimd_jax.load import load_variables
from vimd_jax.log import extra, readable_errors
from vimd_jax.tasks.task import Sums, check_source
from vimd_jax.training import classes, parallel, plots, roles, steps, workdirs
from vimd_jax.training.evaluation import evaluate, passes
from weight_convert.hub import published, resolve

log = logging.getLogger("vimd_jax.evaluate")


class Measurement(NamedTuple):
    """A network measured on images.

    Attributes:
      scores: by name, with "count", the number of images.
      sums: the findings behind them.
      networks: of the stage; the product was measured.
      config: of the stage, with the crop that the images were seen with.
      source: of the images.
      variables: of the network.
    """

    scores: dict[str, float]
    sums: Sums
    networks: roles.Networks
    config: ConfigDict
    source: Source
    variables: roles.Variables


def evaluate_run(
    config: ConfigDict, workdir: Path, split: str, checkpoint: str | Path | None = None
) -> dict[str, float]:
    """Scores of a network on a split of a dataset; writes the tables of its task into the workdir. See `measure`."""
    measurement = measure(config, workdir, split, checkpoint)
    write_tables(measurement, workdir, split)
    return measurement.scores


def measure(
    config: ConfigDict,
    workdir: Path,
    split: str,
    checkpoint: str | Path | None = None,
    given: Callable[[str], bool] = lambda field: False,
) -> Measurement:
    """Runs a network on a split of a dataset, whose images it sees as its checkpoint says.

    Args:
      config: of one stage: the dataset, and the network that the checkpoint must hold.
      workdir: of the run.
      split: "train", "validation" or "test".
      checkpoint: a network to measure instead of the run's best.
      given: whether a field of the config counts more than the checkpoint, as one that the command line sets does.

    Raises:
      ValueError, FileNotFoundError: found before anything is compiled.
    """
    place = str(checkpoint or workdir)
    architecture = config[STAGES[config.stage].trained].name
    entry, path = published(place, architecture), resolve(place, architecture).expanduser()
    if known := classes.description(path):
        config = _as_trained(config, known["view"], known["options"], given, place)
    elif entry:
        config = _as_trained(config, {"crop": entry.crop}, entry.options, given, place)
    check_settings(config)
    parallel.check_batch_size("eval_batch_size", config.eval_batch_size)
    source = load_source(config.dataset, split, seed=config.seed)
    nets = roles.build_networks(config, source.class_names)
    check_source(nets.task, source, config.dataset.name)
    variables = classes.in_order(load_variables(path, nets.product), path, nets.outputs)
    batches, title = next(passes(source, config, nets)), f"{path}, {split}"
    with kernels.use(scan=config.scan_implementation or None):
        step, replicated = steps.make_eval_step(config, nets), parallel.replicate(variables)
        scores, sums = evaluate(nets.task, step, replicated, batches, title)
    if remark := nets.task.remark(scores):
        log.warning("%s: %s", title, remark)
    return Measurement(scores, sums, nets, config, source, variables)


def _as_trained(
    config: ConfigDict, view: dict[str, Any], options: dict[str, Any], given: Callable[[str], bool], place: str
) -> ConfigDict:
    """The config with the crop, the range of values, the low resolution and the normalisation of a checkpoint."""
    config = config.copy_and_resolve_references()
    section = config[STAGES[config.stage].trained]
    if options.get("input_normalization") and section.input_normalization is None:
        section.input_normalization = True
    named = {"eval_crop": view["crop"]}
    if "low_resolution" in view:  # not of published weights, which say nothing of these
        named["value_range"] = tuple(view.get("value_range", ()))
    if low := view.get("low_resolution"):
        named["low_resolution"] = tuple(low) if isinstance(low, list) else low
    for field, value in named.items():
        if config.dataset[field] != value and not given(f"dataset.{field}"):
            text = "%s was trained with %s %r, which is taken; the config has %r."
            log.info(text, place, field, value, config.dataset[field])
            with config.dataset.ignore_type():  # of a size, which may be a number or a pair
                config.dataset[field] = value
    return config


def write_tables(measurement: Measurement, workdir: Path, split: str) -> None:
    """Writes the tables of a task, and the confusion matrix (rows true, columns predicted) if it has one."""
    sums, nets = measurement.sums, measurement.networks
    names, task = nets.outputs, nets.task
    tables, confusion = task.tables(sums, names), task.confusion(sums, len(names))
    if confusion is not None:
        # Row by row: with thousands of classes there are millions of cells.
        titled = ((name, *row.tolist()) for name, row in zip(names, confusion))
        tables = tables | {"confusion": itertools.chain([("true \\ predicted", *names)], titled)}
    for name, rows in tables.items():
        path = workdir / f"{split}_{name}.csv"
        with extra(str(path)):
            workdir.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
    if confusion is not None:
        path = workdir / f"{split}_confusion.png"
        with extra(str(path)):
            plots.save_confusion(confusion, names, path)


def main(config: ConfigDict, workdir: Path) -> None:
    """Measures the network of every stage of the config."""
    show_log()
    split, checkpoint = flags.FLAGS.split, flags.FLAGS.checkpoint
    with readable_errors():
        for stage, folder in workdirs.stages(config, workdir, is_given):
            measurement = measure(stage, folder, split, checkpoint, is_given)
            scores = measurement.scores
            text = "  ".join(f"{name} {value:.3f}" for name, value in scores.items() if name != "count")
            print(f"{stage.stage}  {split}  {text}  images {scores['count']:.0f}", flush=True)
            write_tables(measurement, folder, split)


def define_flags() -> None:
    """Defines the flags beside --config and --workdir."""
    flags.DEFINE_string(
        "checkpoint", None, "Measure this workdir, converted checkpoint or PyTorch file instead of the run's best."
    )
    flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Which images.")


def program() -> None:
    """The command `vimd-evaluate`."""
    run(main, define_flags)


if __name__ == "__main__":
    program()
