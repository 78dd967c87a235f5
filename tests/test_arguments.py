"""Arguments of command lines."""

import argparse
from pathlib import Path

import pytest

from vimd_jax.arguments import parse_option, parse_path


def test_options_are_read_as_python_writes_them():
    assert parse_option("depth=3") == ("depth", 3)
    assert parse_option("merge=sum") == ("merge", "sum")
    assert parse_option("directions=(('h', 'v'),)") == ("directions", (("h", "v"),))
    with pytest.raises(argparse.ArgumentTypeError, match="'depth' is not NAME=VALUE"):
        parse_option("depth")


def test_the_home_directory_is_understood_in_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert parse_path("~/x") == Path("/somewhere/x")
    assert parse_path("a/~x") == Path("a/~x")
