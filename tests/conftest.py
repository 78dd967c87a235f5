"""Compiled programs are kept on disk while the tests run, so that each is compiled once, whichever process needs it."""

import os
import tempfile

# Set before JAX is imported, and inherited by the workers of pytest-xdist and by the programs that tests start. It is a
# folder for this run alone: a process that was killed in an earlier run may have left half a program there, which JAX
# does not notice.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="vimd_jax_tests_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
