"""Building C++ kernels: the cache, and what happens without a compiler that works."""

import concurrent.futures
import os
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kernels import build

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(not build.compiler(), reason="no C++ compiler")


@pytest.fixture
def source(tmp_path):
    """A C++ file with one function."""
    path = tmp_path / "kernel" / "answer.cc"
    path.parent.mkdir()
    path.write_text('extern "C" int answer() { return ANSWER; }\n')
    return path


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vimd_jax"


def fake_compiler(folder, monkeypatch, compile: str) -> None:
    """A compiler that runs a shell command with the output path in $out."""
    script = folder / "fake-c++"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo fake 1.0; exit; }\nfor out; do :; done\n' + compile + "\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))


def test_a_build_is_cached_by_all_that_goes_into_it(source, empty_cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'echo once >> log; echo library > "$out"')
    monkeypatch.chdir(tmp_path)
    library = build._build(source)
    assert library == build._build(source) and library.read_text() == "library\n"
    assert (tmp_path / "log").read_text() == "once\n"
    monkeypatch.setenv("CXXFLAGS", "-g")
    with_debugging = build._build(source)
    header = tmp_path / "answer.h"
    header.write_text("#define ANSWER 42")
    monkeypatch.setattr(build, "HEADERS", [header])
    assert len({library, with_debugging, build._build(source)}) == 3
    assert (tmp_path / "log").read_text() == "once\n" * 3


def test_builds_at_the_same_time_never_show_half_a_file(source, empty_cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'printf first > "$out"; sleep 0.2; printf second >> "$out"')
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(lambda _: build._build(source).read_text(), range(8)))
    assert seen == ["firstsecond"] * 8
    assert [path.suffix for path in empty_cache.iterdir()] == [".so"]


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nonexistent/c++", "No such file or directory: '/nonexistent/c++'"),
        ("false", "false failed"),
        ("fake", "failed: answer.cc:1: error: no such flag"),
        ("g++ '", "No closing quotation"),
    ],
)
def test_without_a_working_compiler_there_is_one_line_of_reason(
    compiler, reason, source, empty_cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("CXX", compiler)
    if compiler == "fake":
        fake_compiler(tmp_path, monkeypatch, "echo 'answer.cc:1: error: no such flag' >&2; exit 1")
    message = build.register(source, ("answer",))
    assert reason in message and "\n" not in message


def test_no_compiler_at_all(source, empty_cache, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert build.register(source, ("answer",)) == "no C++ compiler: install g++ or clang++, or set CXX"


def test_a_library_that_does_not_load_is_a_reason(source, empty_cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'echo no library > "$out"')
    reason = build.register(source, ("answer",))
    assert "invalid ELF header" in reason or "file too short" in reason


@needs_compiler
def test_a_damaged_library_is_built_again(source, empty_cache):
    library = build._build(source, ("-DANSWER=42",))
    library.write_text("")
    assert build._load(source, ("-DANSWER=42",))[1].answer() == 42


@needs_compiler
def test_each_value_of_a_macro_has_its_own_library(source, empty_cache):
    assert [build._load(source, (f"-DANSWER={value}",))[1].answer() for value in (1, 2)] == [1, 2]
    assert len(list(empty_cache.iterdir())) == 2


@needs_compiler
def test_a_library_without_the_handler_is_a_reason(source, empty_cache):
    assert "undefined symbol: question" in build.register(source, ("question",), ANSWER=42)


def test_what_is_cached_is_used_where_nothing_can_be_written(source, empty_cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'echo library > "$out"')
    library = build._build(source)
    monkeypatch.setattr(build, "_writable", None)
    assert build._build(source) == library


@pytest.mark.parametrize("home", ["no home", "not writable"])
def test_without_a_writable_cache_a_folder_among_the_temporary_files_serves(home, source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", "" if home == "no home" else str(tmp_path / "file"))
    monkeypatch.setattr(build.os.path, "expanduser", lambda path: path)  # as it does without a home
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fake_compiler(tmp_path, monkeypatch, 'echo library > "$out"')
    library = build._build(source)
    assert library.read_text() == "library\n" and library.parent == tmp_path / f"vimd_jax-{os.getuid()}"
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    monkeypatch.setenv("CXX", "/nonexistent")
    assert build._build(source) == library


@pytest.mark.parametrize("trap", ["folder", "link"])
def test_a_temporary_folder_of_somebody_else_is_not_used(trap, source, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_cache_folders", lambda: [tmp_path / "theirs"])
    (tmp_path / "target").mkdir()
    if trap == "folder":
        (tmp_path / "theirs").mkdir()
    else:
        (tmp_path / "theirs").symlink_to(tmp_path / "target")
    if os.getuid() == 0:
        os.chown(tmp_path / "theirs", 12345, -1, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    fake_compiler(tmp_path, monkeypatch, 'echo library > "$out"')
    library = build._build(source)
    assert library.read_text() == "library\n" and library.parent not in (tmp_path / "theirs", tmp_path / "target")
    build._private_folder.cache_clear()


def test_a_cached_library_needs_no_compiler(source, empty_cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'echo library > "$out"')
    library = build._build(source)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert build._build(source) == library
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        build._build(source, ("-DOTHER",))


def test_a_killed_build_leaves_nothing_in_the_cache(source, empty_cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'echo half > "$out"; touch begun; sleep 60')
    monkeypatch.chdir(tmp_path)
    code = f"import sys, pathlib; sys.path[:0] = {sys.path!r}; from kernels import build; "
    process = subprocess.Popen([sys.executable, "-c", f"{code}build._build(pathlib.Path({str(source)!r}))"])
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert list(empty_cache.iterdir()) == []


def test_a_library_for_a_named_processor_is_the_same_on_every_machine(source, empty_cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'echo "$@" > "$out"')
    here = build._build(source)
    assert "=native" in here.read_text()
    monkeypatch.setenv("CXXFLAGS", "-march=x86-64-v3")
    portable = build._build(source)
    assert "=native" not in portable.read_text()
    monkeypatch.setattr(build, "processor", lambda: "another")
    assert build._build(source) == portable
    monkeypatch.delenv("CXXFLAGS")
    assert build._build(source) != here


@needs_compiler
def test_the_command_builds_ahead(empty_cache, monkeypatch):
    monkeypatch.setenv("CXXFLAGS", "-O0")  # compiles in less time
    command = [sys.executable, "-m", "kernels.build"]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    assert sorted(map(str, empty_cache.iterdir())) == sorted(built.stdout.split())
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | dict(PATH="", CXX=""))
    assert again.stdout == built.stdout
    for library in empty_cache.iterdir():
        library.unlink()
    failed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | dict(PATH="", CXX=""))
    assert failed.returncode == 1 and "selective scan: no C++ compiler" in failed.stderr


@pytest.mark.parametrize("writable_by_others", ["file", "folder"])
def test_a_library_that_another_user_could_have_written_is_not_loaded(
    writable_by_others, source, empty_cache, tmp_path, monkeypatch
):
    fake_compiler(tmp_path, monkeypatch, 'echo library > "$out"')
    library = build._build(source)
    library.write_text("somebody else's")
    (library if writable_by_others == "file" else empty_cache).chmod(0o777)
    if writable_by_others == "folder":  # a folder of our own is closed again, another's is not used
        monkeypatch.setattr(build.Path, "chmod", lambda *_: (_ for _ in ()).throw(PermissionError()))
        monkeypatch.setattr(build, "_compile", lambda source, macros, library: library)
        assert build._build(source).parent != empty_cache
    else:
        assert build._build(source).read_text() == "library\n"


def test_a_library_of_another_user_is_not_loaded(source, empty_cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'echo library > "$out"')
    library = build._build(source)
    if os.getuid() == 0:
        os.chown(library, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not build._trusted(library)


@needs_compiler
def test_a_damaged_library_that_cannot_be_removed_is_built_elsewhere(source, empty_cache, monkeypatch):
    build._build(source, ("-DANSWER=42",)).write_text("")

    def refuse(*_, **__):
        raise PermissionError

    monkeypatch.setattr(build.Path, "unlink", refuse)
    assert build._load(source, ("-DANSWER=42",))[1].answer() == 42


def test_a_library_may_be_written_by_nobody_else_whatever_the_umask(source, empty_cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'echo library > "$out"')
    before = os.umask(0)
    try:
        library = build._build(source)
    finally:
        os.umask(before)
    assert build._trusted(library) and build._trusted(empty_cache) and build._build(source) == library


def test_a_compiler_that_hangs_is_stopped_with_all_it_started(source, empty_cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, "sleep 60 | cat")
    monkeypatch.setattr(build, "COMPILE_SECONDS", 0.5)
    began = time.monotonic()
    assert "took over 0.5 seconds and was stopped" in build.register(source, ("answer",))
    assert time.monotonic() - began < 30


def test_libraries_used_long_ago_are_removed(source, empty_cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'echo library > "$out"')
    first = build._build(source, ("-D0",))
    for i in range(1, build.KEPT):
        os.utime(build._build(source, (f"-D{i}",)), (i, i))
    build._build(source, ("-D0",))  # used again
    build._build(source, ("-Dlast",))
    assert len(list(empty_cache.iterdir())) == build.KEPT and first.exists()


def test_the_c_library_is_part_of_the_name(source, empty_cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'echo library > "$out"')
    library = build._build(source)
    monkeypatch.setattr(build.platform, "libc_ver", lambda: ("musl", "1.2"))
    assert build._build(source) != library
