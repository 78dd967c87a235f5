"""Compiled GPU kernels, executed on a CPU, where `triton` is installed: scans so small that compiling takes seconds."""

import importlib.util

import numpy as np
import pytest
import verify_ptx
from ptx.memory import Finding
from verify_ptx import Case, Machines

from kernels.scan import pallas, triton

SMALL = dict(batch=1, length=3, channels=37)
CASES = [
    (2, Case("pallas in chunks", state=2, chunked=True, inference=True, **SMALL)),
    (2, Case("pallas bfloat16", state=4, reverse=True, constant="B", dtype="bfloat16", **SMALL)),
    (1, Case("triton float16", "triton", state=2, dtype="float16", **SMALL)),
]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize(("window", "case"), CASES, ids=[case.name for _, case in CASES])
def test_a_small_scan_is_right(window, case, monkeypatch, tmp_path):
    monkeypatch.setenv("PTX_CACHE", str(tmp_path))
    for module, name in ((pallas, "WINDOW"), (pallas, "CHUNK"), (triton, "WINDOW")):
        monkeypatch.setattr(module, name, window)
    machines = Machines(90)
    errors = verify_ptx.run(case, machines)
    assert max(errors.values()) < verify_ptx.TOLERANCE, errors
    assert not machines.findings() and len(machines.reports) == (6 if case.chunked else 2)


def test_names_of_cases_are_unique():
    assert len({case.name for case in verify_ptx.CASES}) == len(verify_ptx.CASES)


def test_what_is_found_makes_the_command_fail(monkeypatch, capsys):
    def run(case, machines):
        report = machines.reports.append
        report((case.name, type("Report", (), {"findings": [Finding("race", "st", "x")] * (case.name == "state 8")})()))
        return {"y": 1e-3 if case.name == "large steps" else 1e-7}

    monkeypatch.setattr(verify_ptx, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for words, status in ((["state", "8"], 1), (["large"], 1), (["state", "1"], 0), (["float16"], 0), (["state 1"], 1)):
        monkeypatch.setattr("sys.argv", ["verify_ptx", *words, "--architectures", "90"])
        with pytest.raises(SystemExit) as ended:
            verify_ptx.main()
        assert ended.value.code == status, capsys.readouterr().out


def test_error_leaves_out_rounding():
    exact = np.array([1.0 + 2**-9, 3.0])
    assert verify_ptx.error(exact.astype(np.float32), exact) < 1e-7
    assert verify_ptx.error(exact.astype(verify_ptx.ml_dtypes.bfloat16), exact) == 0
    assert verify_ptx.error(np.array([1.25, 3.0], verify_ptx.ml_dtypes.bfloat16), exact) > 0.05
    assert verify_ptx.error(np.array([1.0, np.nan], np.float32), exact) == np.inf
