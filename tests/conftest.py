"""How tests compile: quickly where numbers do not depend on it, and each program once, whichever process needs it."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before JAX is imported, and inherited by the workers of pytest-xdist and by the programs that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"vimd_jax_tests_{os.getuid()}")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

AS_USERS_RUN_THEM = ("kernels", "models")  # the folders of tests that compile with all optimizations


@pytest.fixture(autouse=True, scope="module")
def compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Sets how much XLA optimizes, and gives up in the end what was compiled.

    JAX keeps every program. A process that runs all tests would have more memory mappings than Linux allows one, and be
    aborted in the middle.
    """
    import jax

    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    jax.config.update("jax_disable_most_optimizations", folder not in AS_USERS_RUN_THEM)
    yield
    jax.clear_caches()
