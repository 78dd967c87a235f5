"""Measures a network: `python -m vimd_jax.evaluate --config configs/student_cub.py --workdir DIR [--split test]`.

Prints top-1 and top-5 accuracy (or PSNR, for an SR network) and writes into the workdir, for the split measured,
<split>_per_class.csv, <split>_confusion.csv and <split>_confusion.png.
"""

import csv
from pathlib import Path

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from vimd_jax.command import CONFIG, WORKDIR, readable_errors, show_log
from vimd_jax.data import load_source
from vimd_jax.training import networks, parallel, plots, steps, workdirs
from vimd_jax.training.evaluation import Scores, evaluate

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Measure this converted checkpoint or PyTorch file instead of the run's best."
)
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Which pictures.")


def evaluate_run(config: ConfigDict, workdir: Path, split: str, checkpoint: Path) -> Scores:
    """Scores of a checkpoint on a split; raises ValueError or FileNotFoundError before anything is compiled."""
    networks.check_resolutions(config)
    parallel.check_batch_size("eval_batch_size", config.eval_batch_size)
    source = load_source(config.dataset, split, seed=config.seed)
    network = networks.build_network(config, len(source.class_names))
    variables = networks.load_variables(checkpoint, network)
    scores = evaluate(
        steps.make_eval_step(config, network), parallel.replicate(variables), source, config, f"{checkpoint}, {split}"
    )
    if config.stage != "sr":
        workdir.mkdir(parents=True, exist_ok=True)
        write_tables(scores, source.class_names, workdir, split)
    return scores


def write_tables(scores: Scores, class_names: tuple[str, ...], folder: Path, split: str) -> None:
    """Writes the accuracy of every class and the confusion matrix (rows true, columns predicted)."""
    confusion = scores.sums["confusion"].astype(np.int64)
    with (folder / f"{split}_per_class.csv").open("w", newline="") as file:
        rows = zip(class_names, confusion.sum(axis=1), np.diag(confusion), scores.per_class())
        csv.writer(file).writerows([("class", "pictures", "correct", "accuracy_percent"), *rows])
    with (folder / f"{split}_confusion.csv").open("w", newline="") as file:
        rows = [(name, *row) for name, row in zip(class_names, confusion)]
        csv.writer(file).writerows([("true \\ predicted", *class_names), *rows])
    plots.save_confusion(confusion, class_names, folder / f"{split}_confusion.png")


def main(_: list[str]) -> None:
    """Measures the network of every stage of the config."""
    show_log()
    with readable_errors():
        for config, workdir in workdirs.stages(CONFIG.value, Path(WORKDIR.value)):
            scores = evaluate_run(config, workdir, _SPLIT.value, Path(_CHECKPOINT.value or workdir))
            text = "  ".join(f"{name} {value:.3f}" for name, value in scores.summary().items() if name != "count")
            print(f"{config.stage}  {_SPLIT.value}  {text}  pictures {scores.sums['count']:.0f}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
