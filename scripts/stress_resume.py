"""Kills a small training run at random moments, continues it, and checks that the result is the same.

    python scripts/stress_resume.py --kills 30
    python scripts/stress_resume.py --kills 10 --processes 2

Every kill is a SIGKILL, followed by the same command. With several processes one is killed, and the others must exit
within a minute, with one line that says why. At the end, parameters and metrics must equal those of an uninterrupted
run to the bit, with no line repeated or lost; otherwise the exit status is 1.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from vimd_jax.checkpoints import training_state
from vimd_jax.load import load_model
from vimd_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
SETTINGS = ("--config.schedule.num_epochs=12", "--config.checkpoint_every_steps=2", "--config.log_every_steps=3")
TIMES = ("images_per_second", "input_wait")  # metrics that depend on the clock


def start(workdir: Path, processes: int) -> list[subprocess.Popen]:
    """Starts the processes of one run, whose commands differ only in the process number."""
    command = [sys.executable, "-m", "vimd_jax.train", "--config=tests/tiny.py:teacher", f"--workdir={workdir}"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"--coordinator_address=localhost:{free.getsockname()[1]}"
    together = [[address, f"--num_processes={processes}", f"--process_id={i}"] for i in range(processes)]
    return [
        subprocess.Popen(
            [*command, *SETTINGS, *(extra if processes > 1 else [])],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for extra in together
    ]


def finish(run: list[subprocess.Popen], seconds: float) -> list[str]:
    """Waits for the processes and returns their output.

    Raises:
      subprocess.TimeoutExpired: a process has not exited in time.
    """
    return [process.communicate(timeout=seconds)[1] for process in run]


def outcome(workdir: Path) -> tuple[list[np.ndarray], list[dict]]:
    """The last parameters and optimiser state, the best network, and the metrics of a finished run."""
    checkpoints = training_state.open_folder(workdir / "checkpoints")
    state = checkpoints.restore(checkpoints.latest_step()).arrays
    lines = read_metrics(workdir)
    for line in lines:
        line["metrics"] = {name: value for name, value in line["metrics"].items() if name not in TIMES}
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state, load_model(workdir).variables))], lines


def kill_once(workdir: Path, processes: int, longest: float) -> bool:
    """Starts the run and kills one process at a random moment; returns False if the run ended before that."""
    run, victim = start(workdir, processes), random.randrange(processes)
    time.sleep(random.uniform(0, longest))
    if run[victim].poll() is not None:
        finish(run, 120)
        return False
    run[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    said = finish(run, 90)
    waited = time.monotonic() - began
    survivors = [text for i, text in enumerate(said) if i != victim]
    clear = all("another process of this run has ended" in text for text in survivors)
    print(f"killed process {victim}" + (f"; the other ended {waited:.0f} s later" if survivors else ""), flush=True)
    if waited > 60 or not clear:
        sys.exit("\n".join(["error: a surviving process did not exit in time with a clear message", *survivors]))
    return True


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference"
        began = time.monotonic()
        finish(start(reference, arguments.processes), 600)
        longest = time.monotonic() - began
        expected = outcome(reference)
        kills, runs = 0, 0
        while kills < arguments.kills:
            workdir = Path(folder) / str(runs)
            while kills < arguments.kills and kill_once(workdir, arguments.processes, longest):
                kills += 1
            finish(start(workdir, arguments.processes), 600)
            leaves, lines = outcome(workdir)
            if lines != expected[1] or not all(map(np.array_equal, leaves, expected[0])):
                sys.exit(f"error: run {runs}, after {kills} kills, differs from an uninterrupted one")
            runs += 1
            print(f"{kills} kills so far, {runs} finished runs equal to the uninterrupted one", flush=True)


if __name__ == "__main__":
    main()
