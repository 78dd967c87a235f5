"""Programs use large pages."""

import os
import subprocess
import sys

import pytest

from vimd_jax import memory

CODE = """
import os, resource, sys, jax
from vimd_jax.memory import use_large_pages
use_large_pages()
step = jax.jit(lambda x: (x @ x.T).sum())  # needs 256 MB for a moment
x = jax.numpy.ones((8192, 2))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults()
    step(x).block_until_ready()
print(faults() - before, *sys.argv[1:])
"""


def started_again(environment: dict[str, str]) -> bool:
    """Whether a program is replaced by another start of itself."""
    code = "import os; os.execve = lambda *_: print('again'); import vimd_jax.memory as m; m.use_large_pages()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return "again" in done.stdout


AS_USUAL = {name: value for name, value in os.environ.items() if name not in memory._SETTING}


@pytest.mark.skipif(not started_again(AS_USUAL), reason="no glibc and kernel that have large pages on demand")
def test_a_program_starts_again_once_and_clears_few_pages():
    command = [sys.executable, "-c", CODE, "--name=a b"]
    done = subprocess.run(command, env=AS_USUAL, capture_output=True, text=True, check=True)
    count, arguments = done.stdout.split(maxsplit=1)
    assert int(count) < 2**28 // 4096 // 10
    assert arguments == "--name=a b\n"
    assert not started_again(os.environ | memory._SETTING)
