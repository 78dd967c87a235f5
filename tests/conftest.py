"""Settings of compilation in tests: fast where results do not depend on it, each program once for all processes."""

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer, point_at

# Set before JAX is imported, and inherited by the workers of pytest-xdist and by the programs that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"vimd_jax_tests_{os.getuid()}")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"
os.environ.setdefault("GLIBC_TUNABLES", "")  # without large pages, for which programs would start twice


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server to which the client of the Hugging Face Hub is redirected, with an empty cache and a token."""
    pytest.importorskip("huggingface_hub")
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    point_at(monkeypatch, server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True, raising=False)  # plain HTTP
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
