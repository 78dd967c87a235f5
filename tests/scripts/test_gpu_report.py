"""The GPU report: a rehearsal without a GPU; cases that fail, crash or hang; its tables; its kernels."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels.scan import pallas
from kernels.scan.inputs import ScanInputs
from kernels.scan.shapes import SHAPES
from scripts import gpu_report
from vimd_jax.config import check_settings
from vimd_jax.training.optimizer import create_schedule

SCRIPTS = Path(gpu_report.__file__).parent


@pytest.fixture
def gpu_cases(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu_cases

    return gpu_cases


def start(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPTS / "gpu_report.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_rehearsal(tmp_path):
    ended = start("--rehearse", "--output", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"rehearsal.json", "rehearsal.md"}
    results = json.loads((tmp_path / "rehearsal.json").read_text())
    assert {result["section"] for result in results} == {"device", *gpu_report.SECTIONS}
    for result in results:
        assert result["rows"] and "error" not in result, result
    rows = {result["section"]: result["rows"][0] for result in results}
    assert rows["device"]["jax"] == jax.__version__
    assert rows["numerics"]["float32: y"] < rows["numerics"]["bfloat16: y"] < 0.01
    assert rows["numerics"]["float32: gradients"] < 1e-5 and rows["numerics"]["float32: same bits"] == "yes"
    assert rows["distillation"]["loss at first"] > 0
    table = (tmp_path / "rehearsal.md").read_text()
    assert table in ended.stdout
    for section in gpu_report.SECTIONS:
        assert f"\n## {section.capitalize()}\n\n| " in table


def test_without_a_gpu_one_line_says_so(tmp_path):
    ended = start("--output", tmp_path)
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 1 and last.startswith("error: this needs a GPU, and JAX runs on cpu here")
    assert not list(tmp_path.iterdir())


WORKER = """
import json, os, sys, time
cases = [["a", "fine", 60], ["a", "raises", 60], ["b", "crashes", 60], ["b", "hangs", 0.5], ["b", "fine", 60]]
cases.append(["c", "late", 60])
print("a library says this")
print(json.dumps(cases), flush=True)
for section, name, _ in cases[int(sys.argv[-1]):]:
    if name == "raises":
        sys.exit(print(json.dumps({"error": "ValueError: no"}), flush=True))
    if name == "crashes":
        print("a fault", file=sys.stderr, flush=True)
        os.abort()
    if name in ("hangs", "late"):
        time.sleep(600)
    print(json.dumps({"rows": [{"x": 0.123456}]}), flush=True)
"""


def run_worker(tmp_path, seconds: float, code: str = WORKER) -> tuple[list[dict], list[int]]:
    (tmp_path / "worker.py").write_text(code)
    command, saved = [sys.executable, str(tmp_path / "worker.py")], []
    deadline = time.monotonic() + seconds
    results = gpu_report.collect(command, deadline, lambda results: saved.append(len(results)))
    assert time.monotonic() < deadline + 5
    return results, saved


def test_a_case_that_fails_leaves_the_others(tmp_path):
    results, saved = run_worker(tmp_path, seconds=5)
    assert saved == [1, 2, 3, 4, 5, 6]
    assert [(result["section"], result["case"]) for result in results] == [
        *[("a", "fine"), ("a", "raises"), ("b", "crashes"), ("b", "hangs"), ("b", "fine"), ("c", "late")]
    ]
    assert results[0]["rows"] == results[4]["rows"] == [{"x": 0.123456}]
    assert results[1]["error"] == "ValueError: no"
    assert results[2]["error"].startswith("the process ended with status -6: a fault")
    assert results[3]["error"].startswith("stopped after 0") or results[3]["error"].startswith("stopped after 1")
    assert results[5]["error"].startswith("stopped after ")
    table = gpu_report.markdown(results, ["a", "b", "c"])
    assert "| x |\n| --- |\n| 0.1235 |\n\n* raises: ValueError: no" in table
    assert "## C\n\n* late: stopped after" in table


def test_when_time_is_up_the_rest_is_named(tmp_path):
    """The case before the last uses up the time."""
    code = WORKER.replace('["b", "hangs", 0.5]', '["b", "hangs", 60]')
    results, _ = run_worker(tmp_path, seconds=2, code=code)
    assert [result.get("error") for result in results][4:] == ["left out: time was up"] * 2
    assert gpu_report.markdown(results, ["c"]).endswith("## C\n\n* late: left out: time was up\n")


def test_a_worker_that_does_not_start_is_an_error(tmp_path):
    results, _ = run_worker(tmp_path, seconds=60, code="import not_there")
    assert [result["section"] for result in results] == ["start"]
    assert "ModuleNotFoundError: No module named 'not_there'" in results[0]["error"]


def test_targets():
    def row(section, **columns):
        return {"section": section, "case": "", "rows": [columns]}

    scan, step = (
        {name: value for name, value in given.items() if name != "section"}
        for given in (gpu_report.SCAN, gpu_report.STEP)
    )
    times = {"forward: of the floor": 0.6, "both: of the floor": 0.2, "forward: ms": 1.0, "both: ms": 2.0}
    slow = {"forward: ms": 15.0, "both: ms": 18.0}
    results = [
        row("scan", **scan | {"batch": 1}, implementation="pallas", **dict.fromkeys(times, 99.0)),
        row("scan", **scan, implementation="pallas", **times),
        row("scan", **scan, implementation="associative", **slow),
        row("networks", **step, implementation="pallas", ms=10.0),
        {"section": "networks", "case": "associative", "error": "out of memory"},
        row("pixels", network="Vim-tiny", pixels=1248, batch=1, ms=5.0) | {},
        row("pixels", network="attention", pixels=1248, batch=1, ms=20.0),
    ]
    found = [(target["measured"], target["reached"]) for target in gpu_report.targets(results)]
    absent = "–", "not measured"
    assert found == [(0.6, "yes"), (0.2, "no"), (15.0, "yes"), (9.0, "no"), absent, (4.0, "yes"), absent]


def test_the_fastest_knob():
    rows = [
        {"kernel": kernel, "batch": 64, "change": change, "ms": ms}
        for kernel, change, ms in (
            *(("forward", "as it is", 3.0), ("forward", "block=64", 2.0)),
            *(("backward", "block=64", 1.0), ("backward", "as it is", 0.5)),
        )
    ]
    assert list(gpu_report.fastest_knobs(rows)) == [
        "forward, batch 64: fastest block=64: 2 ms, as it is 3 ms",
        "backward, batch 64: fastest as it is: 0.5 ms, as it is 0.5 ms",
    ]


def test_the_first_knobs_are_the_kernels_as_they_are(gpu_cases):
    inputs = ScanInputs(**inputs_of(gpu_cases, 64))
    for kernel, plan in (("forward", pallas.forward_plan), ("backward", pallas.backward_plan)):
        usual = plan(inputs)
        with gpu_cases.changed(kernel, {}):
            assert getattr(pallas, f"{kernel}_plan")(inputs) == usual
    assert all(gpu_cases.changes(*key)[0] == {} for key in gpu_cases.KNOBS)


def inputs_of(gpu_cases, batch: int) -> dict:
    return jax.eval_shape(lambda: gpu_cases.benchmark_scan.make_inputs(SHAPES["vim_tiny_stride8"], batch, jnp.bfloat16))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_every_knob_lowers_for_cuda(gpu_cases, kernel):
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    inputs, codes = inputs_of(gpu_cases, 64), []
    for change in gpu_cases.changes(kernel, 64):
        jax.clear_caches()
        with gpu_cases.changed(kernel, change), use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
            function = jax.jit(gpu_cases.knob_function(kernel))
            codes.append(function.trace(inputs).lower(lowering_platforms=("cuda",)).as_text())
    assert all("xla.gpu.triton" in code for code in codes)
    for code, other in itertools.combinations(codes, 2):
        assert code != other  # each change has an effect


def test_the_short_distillation_is_a_valid_run(gpu_cases, tmp_path):
    for stage, _ in gpu_cases.stages(gpu_cases.quickstart.get_config(), tmp_path):
        gpu_cases.shorten(stage, "bfloat16")
        check_settings(stage)
        create_schedule(stage.schedule, steps_per_epoch=50)
        assert all(stage[role].dtype == "bfloat16" for role in ("teacher", "student") if role in stage)


def test_every_case_has_a_name_of_its_own_and_a_limit(gpu_cases):
    cases = gpu_cases.cases(None)
    assert len({case[:2] for case in cases}) == len(cases)
    assert {case.section for case in cases} == {"device", *gpu_report.SECTIONS}
    assert all(0 < case.seconds <= 180 for case in cases)
