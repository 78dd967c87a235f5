"""The check for ARM: which instructions it counts, and what it says where tools are missing."""

import check_arm
import pytest

ASSEMBLY = """
_ZN1a7ForwardILi16ELb1ELb0EEEvi:
	cbz	w0, .L4
.L2:
	ldr	q0, [x1]
.L3:
	fmla	v1.4s, v0.4s, v2.s[0] // a comment
	subs	w0, w0, #1
	bne	.L3
	tbz	w2, #31, .L2
.L4:
	ret
	.size	a, .-a
"""


def test_the_innermost_loop_is_counted():
    instructions = check_arm.loop(ASSEMBLY, check_arm.LOOPS["forward"])
    assert [line.split()[0] for line in instructions] == ["fmla", "subs", "bne"]
    with pytest.raises(SystemExit, match="no function like Adjoint"):
        check_arm.loop(ASSEMBLY, check_arm.LOOPS["gradient: adjoint"])


@pytest.mark.parametrize("command", ["cycles", "tests"])
def test_missing_tools_are_named(command, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.argv", ["check_arm.py", command])
    with pytest.raises(SystemExit):
        check_arm.main()
    assert "aarch64-linux-gnu-g++" in capsys.readouterr().err.splitlines()[-1]
