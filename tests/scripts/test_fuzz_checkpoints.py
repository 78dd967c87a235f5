"""A short run of the reader's fuzzing."""

from scripts import fuzz_checkpoints


def test_every_file_is_read_or_refused_within_limits(capsys):
    assert fuzz_checkpoints.main(["--files", "1000"]) == 0
    printed = capsys.readouterr().out
    assert "'refused': " in printed and "'read': " in printed
