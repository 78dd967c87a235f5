"""The same numbers from one device, from four, and from two processes that train together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vimd_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent.parent


def start(stage: str, workdir: Path, *flags: str, devices: int = 1) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "vimd_jax.train",
        f"--config=tests/tiny.py:{stage}",
        f"--workdir={workdir}",
        *flags,
    ]
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def numbers(workdir: Path) -> list[float]:
    lines = read_metrics(workdir)
    assert lines
    names = ("loss", "gradient_norm", "top1", "top5", "psnr", "count")
    return [line["metrics"][name] for line in lines for name in names if name in line["metrics"]]


@pytest.mark.parametrize("stage", ["sr", "teacher"])
def test_four_devices_train_as_one(stage, tmp_path):
    flags = [] if stage == "sr" else ["--config.mixing.mixup_alpha=0.8", "--config.mixing.cutmix_alpha=1.0"]
    finish(start(stage, tmp_path / "one", *flags), start(stage, tmp_path / "four", *flags, devices=4))
    assert numbers(tmp_path / "four") == pytest.approx(numbers(tmp_path / "one"), rel=1e-5)


def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    together = ["--coordinator_address", address, "--num_processes", "2", "--process_id"]
    finish(
        start("teacher", tmp_path / "one"), *(start("teacher", tmp_path / "two", *together, str(i)) for i in range(2))
    )
    assert numbers(tmp_path / "two") == pytest.approx(numbers(tmp_path / "one"), rel=1e-5)
