"""Training states: two are kept, damage is noticed, and nothing that is not finite is written."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from vimd_jax.checkpoints import training_state
from vimd_jax.checkpoints.format import checksum_of
from vimd_jax.errors import CheckpointError


def state(step):
    return {"step": np.int32(step), "params": {"a": np.arange(4096, dtype=np.float32) + step}}


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 1, 2 and 3."""
    manager = training_state.open_folder(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        training_state.save_state(manager, step, state(step), {"window": [{"loss": step / 3}]})
    return tmp_path / "checkpoints"


def damage(folder, step):
    """Flips a byte in the middle of the largest file."""
    file = max((folder / str(step) / "arrays").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def restored(folder):
    return training_state.restore_state(training_state.open_folder(folder), state(0))


def test_the_latest_two_are_kept_and_read_back(folder):
    assert training_state.open_folder(folder).all_steps() == [2, 3]
    arrays, record = restored(folder)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, arrays, state(3))))
    assert record["window"] == [{"loss": 1.0}]


def test_nothing_there_yet(tmp_path):
    arrays, record = restored(tmp_path / "checkpoints")
    assert int(arrays["step"]) == 0 and record == {}


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(folder, how, caplog):
    if how == "flip":
        damage(folder, 3)
    else:
        for file in (folder / "3" / "arrays").rglob("*"):
            if file.is_file():
                file.unlink() if how == "remove" else file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    arrays, _ = restored(folder)
    assert int(arrays["step"]) == 2
    assert any("Checkpoint 3" in line and "moved to" in line and "\n" not in line for line in caplog.messages)
    assert (folder.parent / "damaged-checkpoint-3").is_dir()
    manager = training_state.open_folder(folder)
    training_state.save_state(manager, 3, state(3), {})  # the step comes again
    assert int(restored(folder)[0]["step"]) == 3


def test_no_whole_checkpoint_is_one_line(folder):
    damage(folder, 2), damage(folder, 3)
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* can be read \(step 3: .*step 2: .*Delete") as error:
        restored(folder)
    assert "\n" not in str(error.value)
    assert training_state.open_folder(folder).all_steps() == [2, 3]


def test_a_ruined_state_is_not_written(folder):
    ruined = state(4)
    ruined["params"]["a"][7] = np.nan
    manager = training_state.open_folder(folder)
    with pytest.raises(CheckpointError, match="params/a of the training state of step 4 is not finite"):
        training_state.save_state(manager, 4, ruined, {})
    assert int(restored(folder)[0]["step"]) == 3


def test_a_changed_record_is_noticed(folder):
    """A flipped bit there would rename a metric or change a step."""
    file = next(path for path in (folder / "3" / "record").rglob("*") if b'"window"' in path.read_bytes())
    file.write_bytes(file.read_bytes().replace(b'"loss"', b'"lors"'))
    assert int(restored(folder)[0]["step"]) == 2


def test_records_of_earlier_versions_are_read(folder):
    file = next(path for path in (folder / "3" / "record").rglob("*") if b'"window"' in path.read_bytes())
    record = json.loads(file.read_bytes())
    del record["sha256"]
    record["checksum"] = checksum_of({"step": np.int32(3), "params/a": state(3)["params"]["a"]})
    file.write_text(json.dumps(record))
    arrays, record = restored(folder)
    assert int(arrays["step"]) == 3 and record == {"window": [{"loss": 1.0}]}


_FULL_DISK = """
import logging, resource, signal, sys
import numpy as np
from pathlib import Path
from vimd_jax.checkpoints import training_state
from vimd_jax.log import readable_errors
manager = training_state.open_folder(Path(sys.argv[1]))
training_state.save_state(manager, 1, {"a": np.ones(10)}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
with readable_errors():
    training_state.save_state(manager, 2, {"a": np.random.default_rng(0).normal(size=10**6)}, {})
"""


def test_a_disk_that_is_too_full_is_not_written_to(folder, monkeypatch):
    monkeypatch.setattr(training_state.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000, total=2000))
    manager = training_state.open_folder(folder)
    with pytest.raises(CheckpointError, match=r"16,388 bytes are needed and 1,000 are free. Make room .*from step 3"):
        training_state.save_state(manager, 4, state(4), {})
    assert manager.all_steps() == [2, 3]


def test_a_file_system_that_does_not_count_is_written_to(folder, monkeypatch):
    monkeypatch.setattr(training_state.shutil, "disk_usage", lambda _: SimpleNamespace(free=0, total=0))
    manager = training_state.open_folder(folder)
    training_state.save_state(manager, 4, state(4), {})
    assert manager.latest_step() == 4


def test_a_full_disk_is_one_line(tmp_path):
    """Here files that may not grow; the threads that write have no word beside it."""
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path / "checkpoints")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    expected = (
        "error: A checkpoint could not be written to .*checkpoints: File too large. Make room there; .* from step 1."
    )
    assert re.fullmatch(expected, ended.stderr.strip()), ended.stderr
