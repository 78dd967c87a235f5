"""Measures a network: `python -m vimd_jax.evaluate --config configs/student_cub.py --workdir DIR [--split test]`.

The network is the best of the run in the workdir, or that of --checkpoint; the config names the dataset. Prints the
scores of its task (top-1 and top-5 accuracy; PSNR for an SR network) and writes the task's tables into the workdir, for
a classifier <split>_per_class.csv, <split>_confusion.csv and <split>_confusion.png.
"""

import csv
import logging
from pathlib import Path
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict

import kernels
from vimd_jax.command import is_given, run, show_log
from vimd_jax.config import check_settings
from vimd_jax.data.sources import load_source
from vimd_jax.load import load_variables
from vimd_jax.log import extra, readable_errors
from vimd_jax.models import describe
from vimd_jax.tasks.task import Sums, check_source
from vimd_jax.training import classes, parallel, plots, roles, steps, workdirs
from vimd_jax.training.evaluation import evaluate, passes
from weight_convert.hub import resolve

log = logging.getLogger("vimd_jax.evaluate")


class Measurement(NamedTuple):
    """The scores of a network by name with "count", the number of images; what they are made of; the networks."""

    scores: dict[str, float]
    sums: Sums
    networks: roles.Networks


def evaluate_run(
    config: ConfigDict, workdir: Path, split: str, checkpoint: str | Path | None = None
) -> dict[str, float]:
    """Scores of a network on a split of a dataset; writes the tables of its task into the workdir. See `measure`."""
    measurement = measure(config, workdir, split, checkpoint)
    write_tables(measurement, workdir, split)
    return measurement.scores


def measure(
    config: ConfigDict, workdir: Path, split: str, checkpoint: str | Path | None = None, keep_crop: bool = False
) -> Measurement:
    """Runs a network on a split of a dataset.

    Args:
      config: of one stage: the dataset, and the network that the checkpoint must hold.
      workdir: of the run.
      split: "train", "validation" or "test".
      checkpoint: a network to measure instead of the run's best.
      keep_crop: look at the images with config.dataset.eval_crop, instead of as the checkpoint says.

    Raises:
      ValueError, FileNotFoundError: found before anything is compiled.
    """
    check_settings(config)
    parallel.check_batch_size("eval_batch_size", config.eval_batch_size)
    source = load_source(config.dataset, split, seed=config.seed)
    nets = roles.build_networks(config, source.class_names)
    check_source(nets.task, source, config.dataset.name)
    path = resolve(checkpoint or workdir, describe(nets.product)["architecture"]).expanduser()
    variables = classes.in_order(load_variables(path, nets.product), path, nets.outputs)
    if not keep_crop and (known := classes.description(path)):
        config = _with_crop(config, known["view"]["crop"], path)
    batches, title = next(passes(source, config, nets)), f"{path}, {split}"
    with kernels.use(scan=config.scan_implementation or None):
        step, replicated = steps.make_eval_step(config, nets), parallel.replicate(variables)
        return Measurement(*evaluate(nets.task, step, replicated, batches, title), nets)


def _with_crop(config: ConfigDict, crop: float, path: Path) -> ConfigDict:
    """The config with the crop that a checkpoint names."""
    given = config.dataset.eval_crop
    if given == crop:
        return config
    log.info("%s names a crop of %g, which is taken; the config has %g.", path, crop, given)
    config = config.copy_and_resolve_references()
    config.dataset.eval_crop = crop
    return config


def write_tables(measurement: Measurement, workdir: Path, split: str) -> None:
    """Writes the tables of a task, and the confusion matrix (rows true, columns predicted) if it has one."""
    sums, nets = measurement.sums, measurement.networks
    names, task = nets.outputs, nets.task
    tables, confusion = task.tables(sums, names), task.confusion(sums, len(names))
    if confusion is not None:
        titled = [(name, *row) for name, row in zip(names, confusion)]
        tables = tables | {"confusion": [("true \\ predicted", *names), *titled]}
    for name, rows in tables.items():
        path = workdir / f"{split}_{name}.csv"
        with extra(str(path)):
            workdir.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
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
        for stage, folder in workdirs.stages(config, workdir):
            measurement = measure(stage, folder, split, checkpoint, is_given("dataset.eval_crop"))
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
