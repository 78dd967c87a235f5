"""The same numbers from one device, from four, and from two processes that train together."""

import os
import shutil
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from vimd_jax.errors import TrainingError
from vimd_jax.training import parallel
from vimd_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent.parent


def start(
    stage: str, workdir: Path, *flags: str, devices: int = 1, variables: dict[str, str] | None = None
) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "vimd_jax.train",
        f"--config=tests/tiny.py:{stage}",
        f"--workdir={workdir}",
        *flags,
    ]
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} | (variables or {})
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


@pytest.fixture
def together():
    """The flags of the second and later processes of a run, but for their number."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return ["--coordinator_address", address, "--num_processes", "2", "--process_id"]


def test_processes_of_a_job_find_each_other(tmp_path):
    """As SLURM tells them, whose variables stand for a job here."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    run = [
        start("teacher", tmp_path, "--distributed", variables=job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": "0"})
        for i in range(2)
    ]
    finish(*run)
    assert numbers(tmp_path)


def test_without_a_job_there_is_nothing_to_find(tmp_path):
    process = start("teacher", tmp_path, "--distributed")
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and len(said.splitlines()) == 1
    assert "--distributed: JAX cannot tell from SLURM, Open MPI or Kubernetes whose job this is" in said


def test_two_processes_train_as_one(tmp_path, together):
    """And need not share a workdir: the first one decides."""
    finish(
        start("teacher", tmp_path / "one"),
        start("teacher", tmp_path / "two", *together, "0"),
        start("teacher", tmp_path / "elsewhere", *together, "1"),
    )
    assert numbers(tmp_path / "two") == pytest.approx(numbers(tmp_path / "one"), rel=1e-5)
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_continues_on_another_number_of_devices(tmp_path):
    """Stochastic depth and all: what is drawn does not depend on the devices."""
    drops = "--config.teacher.drop_path_rate=0.5"
    finish(start("teacher", tmp_path / "one", drops))
    process = start("teacher", tmp_path / "moved", drops)
    with process:
        for line in process.stderr:
            if "step 2/" in line:
                process.terminate()
    assert process.returncode == 143
    finish(start("teacher", tmp_path / "moved", drops, devices=4))
    assert numbers(tmp_path / "moved") == pytest.approx(numbers(tmp_path / "one"), rel=1e-4)


def test_the_failure_of_one_process_ends_the_other(tmp_path, together):
    for label in "ab":
        for split, count in {"train": 8, "test": 2}.items():
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40)).save(folder / f"{i}.png")
    shutil.copytree(tmp_path / "images", tmp_path / "damaged")
    for file in (tmp_path / "damaged" / "train").glob("*/*.png"):
        file.write_bytes(file.read_bytes()[:40])
    folders = [f"--config.dataset.directory={tmp_path / name}" for name in ("images", "damaged")]
    flags = ["--config.dataset.name=folder", "--config.batch_size=2"]
    run = [start("teacher", tmp_path / "run", *flags, folders[i], *together, str(i)) for i in range(2)]
    said = [process.communicate(timeout=100)[1].strip().splitlines() for process in run]
    assert [process.returncode != 0 for process in run] == [True, True]
    assert any("replace it, or set config.dataset.on_error=skip" in line for line in said[1])
    assert "error: this or another process of this run has ended or cannot be reached" in said[0][-1]
    assert not any("Traceback" in line for lines in said for line in lines)


def test_processes_that_would_compute_differently_are_stopped(monkeypatch):
    other = zlib.crc32(b"native") % 2**30
    monkeypatch.setattr(parallel, "any_process", lambda number: max(number, other if number > 0 else -other))
    parallel.check_same_computation("native")
    for text in ("sequential", "associative"):
        with pytest.raises(TrainingError, match=f"this one has {text}"):
            parallel.check_same_computation(text)


@pytest.mark.parametrize(
    ("address", "message"),
    [("no.such.host.invalid:1234", "--coordinator_address=no.such.host.invalid:1234 is not host:port"), ("x", "x is")],
)
def test_an_address_that_does_not_resolve_is_one_line(tmp_path, address, message):
    process = start("teacher", tmp_path, "--coordinator_address", address, "--num_processes=2", "--process_id=0")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and message in said and len(said.splitlines()) == 1
