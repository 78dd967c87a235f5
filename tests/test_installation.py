"""The wheel, installed in an environment of its own: what it holds, and its commands in an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import golden
import pytest
from PIL import Image

from vimd_jax import __version__

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "vimd_jax", "weight_convert")

# A run of seconds.
TINY = [
    *("--config.dataset.synthetic_train_size=40", "--config.dataset.synthetic_test_size=8"),
    *("--config.student.embed_dim=16", "--config.student.depth=1", "--config.student.patch_size=16"),
    *("--config.student.stride=16", "--config.schedule.num_epochs=1", "--config.schedule.warmup_epochs=0"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built from a copy: a build writes beside its sources."""
    copy, output = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", output, copy)
    return next(output.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel, and with the libraries that it needs from here, but nothing of this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    pip("--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    (packages / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return folder


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for name in (*PACKAGES, "configs") for path in (ROOT / name).rglob("*.*") if path.is_file()]
    names = {path.relative_to(ROOT).as_posix() for path in files if path.suffix not in (".pyc", ".so")}
    assert held == {f"vimd_jax/{name}" if name.startswith("configs/") else name for name in names}
    assert wheel.name.split("-")[1] == __version__


def test_trains_evaluates_converts_and_predicts_in_an_empty_folder(environment, tmp_path):
    """The installed files may be read-only: nothing is written there."""

    def run(command: str, *arguments: str | Path) -> str:
        program = [environment / "bin" / command, *map(str, arguments)]
        settings = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        settings["PYTHONDONTWRITEBYTECODE"] = "1"
        result = subprocess.run(program, cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    before = installed_files(environment)
    config = ["--config", "quickstart:baseline", "--workdir", "run", *TINY]
    run("vimd-train", *config)
    assert "images 8" in run("vimd-evaluate", *config)

    checkpoint = golden.FOLDER / "checkpoints" / "vim_style.pth"
    options = ["--option", "embed_dim=48", "--option", "depth=4", "--option", "stride=8", "--image_size", "64"]
    run("vimd-convert", "--model", "vim_tiny", "--checkpoint", checkpoint, "--output", "vim", *options)
    run("vimd-export", "--checkpoint", "vim", "--output", "vim.safetensors")
    assert (tmp_path / "vim.safetensors").is_file()

    Image.new("RGB", (70, 64), "red").save(tmp_path / "red.png")
    assert "red.png" in run("vimd-predict", "--checkpoint", "vim", "red.png")
    assert installed_files(environment) == before


def installed_files(environment: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in environment.rglob("*")}
