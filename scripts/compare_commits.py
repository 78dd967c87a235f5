"""Runs a benchmark alternately in this checkout and in one of another commit, and compares the times.

    git worktree add ../before COMMIT
    python scripts/compare_commits.py ../before [--rounds 5] -- scripts/benchmark_model.py --sizes

Accepts any benchmark that has `--json`; one that the other commit lacks is run there too. A line gives the median time
in each checkout over all rounds, and the median of the ratios within a round, which is reliable even if the machine's
speed drifts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PARTS = ("forward", "both", "processor")
LABELS = ("network", "size", "shape", "batch", "dtype", "implementation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=5, help="runs in each checkout")
    parser.add_argument("benchmark", nargs="+", help="after --: the script and its options")
    arguments = parser.parse_args()
    script = HERE / arguments.benchmark[0]
    if not script.is_file():
        parser.error(f"{script}: no such file")
    rounds = []
    with tempfile.TemporaryDirectory() as programs:  # compiled in the first round, then reused
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            rounds.append([times(checkout, arguments.benchmark, programs) for checkout in (arguments.other, HERE)])
    print(f"{'':<60}{'other':>9}{'this':>9}{'ratio':>8}")
    for name in (name for name in rounds[0][1] if all(name in each for pair in rounds for each in pair)):
        pairs = [(other[name], this[name]) for other, this in rounds]
        other, this = (statistics.median(column) for column in zip(*pairs))
        ratio = statistics.median(this / other for other, this in pairs)
        print(f"{name:<60}{1e3 * other:>8.1f} ms{1e3 * this:>8.1f} ms{ratio:>8.3f}")


def times(checkout: Path, benchmark: list[str], programs: str) -> dict[str, float]:
    """Seconds of each row, or of each part of a row that has several."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "rows.json")
        environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "JAX_COMPILATION_CACHE_DIR": programs}
        script, *options = benchmark
        script = checkout / script if (checkout / script).is_file() else HERE / script  # a benchmark that is newer
        command = [sys.executable, str(script.resolve()), *options, "--json", str(output)]
        subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
        rows = json.loads(output.read_text())["rows"]
    found = {}
    for row in rows:
        name = ", ".join(str(value) for key, value in row.items() if key in LABELS)
        if "seconds" in row:
            found[name] = row["seconds"]
        found |= {f"{name}, {part}": x["milliseconds"] / 1e3 for part, x in row.items() if part in PARTS}
    return found


if __name__ == "__main__":
    main()
