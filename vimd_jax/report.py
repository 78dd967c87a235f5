"""Makes a page of finished runs: `python -m vimd_jax.report WORKDIR... --output report.html`.

One HTML file that needs no other and no network: scores with confidence intervals, curves, classes, confusion, the most
confident mistakes, images, settings and provenance; of several runs beside each other, with the differences between
them on the same test images. The best network of each run is measured on its test images. A folder of runs, as a config
of several stages leaves one, stands for all of them.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vimd_jax import __version__, intervals, page
from vimd_jax.arguments import parse_path
from vimd_jax.checkpoints.format import read_description
from vimd_jax.data.pipeline import network_view, read_or_skip
from vimd_jax.data.preparation import prepare_views
from vimd_jax.data.source import composed
from vimd_jax.evaluate import Measurement, measure
from vimd_jax.files import replace_file
from vimd_jax.log import readable_errors, show_log
from vimd_jax.training import roles, workdirs
from vimd_jax.training.evaluation import panel
from vimd_jax.training.metrics import NOT_A_TERM, read_metrics

log = logging.getLogger("vimd_jax.report")

_MISTAKES, _PAIRS = 36, 12  # of a page, shared out among its runs; of a run
_LESS_IS_BETTER = ("loss",)


class Run(NamedTuple):
    """A run, its best network measured on the test images, and how the page calls it."""

    title: str
    workdir: Path
    measurement: Measurement

    @property
    def scores(self) -> dict[str, float]:
        """The scores without the number of images."""
        return {name: value for name, value in self.measurement.scores.items() if name != "count"}

    @property
    def shares(self) -> intervals.Shares | None:
        """Each image's share of the sums that scores rest on; None for a task that keeps none."""
        sums = self.measurement.sums
        kept = {name: sums.images[name].astype(np.float64) for name in sums.total if name in sums.images}
        return kept or None


def report(runs: Sequence[Run]) -> str:
    """The page of some runs."""
    title = f"{', '.join(run.title for run in runs)}: report"
    several = len(runs) > 1
    links = "".join(f'<a href="#run{i}">{page.text(run.title)}</a>' for i, run in enumerate(runs)) if several else ""
    parts = [
        f"<header><h1>{page.text(title)}</h1>",
        page.note(f"Best network of each run on its test images. vimd_jax {__version__}."),
        f"<nav>{links}</nav></header>",
        page.section("Scores", scores_table(runs)),
        page.section("Differences", *differences(runs)),
        page.section("Curves", f'<div class="charts">{"".join(curves(runs))}</div>'),
        *(of_one_run(run, i, len(runs)) for i, run in enumerate(runs)),
        page.section("Origin and speed", *side_by_side(runs, [facts(run) for run in runs])),
        page.section("Settings", settings_table(runs)),
    ]
    return page.page(title, "\n".join(parts))


def save(runs: Sequence[Run], path: Path) -> None:
    """Writes the page of some runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, report(runs).encode())


# ---------------------------------------------------------------------------------------------------------------------
# Several runs beside each other


def scores_table(runs: Sequence[Run]) -> str:
    """Each score of each run with its interval."""
    names = dict.fromkeys(name for run in runs for name in run.scores)
    rows = [(_words(name), *(_score(run, name) for run in runs)) for name in names]
    counts = [("images", *(f"{run.measurement.scores['count']:.0f}" for run in runs))]
    remark = "Below each score: its 95 % interval over the test images, and the method; some tasks have none."
    return page.table(["", *(run.title for run in runs)], rows + counts) + page.note(remark)


def _score(run: Run, name: str) -> tuple[str, str] | str:
    if name not in run.scores:
        return "–"
    value, shares = page.number(run.scores[name]), run.shares
    if shares is None:
        return value, "no interval"
    found = intervals.interval(name, shares, run.measurement.networks.task.scores)
    return value, f"{page.number(found.low)} to {page.number(found.high)} ({found.method})"


class Difference(NamedTuple):
    """The score of a second run minus that of a first one, on the images that both have seen.

    Attributes:
      score: its name.
      images: how many there are.
      value: the difference.
      interval: of it.
      only: how many images only the first, and only the second, has right; None where images are not right or wrong.
    """

    score: str
    images: int
    value: float
    interval: intervals.Interval
    only: tuple[int, int] | None


def paired(first: Run, second: Run) -> list[Difference]:
    """The differences in the scores that two runs share; [] where their test images are others."""
    names = [name for name in first.scores if name in second.scores]
    mine, yours = first.measurement, second.measurement
    classes = [sorted(map(composed, of.networks.outputs)) for of in (mine, yours)]
    if first.shares is None or second.shares is None or classes[0] != classes[1]:
        return []
    places = [{of.source.key(int(i)): at for at, i in enumerate(of.sums.images["index"])} for of in (mine, yours)]
    common = sorted(places[0].keys() & places[1].keys())
    if not common:
        return []
    before, after = (
        {name: values[[place[key] for key in common]] for name, values in run.shares.items()}
        for run, place in zip((first, second), places)
    )
    scores, count, found = mine.networks.task.scores, {"count": np.float64(len(common))}, []
    old, new = (scores(count | {name: x.sum(axis=0) for name, x in shares.items()}) for shares in (before, after))
    for name in names:
        only = None
        if intervals.is_share(name, before) and intervals.is_share(name, after):
            only = intervals.wins_and_losses(before[name], after[name])[::-1]
        interval = intervals.paired_interval(name, before, after, scores)
        found.append(Difference(name, len(common), new[name] - old[name], interval, only))
    return found


def differences(runs: Sequence[Run]) -> list[str]:
    """A table of the paired differences of each run from the first one before it that it can be compared with."""
    rows, alone = [], []
    for i, run in enumerate(runs[1:], 1):
        earlier = ((other, paired(other, run)) for other in runs[:i])
        other, found = next((pair for pair in earlier if pair[1]), (run, []))
        alone += [] if found else [run.title]
        for x in found:
            low, high, method = x.interval
            sign = "+" if x.value > 0 else ""
            verdict = "no clear difference" if low <= 0 <= high else _verdict(x)
            only = "–" if x.only is None else (f"{x.only[1]} / {x.only[0]}", f"{run.title} / {other.title}")
            span = (f"{page.number(low)} to {page.number(high)}", method)
            difference = (f"{sign}{page.number(x.value)}", verdict)
            rows.append(((_words(x.score), f"{run.title} − {other.title}"), difference, span, only, x.images))
    titles = ["", "difference", "95 % interval", "right in one only", "images"]
    parts = [page.table(titles, rows)] if rows else []
    if alone:
        parts.append(
            page.note(f"Not compared, since no run before has their scores, classes and images: {', '.join(alone)}.")
        )
    return parts


def _verdict(difference: Difference) -> str:
    return "better" if (difference.value > 0) != (difference.score in _LESS_IS_BETTER) else "worse"


def curves(runs: Sequence[Run]) -> list[str]:
    """Charts of the training loss, of a single run with its terms; of evaluations' scores; of the learning rate."""
    lines = [read_metrics(run.workdir) for run in runs]

    def points(i: int, split: str, name: str) -> list[tuple[float, float]]:
        return [(x["epoch"], x["metrics"][name]) for x in lines[i] if x["split"] == split and name in x["metrics"]]

    hidden = ("learning_rate", "images_per_second", "input_wait", *NOT_A_TERM[1:])
    if len(runs) == 1:
        names = dict.fromkeys(n for x in lines[0] if x["split"] == "train" for n in x["metrics"] if n not in hidden)
        losses = [page.Line(_words(name), points(0, "train", name), i) for i, name in enumerate(names)]
    else:
        losses = [page.Line(run.title, points(i, "train", "loss"), i) for i, run in enumerate(runs)]
    charts = [page.chart("Training loss", losses, logarithmic=True)]
    for axis in dict.fromkeys(run.measurement.networks.task.axis for run in runs):
        drawn = [
            page.Line(_line(run, score, split), points(i, split, score), i + 3 * k, dashed=split == "test")
            for i, run in enumerate(runs)
            for k, score in enumerate(run.measurement.networks.task.drawn)
            for split in ("validation", "test")
            if run.measurement.networks.task.axis == axis
        ]
        charts.append(page.chart(axis, drawn))
    rates = [page.Line(run.title, points(i, "train", "learning_rate"), i) for i, run in enumerate(runs)]
    return [*charts, page.chart("Learning rate", rates)]


def _line(run: Run, score: str, split: str) -> str:
    """The label of a score's line."""
    several = len(run.measurement.networks.task.drawn) > 1
    return f"{run.title}, {_words(score)}, {split}" if several else f"{run.title}, {split}"


def facts(run: Run) -> dict[str, Any]:
    """Where a network comes from, how large it is and how fast it was trained."""
    description, measured = read_description(run.workdir / "best"), run.measurement
    found = {"workdir": str(run.workdir), "network": description["architecture"]}
    found |= {"parameters": f"{roles.count(measured.variables['params']):,}", "checksum": description["checksum"][:16]}
    found |= {name: page.number(x) if isinstance(x, float) else x for name, x in description["provenance"].items()}
    training = [x["metrics"] for x in read_metrics(run.workdir) if x["split"] == "train"]
    for name, title, factor, unit in (
        ("images_per_second", "training images a second, median", 1, ""),
        ("input_wait", "time waiting for images, median", 100, " %"),
    ):
        if values := [metrics[name] for metrics in training if name in metrics]:
            found[title] = page.number(factor * float(np.median(values)), unit)
    data = _json(run.workdir / "data.json")
    found |= {f"{split.replace('_', '-')} images": str(_images(data[split])) for split in data}
    origins = _json(run.workdir / "networks.json")
    return found | {f"frozen network: {role}": json.dumps(origin) for role, origin in origins.items()}


def _images(classes: dict[str, list[Any]]) -> int:
    return sum(count for count, _ in classes.values())


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def settings_table(runs: Sequence[Run]) -> str:
    """Every setting that has a value; of several runs first those that differ."""
    flat = [workdirs.flat(json.loads(run.measurement.config.to_json())) for run in runs]
    flat = [{name: _setting(value) for name, value in each.items() if value not in (None, "", [])} for each in flat]
    rows, differ = _rows(flat)
    summary = f"{sum(differ)} of {len(rows)} settings differ" if len(runs) > 1 else f"{len(rows)} settings"
    return (
        f"<details{' open' if len(runs) > 1 else ''}><summary>{page.text(summary)}</summary>"
        f"{page.table(['config', *(run.title for run in runs)], rows, marked=differ)}</details>"
    )


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def side_by_side(runs: Sequence[Run], found: list[dict[str, Any]]) -> list[str]:
    """A table of named values of each run."""
    return [page.table(["", *(run.title for run in runs)], _rows(found, sort=False)[0])]


def _rows(found: list[dict[str, Any]], sort: bool = True) -> tuple[list[tuple[str, ...]], list[bool]]:
    """A row a name, with the values of all runs, those that differ first; and which rows do."""
    rows = [
        (name, *(str(each.get(name, "–")) for each in found)) for name in dict.fromkeys(k for x in found for k in x)
    ]
    if sort:
        rows.sort(key=lambda row: len(set(row[1:])) == 1)
    return rows, [len(set(row[1:])) > 1 for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# One run


def of_one_run(run: Run, number: int, count: int) -> str:
    """Classes, confusion, mistakes and images of a run."""
    measured = run.measurement
    task, names = measured.networks.task, measured.networks.outputs
    tables = [
        page.table(list(map(_words, rows[0])), rows[1:], sorts=True)
        for rows in task.tables(measured.sums, names).values()
    ]
    matrix = task.confusion(measured.sums, len(names))
    parts = [page.section("Classes", *tables, level=3)]
    if matrix is not None:
        pairs = page.table(["true", "predicted", "times", "% of class"], most_confused(matrix, names))
        parts.append(page.section("Confusion", page.confusion(matrix, names), pairs, level=3))
    parts.append(page.section("Most confident mistakes", page.pictures(mistakes(run, _MISTAKES // count)), level=3))
    parts.append(page.section("Images", page.pictures(examples(run)), level=3))
    return page.section(run.title, *parts, name=f"run{number}")


def most_confused(matrix: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, int, float]]:
    """The pairs of a true class and a wrong one that was most often predicted for it."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    best = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    pairs = [np.unravel_index(i, matrix.shape) for i in best]
    return [
        (names[i], names[j], int(wrong[i, j]), 100 * wrong[i, j] / matrix[i].sum()) for i, j in pairs if wrong[i, j]
    ]


def mistakes(run: Run, most: int) -> list[tuple[dict[str, np.ndarray], str, str]]:
    """The images with the highest probability of a wrong class: views, caption, file; [] for tasks that have none."""
    measured, images = run.measurement, run.measurement.sums.images
    if "confidence" not in images:
        return []
    wrong = np.flatnonzero(images["true"] != images["predicted"])
    chosen = wrong[np.argsort(-images["confidence"][wrong], kind="stable")][:most]
    names, dataset, found = measured.networks.outputs, measured.config.dataset, []
    for i in chosen:
        index = int(images["index"][i])
        if (record := read_or_skip(measured.source, index, dataset.on_error)) is None:
            continue
        views = prepare_views(record.image, network_view(dataset))
        views = {"as it was read": views["low"], "original": views["high"]} if _reads_low(run) else {"": views["high"]}
        predicted, true = names[images["predicted"][i]], names[images["true"][i]]
        caption = f"{predicted} ({100 * images['confidence'][i]:.0f} %), is {true}"
        found.append((views, caption, Path(measured.source.name(index)).name))
    return found


def _reads_low(run: Run) -> bool:
    return run.measurement.networks.view == "low"


def examples(run: Run) -> list[tuple[dict[str, np.ndarray], str, str]]:
    """The panel of a run: low, restored and high resolution, and the network's answer."""
    x = run.measurement
    columns, captions = panel(x.config, x.networks, x.variables, x.source)
    return [({title: images[i] for title, images in columns.items()}, captions[i], "") for i in range(len(captions))]


def _words(name: str) -> str:
    """The name of a score or column in words."""
    known = {"top1": "top-1 accuracy (%)", "top5": "top-5 accuracy (%)", "psnr": "PSNR (dB)"}
    known |= {"psnr_bicubic": "PSNR of bicubic interpolation (dB)", "mean_iou": "mean IoU (%)"}
    return known.get(name, name.replace("_percent", " (%)").replace("_", " "))


# ---------------------------------------------------------------------------------------------------------------------
# The program


def measured(workdir: Path, title: str, split: str = "test") -> Run:
    """A run with its best network measured.

    Raises:
      ValueError, FileNotFoundError: the folder holds no run, or no network yet; or its images are gone.
    """
    return Run(title, workdir, measure(workdirs.read_config(workdir), workdir, split))


def runs_in(folder: Path) -> list[Path]:
    """The folder itself if it holds a run, or else those in it that do, in the order in which they were begun."""
    if (folder / "config.json").is_file():
        return [folder]
    found = sorted(folder.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    return [path.parent for path in found] or [folder]


def titles(workdirs: Sequence[Path]) -> list[str]:
    """Short names of folders: as much of the end of each path as tells it from the others."""
    parts = [path.resolve().parts for path in workdirs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"A workdir is named twice: {', '.join(map(str, workdirs))}.")


def main() -> None:
    """The command `vimd-report`."""
    parser = argparse.ArgumentParser(prog="python -m vimd_jax.report", description="Makes a page of finished runs.")
    parser.add_argument("workdirs", nargs="+", type=parse_path, metavar="WORKDIR", help="of a run, or a folder of runs")
    parser.add_argument("--output", type=parse_path, default=Path("report.html"), help="file to write (report.html)")
    arguments = parser.parse_args()
    show_log()
    with readable_errors():
        folders = [run for folder in arguments.workdirs for run in runs_in(folder.expanduser())]
        save([measured(folder, title) for folder, title in zip(folders, titles(folders))], arguments.output)
        print(f"{arguments.output}  {arguments.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
