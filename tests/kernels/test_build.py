"""Building C++ kernels: the cache, and what happens without a compiler that works."""

import concurrent.futures
import os
import stat
import time

import pytest

from kernels import build

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
    assert build._build(source) != library
    assert (tmp_path / "log").read_text() == "once\nonce\n"


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
    assert build._load(source, ("-DANSWER=42",)).answer() == 42


@needs_compiler
def test_each_value_of_a_macro_has_its_own_library(source, empty_cache):
    assert [build._load(source, (f"-DANSWER={value}",)).answer() for value in (1, 2)] == [1, 2]
    assert len(list(empty_cache.iterdir())) == 2


@needs_compiler
def test_a_library_without_the_handler_is_a_reason(source, empty_cache):
    assert "undefined symbol: question" in build.register(source, ("question",), ANSWER=42)


def test_what_is_cached_is_used_where_nothing_can_be_written(source, empty_cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'echo library > "$out"')
    library = build._build(source)
    monkeypatch.setattr(build, "_writable", None)
    assert build._build(source) == library


def test_without_a_writable_cache_it_builds_in_a_private_folder(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fake_compiler(tmp_path, monkeypatch, 'echo library > "$out"')
    build._private_folder.cache_clear()
    library = build._build(source)
    assert library.read_text() == "library\n" and stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    build._private_folder.cache_clear()


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
    assert build._load(source, ("-DANSWER=42",)).answer() == 42


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
