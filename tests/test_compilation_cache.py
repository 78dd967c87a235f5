"""Compiled programs on disk: where, and what the user has decided."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest

from kernels import build
from vimd_jax import compilation_cache
from vimd_jax.compilation_cache import keep_programs

ROOT = Path(__file__).parent.parent

# Without settings of JAX, but for the time from which on a program is kept.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_LOG_COMPILES": "1",
}

PROGRAM = """
import jax, vimd_jax
assert jax.config.jax_compilation_cache_dir is None, "changed by importing"
from vimd_jax.compilation_cache import keep_programs
keep_programs()
print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
jax.jit(lambda x: x + 1)(2.0)
"""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """JAX's settings as a new process has them, and an empty cache."""
    config = SimpleNamespace(
        jax_compilation_cache_dir=None,
        jax_enable_compilation_cache=True,
        jax_compilation_cache_max_size=-1,
        jax_persistent_cache_min_compile_time_secs=1.0,
    )
    config.values = vars(config)
    config.update = lambda name, value: setattr(config, name, value)
    monkeypatch.setattr(compilation_cache, "jax", SimpleNamespace(config=config))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return config


def test_the_second_process_finds_the_programs_of_the_first(tmp_path):
    def run() -> subprocess.CompletedProcess:
        environment = ENVIRONMENT | {"XDG_CACHE_HOME": str(tmp_path)}
        command = [sys.executable, "-c", PROGRAM]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)

    first, second = run(), run()
    folder, seconds = second.stdout.split()
    assert first.stdout == second.stdout and Path(folder).parent == tmp_path / "vimd_jax" and seconds == "0.0"
    assert "cache hit" not in first.stderr and "cache hit for 'jit__lambda" in second.stderr


def test_programs_are_bounded_and_those_that_take_time_kept(settings):
    keep_programs()
    assert 2**20 < settings.jax_compilation_cache_max_size <= 2**30
    assert 0 < settings.jax_persistent_cache_min_compile_time_secs < 1


@pytest.mark.parametrize(
    "decided", [("jax_compilation_cache_dir", "/elsewhere"), ("jax_enable_compilation_cache", False)]
)
def test_what_the_user_decided_stays(decided, settings):
    settings.update(*decided)
    before = vars(settings).copy()
    keep_programs()
    assert vars(settings) == before


def test_each_setting_of_the_user_stays(settings, monkeypatch):
    settings.jax_compilation_cache_max_size = 7
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    keep_programs()
    assert settings.jax_compilation_cache_dir and settings.jax_compilation_cache_max_size == 7
    assert settings.jax_persistent_cache_min_compile_time_secs == 1.0


def test_unlike_processors_share_no_program(settings, monkeypatch):
    keep_programs()
    folder, settings.jax_compilation_cache_dir = settings.jax_compilation_cache_dir, None
    monkeypatch.setattr(build, "processor", lambda: "another")
    keep_programs()
    assert Path(settings.jax_compilation_cache_dir).parent == Path(folder).parent
    assert settings.jax_compilation_cache_dir != folder


@pytest.mark.parametrize("fault", ["nowhere to write", "no locks"])
def test_without_a_place_nothing_is_kept(fault, settings, monkeypatch):
    def refuse(*_):
        raise NotImplementedError("FileSystem does not appear to support flock")

    if fault == "no locks":
        monkeypatch.setattr(filelock.FileLock, "_acquire", refuse)
    else:
        monkeypatch.setattr(build, "shared_folder", lambda: None)
    keep_programs()
    assert settings.jax_compilation_cache_dir is None


def test_what_a_killed_process_left_is_removed(settings):
    keep_programs()
    folder, settings.jax_compilation_cache_dir = Path(settings.jax_compilation_cache_dir), None
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (folder / name).touch()
    with filelock.FileLock(folder / ".lockfile"):  # another process is just writing
        keep_programs()
    assert (folder / "half-cache").exists()
    settings.jax_compilation_cache_dir = None
    keep_programs()
    assert sorted(path.name for path in folder.iterdir()) == [".lockfile", "whole-atime", "whole-cache"]
