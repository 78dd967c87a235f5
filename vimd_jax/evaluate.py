"""Measures a network: `python -m vimd_jax.evaluate --config configs/student_cub.py --workdir DIR [--split test]`.

The network is the best of the run in the workdir, or that of --checkpoint; the config names the dataset. Prints the
scores of its task (top-1 and top-5 accuracy; PSNR for an SR network) and writes the task's tables into the workdir, for
a classifier <split>_per_class.csv, <split>_confusion.csv and <split>_confusion.png.
"""

import csv
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

import kernels
from vimd_jax.checkpoints.format import read_description
from vimd_jax.command import CONFIG, WORKDIR, run, show_log
from vimd_jax.config import check_settings
from vimd_jax.data.sources import load_source
from vimd_jax.load import load_variables
from vimd_jax.log import readable_errors
from vimd_jax.tasks.task import Sums, Task, check_source
from vimd_jax.training import parallel, plots, roles, steps, workdirs
from vimd_jax.training.evaluation import evaluate, passes

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Measure this workdir, converted checkpoint or PyTorch file instead of the run's best."
)
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Which images.")


def evaluate_run(config: ConfigDict, workdir: Path, split: str, checkpoint: Path | None = None) -> dict[str, float]:
    """Scores of a network on a split of a dataset; writes the tables of its task into the workdir.

    Args:
      config: of one stage: the dataset, and the network that the checkpoint must hold.
      workdir: of the run.
      split: "train", "validation" or "test".
      checkpoint: a network to measure instead of the run's best.

    Returns:
      Scores by name, and "count", the number of images.

    Raises:
      ValueError, FileNotFoundError: found before anything is compiled.
    """
    check_settings(config)
    parallel.check_batch_size("eval_batch_size", config.eval_batch_size)
    source = load_source(config.dataset, split, seed=config.seed)
    nets = roles.build_networks(config, source.class_names)
    check_source(nets.task, source, config.dataset.name)
    path = checkpoint or workdir
    variables = parallel.replicate(load_variables(path, nets.product))
    if checkpoint is None:
        check_names(workdir, nets.outputs)
    batches, title = next(passes(source, config, nets)), f"{path}, {split}"
    with kernels.use(scan=config.scan_implementation or None):
        scores, sums = evaluate(nets.task, steps.make_eval_step(config, nets), variables, batches, title)
    write_tables(nets.task, sums, nets.outputs, workdir, split)
    return scores


def check_names(workdir: Path, found: tuple[str, ...]) -> None:
    """Raises ValueError, naming the first difference, unless a run was trained on outputs of these names."""
    known = read_description(workdir / "best")["class_names"]
    if different := [pair for pair in zip(known, found) if pair[0] != pair[1]]:
        raise ValueError(
            f"{workdir} was trained on other classes: {different[0][0]!r} there is {different[0][1]!r} here"
        )


def write_tables(task: Task, sums: Sums, names: tuple[str, ...], workdir: Path, split: str) -> None:
    """Writes the tables of a task, and the confusion matrix (rows true, columns predicted) if it has one."""
    tables, confusion = task.tables(sums, names), task.confusion(sums, len(names))
    if confusion is not None:
        titled = [(name, *row) for name, row in zip(names, confusion)]
        tables = tables | {"confusion": [("true \\ predicted", *names), *titled]}
    for name, rows in tables.items():
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / f"{split}_{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    if confusion is not None:
        plots.save_confusion(confusion, names, workdir / f"{split}_confusion.png")


def main(_: list[str]) -> None:
    """Measures the network of every stage of the config."""
    show_log()
    with readable_errors():
        checkpoint = Path(_CHECKPOINT.value) if _CHECKPOINT.value else None
        for config, workdir in workdirs.stages(CONFIG.value, Path(WORKDIR.value)):
            scores = evaluate_run(config, workdir, _SPLIT.value, checkpoint)
            text = "  ".join(f"{name} {value:.3f}" for name, value in scores.items() if name != "count")
            print(f"{config.stage}  {_SPLIT.value}  {text}  images {scores['count']:.0f}")


def program() -> None:
    """The command `vimd-evaluate`."""
    run(main)


if __name__ == "__main__":
    program()
