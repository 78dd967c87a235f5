"""Vision Mamba Distillation and the vision state-space models around it, in JAX/Flax."""

from vimd_jax.load import load_model

__version__ = "0.1.0"
__all__ = ["load_model"]
