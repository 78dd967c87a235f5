"""Reads tests/golden/, recorded results of the original PyTorch code (see tests/golden/README.md)."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent / "golden"


def cases(pattern: str) -> list[str]:
    """Names of the recorded cases that match a glob pattern; never empty, so that no test is skipped unnoticed."""
    names = sorted(path.name for path in FOLDER.glob(pattern) if path.is_dir())
    assert names, f"no golden case matches {pattern}"
    return names


def tensors(case: str, file: str = "io") -> dict[str, np.ndarray]:
    """The arrays of one case; `file` is "io", "weights", "teacher_weights" or "sr_weights"."""
    return load_file(FOLDER / case / f"{file}.safetensors")


def meta(case: str) -> dict:
    """Constructor arguments and provenance of one case."""
    return json.loads((FOLDER / case / "meta.json").read_text())


def scan_case(case: str) -> tuple[dict, dict, dict]:
    """Inputs in this project's layout, expected results and expected gradients by argument, of one recorded case."""
    arrays = {}
    for name, x in tensors(case).items():
        if x.ndim == 4:  # (batch, groups, state, length)
            x = np.moveaxis(x, 3, 1)
        elif x.ndim == 3 and name != "last_state":  # (batch, channels or state, length)
            x = np.swapaxes(x, 1, 2)
        arrays[name] = x
    expected = {name.removeprefix("grad_"): arrays.pop(name) for name in list(arrays) if name.startswith("grad_")}
    results = {name: arrays.pop(name) for name in ("y", "last_state", "dy")}
    return arrays, results, expected


def relative_error(actual, expected) -> float:
    """The largest absolute difference, relative to the largest expected magnitude."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))
