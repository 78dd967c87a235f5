"""Compiled programs are kept on disk while the tests run, so that each is compiled once, whichever process needs it."""

import os
import tempfile
from pathlib import Path

# Set before JAX is imported, and inherited by the workers of pytest-xdist and by the programs that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"vimd_jax_tests_{os.getuid()}")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
