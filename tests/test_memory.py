"""Memory that was freed is used again without asking the system."""

import subprocess
import sys

import pytest

CODE = """
import resource, jax
from vimd_jax.memory import keep_freed_memory
keep_freed_memory()
step = jax.jit(lambda x: (x @ x.T).sum())  # needs 256 MB for a moment
x = jax.numpy.ones((8192, 2))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults()
    step(x).block_until_ready()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can")
def test_a_program_that_runs_again_asks_for_no_pages():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**28 // 4096 // 10
