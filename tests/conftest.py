"""Settings of compilation in tests: fast where results do not depend on it, each program once for all processes."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before JAX is imported, and inherited by the workers of pytest-xdist and by the programs that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"vimd_jax_tests_{os.getuid()}")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


@pytest.fixture(autouse=True)
def compile_quickly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast compilation here and in programs that a test starts, but not for kernels and recorded numbers."""
    import jax

    as_users_do = "recorded" in request.node.name or "kernels" in request.path.parts
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(not as_users_do)))
    jax.config.update("jax_disable_most_optimizations", not as_users_do)


@pytest.fixture(autouse=True, scope="module")
def clear_caches() -> Iterator[None]:
    """Clears JAX's caches: a process that runs all tests would have more memory mappings than Linux allows."""
    yield
    import jax

    jax.clear_caches()
