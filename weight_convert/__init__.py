"""Converts PyTorch checkpoints to Flax variables and back, without PyTorch."""

from vimd_jax.checkpoints.adapt import resize_position_embedding
from vimd_jax.errors import CheckpointError
from weight_convert.load import load_torch_model, torch_variables
from weight_convert.mapping import convert_state_dict, export_state_dict
from weight_convert.torch_file import load_torch_checkpoint

__all__ = [
    "CheckpointError",
    "convert_state_dict",
    "export_state_dict",
    "load_torch_checkpoint",
    "load_torch_model",
    "resize_position_embedding",
    "torch_variables",
]
