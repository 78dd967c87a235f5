"""Vision Mamba Distillation and the vision state-space models around it, in JAX/Flax."""

try:
    from kernels import selective_scan as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"the package `kernels` that was found is not vimd-jax's ({error}); the Hugging Face Hub has one of that name: "
        "uninstall it, or use an environment without it, and install vimd-jax again"
    ) from error

from vimd_jax.load import load_model

__version__ = "0.1.0"
__all__ = ["load_model"]
