"""Measures correctness and speed on a GPU, in one command of at most nine minutes.

    python scripts/gpu_report.py [--minutes 9] [--data DIR] [--output benchmarks] [--sections NAME ...] [--rehearse]

Writes benchmarks/<device>.json and, as tables, benchmarks/<device>.md, and updates them after each case. The sections,
most important first:

    numerics      scan against recorded results or the CPU: forward, gradients, bfloat16, two runs bit by bit
    scan          scripts/benchmark_scan.py at the shape of Vim-tiny, stride 8
    networks      scripts/benchmark_model.py: training step and inference of the student, inference of Vim-tiny
    pixels        Vim-tiny and an attention network, at 1248 pixels and at 224
    knobs         the Pallas kernels with other blocks, registers, windows and chunks
    distillation  SR network, teacher and student for a few epochs, in float32 and bfloat16; on the photographs of
                  --data, train/<class>/*.jpg and test/<class>/*.jpg (some thousands), else on synthetic birds

All cases run in a second process, scripts/gpu_cases.py, each within a time limit. If one fails, crashes or hangs, the
report says so, and a new process continues with the next; when the time is up, it names the cases left out (most of the
time is compilation). `--sections` runs some sections, into the same file: give another `--output` to keep both.
`--rehearse` tests everything at tiny sizes, also on a CPU.
"""

import argparse
import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("numerics", "scan", "networks", "pixels", "knobs", "distillation")
START_SECONDS = 120  # for a process to import everything
SCAN = dict(section="scan", shape="vim_tiny_stride8", batch=64, dtype="bfloat16")
STEP = dict(section="networks", network="student, training step", batch=8, dtype="float32")
LARGE = dict(section="pixels", pixels=1248, batch=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="time for all sections together")
    parser.add_argument("--data", type=Path, help="folder of photographs, for the distillation")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder of the report")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU too; the figures mean nothing")
    arguments = parser.parse_args()
    command = [sys.executable, str(ROOT / "scripts/gpu_cases.py"), "--sections", *arguments.sections]
    command += ["--data", str(arguments.data)] if arguments.data else []
    command += ["--rehearse"] if arguments.rehearse else []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as after Ctrl-C, the other process is ended first

    def save(results: list[dict]) -> None:
        print(progress(results[-1]), file=sys.stderr, flush=True)
        if "error" in results[0]:
            parser.exit(1, f"error: {results[0]['error'].removeprefix('SystemError: ')}\n")
        device = "rehearsal" if arguments.rehearse else results[0]["rows"][0]["device"]
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        arguments.output.mkdir(parents=True, exist_ok=True)
        write(arguments.output / f"{name}.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        write(arguments.output / f"{name}.md", markdown(results, arguments.sections))

    results = collect(command, time.monotonic() + 60 * arguments.minutes, save)
    print(markdown(results, arguments.sections))
    return 0


# ------------------------------------------------------------------------------------------------------ running cases


def collect(command: list[str], deadline: float, save: Callable[[list[dict]], None]) -> list[dict]:
    """Runs all cases of a command that works like scripts/gpu_cases.py.

    Args:
      command: the command, without `--start N`.
      deadline: the end of all cases, by `time.monotonic`.
      save: called after each case with the results so far.

    Returns:
      For each case its "section", "case", "seconds", and "rows" or "error".
    """
    cases, results = [], []
    while not cases or len(results) < len(cases):
        left = deadline - time.monotonic()
        if cases and left <= 0:
            results += [describe(case) | {"error": "left out: time was up"} for case in cases[len(results) :]]
            save(results)
            break
        with running([*command, "--start", str(len(results))]) as next_answer:
            listed = next_answer(min(START_SECONDS, left))
            if isinstance(listed, dict):  # it ended before listing its cases
                results.append((describe(cases[len(results)]) if cases else {"section": "start"}) | listed)
                save(results)
                if not cases:
                    break
                continue
            cases = listed
            while len(results) < len(cases):
                case, began = cases[len(results)], time.monotonic()
                answer = next_answer(min(case[2], deadline - began))
                results.append(describe(case) | {"seconds": round(time.monotonic() - began, 1)} | answer)
                save(results)
                if "error" in answer:
                    break
    return results


def describe(case: list) -> dict:
    """The fields of a result that identify its case."""
    return {"section": case[0], "case": case[1]}


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[Callable[[float], Any]]:
    """A context with a process, killed at its end; yields a function that waits some seconds for its next answer."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"} | os.environ | {"PYTHONPATH": paths}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
        )
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            for line in process.stdout:
                if line[:1] in "[{":  # an answer, not output of a library
                    lines.put(line)
            lines.put(None)

        def next_answer(seconds: float) -> Any:
            try:
                line = lines.get(timeout=max(seconds, 0.01))
            except queue.Empty:
                return {"error": f"stopped after {seconds:.0f} s"}
            if line is not None:
                return json.loads(line)
            log.seek(0)
            words = [text.strip() for text in log if text.strip()] or ["it said nothing"]
            return {"error": f"the process ended with status {process.wait()}: {words[-1][:300]}"}

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            yield next_answer
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join()
            process.stdout.close()


def write(path: Path, text: str) -> None:
    """Replaces a file in one step."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def progress(result: dict) -> str:
    """A line for the terminal."""
    end = f"  {result['error']}" if "error" in result else ""
    return f"{result.get('seconds', 0):>6.1f} s  {result['section']}: {result.get('case', '')}{end}"


# ---------------------------------------------------------------------------------------------------------- the report


def markdown(results: list[dict], sections: list[str] = SECTIONS) -> str:
    """The report: versions, targets, the fastest knobs, then a table for each section."""
    versions = results[0].get("rows", [{}])[0]
    parts = [f"# {versions.get('device', 'No device')}\n", "Written by `scripts/gpu_report.py`.\n"]
    parts += [f"* {name}: {cell(value)}" for name, value in versions.items()]
    parts += ["\n## Targets\n", table(targets(results))]
    for section in sections:
        chosen = [result for result in results if result["section"] == section]
        rows = [row for result in chosen for row in result.get("rows", [])]
        parts.append(f"\n## {section.capitalize()}\n")
        kinds = dict.fromkeys(tuple(row) for row in rows)
        parts += [table([row for row in rows if tuple(row) == kind]) for kind in kinds]
        if section == "knobs" and rows:
            parts += [f"* {line}" for line in fastest_knobs(rows)]
        parts += [f"* {result['case']}: {result['error']}" for result in chosen if "error" in result]
        parts += [] if chosen else ["* time was up before it began"]
    return "\n".join(parts) + "\n"


def table(rows: list[dict]) -> str:
    """Formats rows that have the same columns as Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(x) for x in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(value: Any) -> str:
    """Formats a value, numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def find(results: list[dict], column: str, **wanted: Any) -> float | None:
    """The value of a column in the first row with these values; None if it was not measured."""
    for result in results:
        for row in result.get("rows", []):
            row = {"section": result["section"]} | row
            if column in row and all(row.get(name) == value for name, value in wanted.items()):
                return row[column]
    return None


def targets(results: list[dict]) -> list[dict]:
    """Compares the kernels' targets with the measurements."""

    def value(column: str, given: dict, **wanted: Any) -> float | None:
        return find(results, column, **given, **wanted)

    def ratio(column: str, given: dict, name: str, slow: str, fast: str) -> float | None:
        ends = value(column, given, **{name: slow}), value(column, given, **{name: fast})
        return ends[0] / ends[1] if all(ends) else None

    at, by = "(64, 730, 384, 16), bfloat16", "implementation"
    rows = [
        (f"forward scan, share of the floor, {at}", 0.5, value("forward: of the floor", SCAN, implementation="pallas")),
        (f"forward and backward, the same, {at}", 0.3, value("both: of the floor", SCAN, implementation="pallas")),
        (f"forward, times faster than associative, {at}", 10, ratio("forward: ms", SCAN, by, "associative", "pallas")),
        (f"forward and backward, the same, {at}", 10, ratio("both: ms", SCAN, by, "associative", "pallas")),
        ("student's training step, times faster, batch 8", 1.5, ratio("ms", STEP, by, "associative", "pallas")),
        ("Vim-tiny at 1248², times faster than attention", 1, ratio("ms", LARGE, "network", "attention", "Vim-tiny")),
        ("the same, times smaller", 1, ratio("memory MB", LARGE, "network", "attention", "Vim-tiny")),
    ]
    verdict = {True: "yes", False: "no", None: "not measured"}
    return [
        {
            "target": text,
            "at least": least,
            "measured": "–" if measured is None else measured,
            "reached": verdict[None if measured is None else measured >= least],
        }
        for text, least, measured in rows
    ]


def fastest_knobs(rows: list[dict]) -> Iterator[str]:
    """Yields for each kernel and batch the fastest change, compared with the unchanged kernel."""
    for present in rows:
        if present["change"] == "as it is":
            same = [row for row in rows if all(row[name] == present[name] for name in ("kernel", "batch"))]
            best = min(same, key=lambda row: row["ms"])
            times = f"{best['ms']:.4g} ms, as it is {present['ms']:.4g} ms"
            yield f"{present['kernel']}, batch {present['batch']}: fastest {best['change']}: {times}"


if __name__ == "__main__":
    sys.exit(main())
