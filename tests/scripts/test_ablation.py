"""The study of what each part brings: it goes on where it was killed; its intervals; wrong settings are one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts import ablation
from scripts.ablation import ARMS, RUNS, Result
from vimd_jax import train

SCRIPT = Path(ablation.__file__)
TRAINS = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "begun", "a") as log:
    log.write("x")
if (folder.parent.parent / f"kill {folder.name}").exists():
    sys.exit(137)
lines = [("validation", {"top1": 50.0, "count": 16.0}), ("test", {"top1": 40.0, "count": 10.0, "best_step": 2})]
lines = [{"step": 2, "epoch": 1.0, "split": split, "metrics": metrics} for split, metrics in lines]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


def start(folder: Path) -> subprocess.Popen:
    """A run that trains nothing, and is killed as long as STUDY/"kill NAME" is there."""
    return subprocess.Popen([sys.executable, "-c", TRAINS, str(folder)])


def study(folder: Path, **settings) -> dict:
    return ablation.settings(folder, {"config": "quickstart", "epochs": 4, **settings})


def result(arm: str, seed: int, score: float) -> Result:
    return Result(arm, seed, score, 50.0, 2, 2, 10, 16)


def test_a_study_that_was_killed_goes_on_without_losing_or_repeating_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "start", start)
    names = ablation.in_order(["start", "plain"])
    assert names == ["teacher", "sr-network", "start", "plain"]
    folders, tables = [tmp_path / f"seed{seed}" / name for seed in (0, 1) for name in names], []
    (tmp_path / "kill teacher").touch()
    lacking = ablation.run_all(folders, 2, lambda: tables.append(len(list(ablation.results(tmp_path, 2)))))
    assert [folder.name for folder in lacking] == ["teacher", "teacher", "start", "start"]
    assert tables[-1] == 2  # both plain arms; the networks of SR are no arms
    (tmp_path / "kill teacher").unlink()
    assert not ablation.run_all(folders, 2, lambda: None)
    assert {(x.arm, x.seed) for x in ablation.results(tmp_path, 2)} == {
        (arm, seed) for arm in ("teacher", "start", "plain") for seed in (0, 1)
    }
    begun = {folder.name: len((folder / "begun").read_text()) for folder in folders}
    assert begun == {"sr-network": 1, "teacher": 2, "start": 1, "plain": 1}


def test_paired_differences_and_their_intervals_are_those_computed_by_hand():
    found = [result("plain", seed, score) for seed, score in enumerate((10, 20, 30, 99))]
    found += [result("sr", seed, score) for seed, score in enumerate((11, 22, 33))]
    assert ablation.differences(found) == {"sr − plain": [1, 2, 3]}  # the fourth seed has no partner
    low, high, method = ablation.t_interval([1, 2, 3])  # mean 2, standard error 1 / √3, t(2) = 4.3027
    np.testing.assert_allclose([low, high], [2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5], rtol=1e-4)
    assert "Student's t" in method
    np.testing.assert_allclose(ablation.smallest_visible([1, 2, 3]), (4.3027 + 1.0607) / 3**0.5, rtol=1e-4)
    assert "| sr − plain | 3 | +2.0 | -0.5 to +4.5 | no clear difference | 3.1 |" in ablation.tables(found)
    assert "| plain | 1 | +2.0" not in ablation.tables(found[:1]) and "| 1 | 10.0 | – |" in ablation.tables(found[:1])


def test_results_are_written_with_a_picture(tmp_path):
    for arm, seed in (("plain", 0), ("sr", 0), ("plain", 1)):
        start(tmp_path / f"seed{seed}" / arm).wait()
    ablation.write(tmp_path, 2)
    assert (tmp_path / "arms.png").read_bytes().startswith(b"\x89PNG")
    rows = (tmp_path / "runs.csv").read_text().splitlines()
    assert rows == [",".join(Result._fields), *(f"{run},40.0,50.0,2,2,10,16" for run in ("plain,0", "plain,1", "sr,0"))]
    assert "| sr − plain | 1 | +0.0 | – | – | – |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("name", RUNS)
def test_every_run_has_a_config_that_differs_only_as_its_arm_says(tmp_path, name):
    study(tmp_path, generic=str(tmp_path), set=["dataset.synthetic_train_size=320", "optimizer.b1=0.8"])
    config = ablation.get_config(str(tmp_path / "seed3" / name))
    assert (config.seed, config.selection, config.optimizer.b1) == (3, "validation", 0.8)
    if name in ARMS:
        assert config.schedule.num_epochs == 4 * ARMS[name].times
        inits = {role: config[role].init for role in ("sr", "teacher", "student") if role in config}
        assert {Path(init).name for init in inits.values() if init} >= set(ARMS[name].needs)
    if name == ablation.GENERIC:
        own = ablation.get_config(str(tmp_path / "seed3" / "sr-network"))
        assert config.schedule.num_steps == own.schedule.num_epochs * 320 // own.batch_size


def test_arms_differ_from_sr_in_their_part_alone(tmp_path):
    study(tmp_path)
    sr, start, low = (
        ablation.flat(ablation.get_config(str(tmp_path / "seed0" / name)).to_dict())
        for name in ("sr", "start", "low-teacher")
    )
    assert {name for name in sr if sr[name] != start[name]} == {"student.init"}
    assert low["teacher.init"] == low["student.init"] == str(tmp_path / "seed0" / "sr")
    assert low["loss.teacher_view"] == "low"


def test_a_run_can_start_as_soon_as_what_it_needs_is_there(tmp_path):
    study(tmp_path)
    folder = tmp_path / "seed0" / "everything"
    config = ablation.get_config(str(folder))
    with pytest.raises(FileNotFoundError):
        train.check(config, folder)
    for name in ARMS["everything"].needs:
        folder.with_name(name).mkdir(parents=True, exist_ok=True)
    train.check(config, folder)


def test_other_images_can_be_added_later_but_not_changed(tmp_path):
    study(tmp_path)
    (tmp_path / "seed0").mkdir()
    study(tmp_path, generic="flowers", arms=["sr-generic"])
    with pytest.raises(ValueError, match="--generic: .* was begun with 'flowers'"):
        study(tmp_path, generic="cars")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "plane"], "error: --arms: there is no arm 'plane', choose from teacher, plain, "),
        (["--arms", "sr-generic"], "error: --arms: sr-generic needs --generic"),
        (["--set", "optimiser.b1=0.8"], "error: --set: no stage of quickstart has a field optimiser.b1."),
        (["--set", "sr.init=pretrained"], "error: --set: sr.init is for the arms"),
        (["--epochs", "3"], "error: --epochs: "),
        (["--seeds", "0"], "error: --seeds is 0"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(ablation, "start", None)  # nothing runs
    monkeypatch.setattr(ablation.signal, "signal", lambda *_: None)
    given = ["--study", str(tmp_path), "--config", "quickstart", "--epochs", "4", *arguments]
    if "--epochs" in arguments:
        study(tmp_path)
        (tmp_path / "seed0").mkdir()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
    with pytest.raises(SystemExit):
        ablation.main()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(message)
