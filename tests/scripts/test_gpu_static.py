"""Bounds of GPU kernels: what is counted of an execution, and how many blocks fit a multiprocessor."""

import gpu_static
import pytest
from ptx.memory import Report


def test_moves_cost_nothing_and_shuffles_hold_the_path_to_memory():
    report = Report()
    report.executed.update(
        {"mov.u32": 7, "ld.param.b64": 2, "fma.rn.f32": 5, "ex2.approx.ftz.f32": 3, "rcp.approx.f32": 1}
    )
    report.executed.update({"shfl.sync.bfly.b32": 4, "ld.global.v4.b32": 2, "st.shared.b32": 6})
    report.memory.update({("global load", "requests"): 2, ("global load", "cycles"): 8, ("shared store", "cycles"): 6})
    expected = {"instructions": 21, "MUFU": 4, "load/store": 18, "shared memory": 6}
    assert gpu_static.count(report) == expected


@pytest.mark.parametrize(("registers", "threads", "shared", "blocks"), [
    (255, 128, 0, 2), (255, 256, 0, 1), (96, 64, 0, 10), (32, 128, 0, 16), (32, 128, 100 << 10, 2),
])  # fmt: skip
def test_blocks_of_a_multiprocessor(registers, threads, shared, blocks):
    assert gpu_static.DEVICES[90].blocks(registers, threads, shared) == blocks
