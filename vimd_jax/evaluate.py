"""Measures a network: `python -m vimd_jax.evaluate --config configs/student_cub.py --workdir DIR [--split test]`.

The network is the best of the run in the workdir, or that of --checkpoint; the config says on which dataset. Prints
top-1 and top-5 accuracy (or PSNR, for an SR network) and writes into the workdir, for the split measured,
<split>_per_class.csv, <split>_confusion.csv and <split>_confusion.png.
"""

import csv
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from vimd_jax.checkpoints.format import read_description
from vimd_jax.command import CONFIG, WORKDIR, run, show_log
from vimd_jax.config import check_settings
from vimd_jax.data.sources import load_source
from vimd_jax.load import load_variables
from vimd_jax.log import readable_errors
from vimd_jax.training import parallel, plots, roles, steps, workdirs
from vimd_jax.training.evaluation import Scores, evaluate, passes

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Measure this workdir, converted checkpoint or PyTorch file instead of the run's best."
)
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Which images.")


def evaluate_run(config: ConfigDict, workdir: Path, split: str, checkpoint: Path | None = None) -> Scores:
    """Scores of a network on a split of a dataset; writes the tables into the workdir.

    Args:
      config: of one stage: the dataset, and the network that the checkpoint must hold.
      workdir: of the run.
      split: "train", "validation" or "test".
      checkpoint: what to measure instead of the run's best network.

    Raises:
      ValueError, FileNotFoundError: found before anything is compiled.
    """
    check_settings(config)
    parallel.check_batch_size("eval_batch_size", config.eval_batch_size)
    source = load_source(config.dataset, split, seed=config.seed)
    nets = roles.build_networks(config, len(source.class_names))
    path = checkpoint or workdir
    variables = load_variables(path, nets.product)
    if checkpoint is None and config.stage != "sr":
        check_class_names(workdir, source.class_names)
    batches, title = next(passes(source, config)), f"{path}, {split}"
    scores = evaluate(steps.make_eval_step(nets), parallel.replicate(variables), batches, title)
    if config.stage != "sr":
        workdir.mkdir(parents=True, exist_ok=True)
        write_tables(scores, source.class_names, workdir, split)
    return scores


def check_class_names(workdir: Path, found: tuple[str, ...]) -> None:
    """Raises ValueError, naming the first difference, unless a dataset has the classes that a run was trained on."""
    known = read_description(workdir / "best")["class_names"]
    if different := [pair for pair in zip(known, found) if pair[0] != pair[1]]:
        raise ValueError(
            f"{workdir} was trained on other classes: {different[0][0]!r} there is {different[0][1]!r} here"
        )


def write_tables(scores: Scores, class_names: tuple[str, ...], folder: Path, split: str) -> None:
    """Writes the accuracy of every class and the confusion matrix (rows true, columns predicted)."""
    confusion = scores.sums["confusion"].astype(np.int64)
    with (folder / f"{split}_per_class.csv").open("w", newline="") as file:
        rows = zip(class_names, confusion.sum(axis=1), np.diag(confusion), scores.per_class())
        csv.writer(file).writerows([("class", "images", "correct", "accuracy_percent"), *rows])
    with (folder / f"{split}_confusion.csv").open("w", newline="") as file:
        rows = [(name, *row) for name, row in zip(class_names, confusion)]
        csv.writer(file).writerows([("true \\ predicted", *class_names), *rows])
    plots.save_confusion(confusion, class_names, folder / f"{split}_confusion.png")


def main(_: list[str]) -> None:
    """Measures the network of every stage of the config."""
    show_log()
    with readable_errors():
        checkpoint = Path(_CHECKPOINT.value) if _CHECKPOINT.value else None
        for config, workdir in workdirs.stages(CONFIG.value, Path(WORKDIR.value)):
            scores = evaluate_run(config, workdir, _SPLIT.value, checkpoint)
            text = "  ".join(f"{name} {value:.3f}" for name, value in scores.summary().items() if name != "count")
            print(f"{config.stage}  {_SPLIT.value}  {text}  images {scores.sums['count']:.0f}")


def program() -> None:
    """The command `vimd-evaluate`."""
    run(main)


if __name__ == "__main__":
    program()
