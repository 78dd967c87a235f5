"""Two runs never train in one folder, with locks of files or without."""

import errno
import json
import os
import time

import pytest

from vimd_jax.training import lock


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def without_locks(monkeypatch, request):
    def unsupported(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)


def test_a_folder_without_locks_is_held_all_the_same(tmp_path, without_locks, caplog):
    with lock.hold(tmp_path):
        assert "cannot be locked" in caplog.messages[0] and str(tmp_path) in caplog.messages[0]
        with (
            pytest.raises(ValueError, match=f"another process is training there .process {os.getpid()} on "),
            lock.hold(tmp_path),
        ):
            pass
    with lock.hold(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == [".lock"]


def test_windows_has_no_locks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "fcntl", None)
    with lock.hold(tmp_path):
        assert "no flock on this system" in caplog.messages[0]


@pytest.mark.parametrize(
    ("changes", "age", "held"),
    [
        ({}, 0, True),
        ({"host": "elsewhere"}, 0, True),  # whose processes cannot be asked after
        ({"space": "pid:[1]"}, 0, True),  # nor those of another container
        ({"host": "elsewhere"}, lock.SILENCE + 1, False),
        ({"process": 2**22 + 1}, 0, False),  # a number that no process has
        (None, 0, True),  # being written
        (None, lock.SILENCE + 1, False),
    ],
    ids=str,
)
def test_signs_of_life(tmp_path, monkeypatch, changes, age, held):
    monkeypatch.setattr(lock, "fcntl", None)
    path = tmp_path / ".running"
    path.write_text("" if changes is None else json.dumps(lock._this_process() | changes))
    os.utime(path, (time.time() - age,) * 2)
    if held:
        with pytest.raises(ValueError, match="is training there"), lock.hold(tmp_path):
            pass
    else:
        with lock.hold(tmp_path):
            assert json.loads(path.read_text()) == lock._this_process()


def test_a_run_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with lock.hold(tmp_path):
        os.utime(tmp_path / ".running", (0, 0))
        end = time.monotonic() + 10
        while (tmp_path / ".running").stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.02)
        assert (tmp_path / ".running").stat().st_mtime > 0


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match=r"run/\.lock is a link: remove it"), lock.hold(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"
