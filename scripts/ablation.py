"""Measures what each part of ViMD brings: arms with matched controls, over several seeds, on any images.

    python scripts/ablation.py --study workdir/birds --config quickstart --epochs 8 --seeds 5
    python scripts/ablation.py --study workdir/own --config small --epochs 20 --data DIR --generic OTHER_IMAGES
    python scripts/ablation.py --study workdir/birds     # continues; with --jobs 0 only writes the tables anew

Every arm trains for as many steps as the others, unless it says otherwise, on the same images in the same order as the
others of its seed; its best epoch is chosen on held-out training images. The arms of a seed share its teacher and SR
networks. STUDY holds a workdir for each run: a finished one is not repeated, one that was killed goes on from its last
state, and arms and seeds can be added. One run alone:

    python -m vimd_jax.train --config scripts/ablation.py:STUDY/seed0/plain --workdir STUDY/seed0/plain

After each run, STUDY has table.md, runs.csv and arms.png. The intervals are those of Student's t over the seeds, all on
the same test images, and not adjusted for the number of comparisons.
"""

import argparse
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vimd_jax.arguments import parse_option, parse_path  # noqa: E402
from vimd_jax.configs import load_config  # noqa: E402
from vimd_jax.data.pipeline import steps_per_epoch  # noqa: E402
from vimd_jax.data.sources import load_source  # noqa: E402
from vimd_jax.files import replace_file  # noqa: E402
from vimd_jax.intervals import LEVEL, Interval  # noqa: E402
from vimd_jax.log import extra, readable_errors  # noqa: E402
from vimd_jax.train import is_finished  # noqa: E402
from vimd_jax.training.metrics import read_metrics  # noqa: E402
from vimd_jax.training.optimizer import schedule_steps  # noqa: E402
from vimd_jax.training.workdirs import flat  # noqa: E402

POWER = 0.8  # chance of seeing the smallest visible difference


class Arm(NamedTuple):
    """A kind of run.

    Attributes:
      meaning: a few words for the table.
      changes: fields of the config; an `init` names the run of the same seed that must be finished before.
      against: the arms that it is compared with.
      stage: of the config.
      times: how many times as long as the others it trains.
    """

    meaning: str
    changes: dict[str, Any]
    against: tuple[str, ...] = ()
    stage: str = "student"
    times: int = 1

    @property
    def needs(self) -> list[str]:
        """The runs that must be finished before."""
        return [value for name, value in self.changes.items() if name.endswith(".init") and value]


NOTHING = {"student.init": "", "loss.logits_weight": 0.0, "loss.hidden_weight": 0.0}
BICUBIC = NOTHING | {"sr.name": "bicubic"}
SR = NOTHING | {"sr.init": "sr-network"}
START = {"student.init": "teacher"}
TEACHER = {"teacher.init": "teacher"}
LOGITS = TEACHER | {"loss.logits_weight": 1.0}
ALL = TEACHER | {"loss.hidden_weight": 20.0, "loss.hidden_layers": "all", "loss.hidden_normalize": True}
LAST = ALL | {"loss.hidden_layers": "last"}
VIMD = SR | START | LOGITS | ALL
RELEASED = SR | START | LAST | {"loss.hidden_weight": 5.0, "loss.hidden_normalize": False}
LOW_TEACHER = VIMD | {"student.init": "sr", "teacher.init": "sr", "loss.teacher_view": "low"}
ARMS = {
    "teacher": Arm("high resolution: the upper bound", {"teacher.init": ""}, ("plain", "plain-long"), "teacher"),
    "plain": Arm("low resolution, bicubic, labels alone", BICUBIC),
    "plain-long": Arm("plain, trained as long as teacher and student together", BICUBIC, ("plain",), times=2),
    "sr": Arm("plain + SR network", SR, ("plain",)),
    "sr-long": Arm("sr, trained as long as teacher and student together", SR, ("sr", "plain-long"), times=2),
    "start": Arm("sr + start from the teacher's weights", SR | START, ("sr", "sr-long")),
    "everything": Arm("sr + start + logits + hidden-all: ViMD", VIMD, ("plain-long", "sr-long", "start")),
    "low-teacher": Arm("everything, taught by sr: no high resolution", LOW_TEACHER, ("sr-long", "everything")),
    "released": Arm("sr + start + the released loss", RELEASED, ("start", "everything")),
    "logits": Arm("sr + logits", SR | LOGITS, ("sr",)),
    "hidden-last": Arm("sr + hidden states, last layer", SR | LAST, ("sr",)),
    "hidden-all": Arm("sr + hidden states, all layers", SR | ALL, ("sr",)),
    "sr-generic": Arm("sr, the SR network trained on other images", SR | {"sr.init": "sr-generic-network"}, ("sr",)),
}
GENERIC = "sr-generic-network"
RUNS = ARMS | dict.fromkeys(("sr-network", GENERIC), Arm("", {"sr.init": ""}, stage="sr"))


def get_config(folder: str) -> ConfigDict:
    """The config of the run in STUDY/seedN/NAME, for `--config scripts/ablation.py:STUDY/seedN/NAME`.

    Raises:
      ValueError: the study's config has not the three stages, or no such field as the study sets.
    """
    path = Path(folder).absolute()
    study, arm = json.loads((path.parents[1] / "study.json").read_text()), RUNS[path.name]
    stages = load_config(study["config"]).get("stages", {})
    if not {"sr", "teacher", "student"} <= set(stages):
        raise ValueError(f"--config: {study['config']} has not the stages sr, teacher and student, as quickstart has.")
    config, given = stages[arm.stage].copy_and_resolve_references(), dict(map(parse_option, study["set"]))
    if unknown := set(given).difference(*(flat(stage.to_dict()) for stage in stages.values())):
        raise ValueError(f"--set: no stage of {study['config']} has a field {min(unknown)}.")
    if starts := [name for name in given if name.endswith(".init")]:
        raise ValueError(f"--set: {starts[0]} is for the arms to say, they differ in what they start from.")
    changes = {name: value for name, value in given.items() if name in flat(config.to_dict())} | arm.changes
    changes |= {name: str(path.parent / changes[name]) for name in changes if name.endswith(".init") and changes[name]}
    changes |= {"seed": int(path.parent.name.removeprefix("seed")), "selection": "validation"}
    changes |= {"dataset.directory": study["data"]} if study["data"] else {}
    changes |= {"schedule.num_epochs": arm.times * study["epochs"]} if arm.stage != "sr" else {}
    config.update_from_flattened_dict(changes)
    if path.name == GENERIC:  # for as many steps as on the task's own images
        images = load_source(config.dataset, "train", seed=config.seed)
        epoch = steps_per_epoch(images, config.dataset, config.batch_size)
        config.schedule.warmup_steps, config.schedule.num_steps = schedule_steps(config.schedule, epoch)
        config.dataset.update(name="folder", directory=study["generic"])
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def in_order(arms: Sequence[str]) -> list[str]:
    """The arms and all that they need, each after what it needs."""
    return list(dict.fromkeys(name for arm in arms for name in [*in_order(RUNS[arm].needs), arm]))


def start(folder: Path) -> subprocess.Popen:
    """Starts the training of one run, or continues it; what it says is added to STUDY/seedN/NAME.log."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = ["-m", "vimd_jax.train", "--config", f"{Path(__file__).resolve()}:{folder}", "--workdir", str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with open(f"{folder}.log", "ab") as log:
        return subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=environment)


def run_all(folders: Sequence[Path], jobs: int, after_each: Callable[[], None]) -> list[Path]:
    """Runs what is not finished, several at once, and returns those that failed or need one that did."""
    waiting = [folder for folder in folders if not is_finished(folder)]
    running, failed = {}, []
    try:
        while True:
            while len(running) < jobs and (folder := next(filter(_is_ready, waiting), None)):
                waiting.remove(folder)
                running[folder] = start(folder)
            if not running:
                return failed + waiting
            while not (ended := [folder for folder, process in running.items() if process.poll() is not None]):
                time.sleep(0.5)
            for folder in ended:
                failed += [folder] if running.pop(folder).returncode or not is_finished(folder) else []
                said = f"{'FAILED' if folder in failed else 'done'}, {len(waiting) + len(running)} left"
                print(f"{time.strftime('%H:%M:%S')}  {folder}: {said}", flush=True)
                after_each()
    finally:  # where it was asked to stop, the runs are too, and save their states
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _is_ready(folder: Path) -> bool:
    return all(is_finished(folder.parent / name) for name in RUNS[folder.name].needs)


# ---------------------------------------------------------------------------------------------------------------------
# Results


class Result(NamedTuple):
    """A finished run: top-1 accuracy in % of its best epoch, and on how many images."""

    arm: str
    seed: int
    test: float
    held_out: float
    best_step: int
    steps: int
    test_images: int
    held_out_images: int


def results(study: Path, seeds: int) -> Iterator[Result]:
    """The finished runs of all arms."""
    for arm, seed in ((arm, seed) for arm in ARMS for seed in range(seeds)):
        if is_finished(folder := study / f"seed{seed}" / arm):
            *lines, last = read_metrics(folder)
            test, held_out = last["metrics"], [x["metrics"] for x in lines if x["split"] == "validation"]
            best = max(x["top1"] for x in held_out)
            counts = int(test["count"]), int(held_out[0]["count"])
            yield Result(arm, seed, test["top1"], best, int(test["best_step"]), last["step"], *counts)


def differences(found: Sequence[Result]) -> dict[str, list[float]]:
    """Points of top-1 accuracy between arms that are to be compared, for each seed that both have finished."""
    scores = {(x.arm, x.seed): x.test for x in found}
    pairs = {f"{arm} − {other}": (arm, other) for arm in ARMS for other in ARMS[arm].against}
    gaps = {
        title: [scores[arm, s] - scores[other, s] for a, s in scores if a == arm and (other, s) in scores]
        for title, (arm, other) in pairs.items()
    }
    return {title: values for title, values in gaps.items() if values}


def t_interval(values: Sequence[float]) -> Interval:
    """The interval of a mean over seeds, at least two."""
    reach = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values)
    return Interval(float(np.mean(values) - reach), float(np.mean(values) + reach), "Student's t over seeds")


def smallest_visible(values: Sequence[float]) -> float:
    """The smallest true difference that a paired t test sees at `LEVEL` with a chance of `POWER`, about.

    (t_0.975 + t_0.8) s / √n, with the standard deviation s of n paired differences, at least two.
    """
    return float(stats.t.ppf([(1 + LEVEL) / 2, POWER], len(values) - 1).sum() * stats.sem(values))


def tables(found: Sequence[Result]) -> str:
    """Scores and paired differences, as Markdown."""
    arms = [["arm", "", "steps", "seeds", "top-1", "95 % interval"], ["---"] * 6]
    for arm in dict.fromkeys(x.arm for x in found):
        own = [x for x in found if x.arm == arm]
        values = [x.test for x in own]
        span = "{:.1f} to {:.1f}".format(*t_interval(values)) if len(own) > 1 else "–"
        arms.append([arm, ARMS[arm].meaning, str(own[0].steps), str(len(own)), f"{np.mean(values):.1f}", span])
    pairs = [["difference", "seeds", "points", "95 % interval", "", "smallest visible"], ["---"] * 6]
    for title, values in differences(found).items():
        row = [title, str(len(values)), f"{np.mean(values):+.1f}", "–", "–", "–"]
        if len(values) > 1:
            low, high, _ = t_interval(values)
            verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
            row[3:] = [f"{low:+.1f} to {high:+.1f}", verdict, f"{smallest_visible(values):.1f}"]
        pairs.append(row)
    images = f"{found[0].test_images} test images; epochs chosen on about {found[0].held_out_images} held-out images"
    lines = [["| " + " | ".join(row) + " |" for row in rows] for rows in (arms, pairs)]
    return "\n".join([f"Top-1 accuracy in % on {images}.", "", *lines[0], "", *lines[1]]) + "\n"


def draw(found: Sequence[Result], path: Path) -> None:
    """Draws every seed, the mean and its interval, of the arms and of the paired differences."""
    scores = {arm: [x.test for x in found if x.arm == arm] for arm in dict.fromkeys(x.arm for x in found)}
    panels = {"top-1 accuracy on test images (%)": scores, "paired difference (points)": differences(found)}
    figure = Figure(figsize=(11, 0.8 + 0.28 * max(map(len, panels.values()))), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, 2), panels.items()):
        for y, values in enumerate(rows.values()):
            axes.plot(values, [y] * len(values), "o", color="0.7", markersize=4)
            axes.plot(np.mean(values), y, "o", color="C0")
            if len(values) > 1:
                axes.plot(t_interval(values)[:2], [y, y], color="C0")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.set_xlabel(f"{title}; bars: 95 %, t over seeds", fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    axes.axvline(0, color="black", linewidth=0.8)
    png = io.BytesIO()
    figure.savefig(png, dpi=90)
    replace_file(path, png.getvalue())


def write(study: Path, seeds: int) -> None:
    """Writes the tables, the list of runs and the plot of what is finished."""
    if found := list(results(study, seeds)):
        replace_file(study / "table.md", tables(found).encode())
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([Result._fields, *found])
        replace_file(study / "runs.csv", text.getvalue().encode())
        with extra(f"{study / 'arms.png'}"):
            draw(found, study / "arms.png")


# ---------------------------------------------------------------------------------------------------------------------
# The program


def settings(study: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a study, which are written into its folder: those given, and those that are there.

    Raises:
      ValueError: the folder is that of another study, something is missing, or there is no such arm.
    """
    path = study / "study.json"
    given = {name: value for name, value in given.items() if value is not None}
    known = json.loads(path.read_text()) if path.exists() else {"data": "", "generic": "", "set": [], "seeds": 3}
    for name in given.keys() & known.keys() - {"arms", "seeds"}:
        added = name == "generic" and not known[name]  # no run has needed it
        if any(study.glob("seed*")) and given[name] != known[name] and not added:
            raise ValueError(f"--{name}: {study} was begun with {known[name]!r}, choose another --study.")
    chosen = known | given
    if missing := {"config", "epochs"} - chosen.keys():
        raise ValueError(f"--{min(missing)} is missing: {study} holds no study to continue.")
    if too_few := [name for name in ("epochs", "seeds") if chosen[name] < 1]:
        raise ValueError(f"--{too_few[0]} is {chosen[too_few[0]]}: it must be at least 1.")
    chosen.setdefault("arms", [name for name in ARMS if chosen["generic"] or name != "sr-generic"])
    if unknown := [name for name in chosen["arms"] if name not in ARMS]:
        raise ValueError(f"--arms: there is no arm {unknown[0]!r}, choose from {', '.join(ARMS)}.")
    if "sr-generic" in chosen["arms"] and not chosen["generic"]:
        raise ValueError("--arms: sr-generic needs --generic, the images that its SR network is trained on.")
    study.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(chosen, indent=2).encode())
    return chosen


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = {"type": lambda text: str(parse_path(text).absolute()), "metavar": "DIR"}
    parser.add_argument("--study", type=parse_path, required=True, help="folder of the study")
    parser.add_argument("--config", help="name or path of a config with the stages sr, teacher and student")
    parser.add_argument("--epochs", type=int, help="of every arm; the SR networks keep those of the config")
    parser.add_argument("--data", **folder, help="images, as train/<class>/ and test/<class>/")
    parser.add_argument("--generic", **folder, help="other images for the arm sr-generic, in such folders too")
    parser.add_argument("--set", nargs="+", metavar="FIELD=VALUE", help="changes of every stage that has the field")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"of {', '.join(ARMS)} (all)")
    parser.add_argument("--seeds", type=int, help="how many, from 0 (3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; 0: only write the tables (1)")
    given = vars(parser.parse_args())
    study, jobs = given.pop("study").absolute(), given.pop("jobs")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with readable_errors():
        chosen = settings(study, given)
        folders = [study / f"seed{s}" / name for s in range(chosen["seeds"]) for name in in_order(chosen["arms"])]
        for folder in folders[: len(folders) // chosen["seeds"]]:
            get_config(str(folder))  # finds a wrong field before anything runs
        write(study, chosen["seeds"])
        if jobs and (failed := run_all(folders, jobs, lambda: write(study, chosen["seeds"]))):
            raise ValueError(f"{len(failed)} runs failed or need one that did: see {failed[0]}.log")


if __name__ == "__main__":
    main()
