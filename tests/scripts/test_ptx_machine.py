"""The machine that runs PTX: results, costs and each kind of error, on kernels written by hand."""

import numpy as np
import pytest
from ptx.machine import Machine
from ptx.memory import Array, Fault
from ptx.parser import Unknown, fold_offsets, parse

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(.param .u64 x, .param .u64 y)
.reqntid 32
{
  .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .b64 %rd<20>;
  ld.param.b64 %rd1, [x];
  ld.param.b64 %rd2, [y];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ntid.x;
  mad.lo.s32 %r4, %r2, %r3, %r1;
  mul.wide.s32 %rd3, %r4, 4;
  add.s64 %rd4, %rd1, %rd3;
  add.s64 %rd5, %rd2, %rd3;
  shl.b32 %r5, %r1, 2;
  mov.b32 %r6, memory;
  add.s32 %r7, %r6, %r5;
"""


def run(body: str, size: int = 64, threads: int = 32, programs: int = 2, shared: int = 1024, **options):
    x, y = np.arange(size, dtype=np.float32), np.full(size, np.nan, np.float32)
    arrays = [Array(x, name="x"), Array(y, output=True, name="y")]
    report = Machine(parse(HEAD + body + "\n ret;\n}\n"), (programs, 1, 1), threads, shared, **options).run(arrays)
    return y, report


def kinds(report) -> set[str]:
    """Of the findings, but for outputs that a test leaves unwritten."""
    return {finding.kind for finding in report.findings} - {"never written"}


COPY = "ld.global.b32 %r8, [%rd4]; st.global.b32 [%rd5], %r8;"


def test_copies_and_counts_sectors():
    y, report = run(COPY)
    np.testing.assert_array_equal(y, np.arange(64))
    assert not kinds(report)
    assert report.memory["global load", "sectors"] == 8 and report.memory["global load", "bytes"] == 256


def test_constants_become_part_of_addresses():
    kernel = parse(
        HEAD + "add.s64 %rd6, %rd4, 8; add.s64 %rd7, %rd5, 4; add.s64 %rd8, %rd7, 4; ld.global.b32 %r8, [%rd6 + 0];"
        "st.global.b32 [%rd8 + 0], %r8; add.s64 %rd4, %rd4, 4; ret;\n}\n"
    )
    added = [[x.text for x in block if x.name == "add.s64"] for block in fold_offsets(kernel).blocks]
    assert [text for text in added[0] if "%rd6" in text or "%rd8" in text] == []
    assert "add.s64 %rd7, %rd5, 4" in added[0] and "add.s64 %rd4, %rd4, 4" in added[0]
    results = []
    for program in (kernel, fold_offsets(kernel)):
        arrays = [Array(np.arange(66, dtype=np.float32)), Array(np.zeros(66, np.float32), output=True)]
        Machine(program, (2, 1, 1), 32).run(arrays)
        results.append(arrays[1].data)
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[1][2:], np.arange(2, 66))


def test_a_signed_source_is_the_lower_half_of_its_register():
    y, _ = run("mov.b64 %rd6, 25769803775; cvt.s64.s32 %rd7, %rd6; cvt.u32.u64 %r8, %rd7; st.global.b32 [%rd5], %r8;")
    assert (y.view(np.int32) == -1).all()


def test_out_of_bounds():
    assert kinds(run(COPY, size=60)[1]) == {"out of bounds"}
    _, report = run(
        "setp.lt.s32 %p1, %r4, 60; mov.u32 %r8, 0; @%p1 ld.global.b32 %r8, [%rd4]; @%p1 st.global.b32 [%rd5], %r8;", 60
    )
    assert not kinds(report)
    with pytest.raises(Fault, match="no array"):
        run("mov.b64 %rd6, 64; ld.global.b32 %r8, [%rd6];")


def test_misaligned():
    with pytest.raises(Fault, match="misaligned"):
        run("ld.global.v2.b32 {%r8, %r9}, [%rd4];")


def test_uninitialised():
    assert kinds(run("ld.shared.b32 %r8, [%r7]; st.global.b32 [%rd5], %r8;")[1]) == {"uninitialised"}
    assert kinds(run("ld.global.b32 %r8, [%rd5]; st.global.b32 [%rd5], %r8;")[1]) == {"uninitialised"}
    with pytest.raises(Fault, match="before it is written"):
        run("add.s32 %r8, %r9, 1;")


def test_unwritten_outputs():
    _, report = run("setp.eq.s32 %p1, %r4, 0; @%p1 st.global.b32 [%rd5], %r4;")
    assert [str(finding) for finding in report.findings] == ["never written: 252 of 256 bytes of y [end] (×1)"]
    assert not run(COPY)[1].findings


EXCHANGE = """
 ld.global.b32 %r8, [%rd4]; st.shared.b32 [%r7], %r8; {barrier}
 xor.b32 %r9, %r5, {distance}; add.s32 %r10, %r6, %r9; ld.shared.b32 %r11, [%r10]; st.global.b32 [%rd5], %r11;
"""


@pytest.mark.parametrize("barrier, distance, found", [
    ("bar.sync 0;", 4, set()), ("bar.sync 0;", 128, set()), ("bar.warp.sync -1;", 4, set()),
    ("bar.warp.sync -1;", 128, {"race, shared", "uninitialised"}), ("", 4, {"race, shared"}),
])  # fmt: skip
def test_race_in_shared_memory(barrier, distance, found):
    y, report = run(EXCHANGE.format(barrier=barrier, distance=distance), threads=64, programs=1)
    assert kinds(report) - {"uninitialised"} == found - {"uninitialised"}
    if not found:
        np.testing.assert_array_equal(y, np.arange(64) ^ distance // 4)


def test_write_after_read_is_a_race():
    body = EXCHANGE.format(barrier="bar.sync 0;", distance=128) + "st.shared.b32 [%r7], %r4;"
    assert kinds(run(body, threads=64, programs=1)[1]) == {"race, shared"}
    body = EXCHANGE.format(barrier="bar.sync 0;", distance=128) + "bar.sync 0; st.shared.b32 [%r7], %r4;"
    assert not kinds(run(body, threads=64, programs=1)[1])


def test_threads_may_write_the_same_value_only():
    assert not kinds(run("st.shared.b32 [%r6], %r3;")[1])
    assert kinds(run("st.shared.b32 [%r6], %r1;")[1]) == {"race, shared"}
    assert kinds(run("st.global.b32 [%rd2], %r1;")[1]) == {"race, global"}
    assert not kinds(run("st.global.b32 [%rd2], %r3;")[1])


def test_divergence():
    body = """
     mov.b32 %r8, 0; setp.lt.s32 %p1, %r1, 5; @%p1 bra $L2;
    $L1: add.s32 %r8, %r8, 1; setp.lt.s32 %p2, %r8, %r1; @%p2 bra $L1;
     bra.uni $L3;
    $L2: mov.b32 %r8, 77;
    $L3: {barrier} cvt.rn.f32.s32 %r9, %r8; st.global.b32 [%rd5], %r9;
    """
    expected = np.where(np.arange(32) < 5, 77, np.arange(32))
    for barrier in ("", "bar.sync 0;"):
        y, _ = run(body.format(barrier=barrier))
        np.testing.assert_array_equal(y, np.tile(expected, 2))
    with pytest.raises(Fault, match="divergence"):
        run("setp.lt.s32 %p1, %r1, 5; @%p1 bra $L1; bar.sync 0;\n$L1:")


def test_shuffles():
    body = "ld.global.b32 %r8, [%rd4]; shfl.sync.{}.b32 %r9, %r8, {}, 31, -1; st.global.b32 [%rd5], %r9;"
    lane = np.arange(32)
    for mode, amount, expected in (
        ("bfly", 1, lane ^ 1),
        ("bfly", 16, lane ^ 16),
        ("idx", 3, 3),
        ("idx", "%r5", 4 * lane % 32),
    ):
        y, _ = run(body.format(mode, amount))
        np.testing.assert_array_equal(y[:32], np.broadcast_to(expected, 32), err_msg=mode)
    with pytest.raises(Fault, match="divergence"):
        run("setp.lt.s32 %p1, %r1, 5; @%p1 bra $L1; shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;\n$L1:")


@pytest.mark.parametrize("shift, cycles", [(2, 1), (3, 2), (5, 8)])
def test_bank_conflicts(shift, cycles):
    _, report = run(f"shl.b32 %r9, %r1, {shift}; add.s32 %r9, %r9, %r6; st.shared.b32 [%r9], %r1;", programs=1)
    assert report.memory["shared store", "cycles"] == cycles
    assert report.memory["shared store", "ideal"] == 1


def test_vectors_take_four_cycles():
    body = "shl.b32 %r9, %r1, 4; add.s32 %r9, %r9, %r6; st.shared.v4.b32 [%r9], {%r1, %r1, %r1, %r1};"
    _, report = run(body, programs=1)
    assert report.memory["shared store", "cycles"] == report.memory["shared store", "ideal"] == 4


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_instructions(transposed):
    trans = ".trans" if transposed else ""
    body = f"""
     shl.b32 %r9, %r1, 4; add.s32 %r9, %r9, %r6; ld.global.b32 %r8, [%rd4];
     stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r9], {{%r8}}; bar.warp.sync -1;
     ld.shared.b32 %r10, [%r7]; st.global.b32 [%rd5], %r10; bar.warp.sync -1;
     ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r11}}, [%r9]; setp.ne.b32 %p1, %r11, %r8;
     @%p1 st.global.b32 [%rd2+-4], %r8;
    """
    y, report = run(body)
    halves = np.arange(32, dtype=np.float32).view(np.uint16).reshape(8, 8)
    expected = (halves.T if transposed else halves).copy().reshape(-1).view(np.float32)
    np.testing.assert_array_equal(y[:32].view(np.uint32), expected.view(np.uint32))
    assert not kinds(report)


@pytest.mark.parametrize("code, expected", [
    ("mov.b32 %r8, 0xF0; bfe.u32 %r9, %r8, 4, 3;", 7), ("mov.b32 %r8, 0x30; bfe.s32 %r9, %r8, 4, 2;", 0xFFFFFFFF),
    ("mov.b32 %r8, 0x33221100; prmt.b32 %r9, %r8, 0x77665544, 0x7531;", 0x77553311),
    ("mov.b32 %r8, 5; mul.hi.u32 %r9, %r8, 0x80000000;", 2), ("mov.b32 %r8, 6; shr.u32 %r9, %r8, 33;", 0),
    ("mov.b32 %r8, -8; shr.s32 %r9, %r8, 1;", 0xFFFFFFFC),
    ("mov.b32 %r8, 0f3F800000; fma.rn.f32 %r9, %r8, 0f40000000, %r8;", 0x40400000),
    ("mov.b32 %r8, 0f3F808000; cvt.rn.bf16.f32 %rs1, %r8; cvt.f32.bf16 %r9, %rs1;", 0x3F800000),
    ("mov.b32 %r8, 0f00000001; ex2.approx.ftz.f32 %r9, %r8;", 0x3F800000),
    ("mov.b32 %r8, 0fC3000000; ex2.approx.ftz.f32 %r9, %r8;", 0),
    ("cvt.u16.u32 %rs1, %r3; and.b16 %rs2, %rs1, 0x21; mul.wide.u16 %r9, %rs2, 3;", 96),
    ("mov.b64 %rd6, {%r3, %r3}; mov.b64 {%r8, %r9}, %rd6;", 32),
])  # fmt: skip
def test_instructions(code, expected):
    y, _ = run(code + "st.global.b32 [%rd5], %r9;")
    assert y.view(np.uint32)[0] == expected


@pytest.mark.parametrize("code", [
    "atom.global.add.u32 %r8, [%rd4], 1;", "add.sat.f32 %r8, %r1, %r1;", "ld.local.b32 %r8, [%rd4];", "bar.sync 1, 64;",
    "cvt.rz.f32.s32 %r8, %r1;",
])  # fmt: skip
def test_refuses_what_it_does_not_know(code):
    with pytest.raises(Unknown):
        run(code)


def test_noise_moves_results_of_approximate_instructions_only():
    body = "cvt.rn.f32.s32 %r8, %r1; {} %r9, %r8; st.global.b32 [%rd5], %r9;"
    for name, exact in (("ex2.approx.ftz.f32", np.exp2), ("neg.f32", np.negative)):
        y, noisy = run(body.format(name))[0], run(body.format(name), noise=0)[0]
        np.testing.assert_array_equal(y[:32], exact(np.arange(32)))
        np.testing.assert_allclose(noisy, y, rtol=2.0**-22)
        assert (noisy != y).any() == (name[:2] == "ex")
