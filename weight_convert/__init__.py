"""PyTorch checkpoints to Flax variables and back, without PyTorch."""

from weight_convert.mapping import convert_state_dict, export_state_dict
from weight_convert.torch_file import CheckpointError, load_torch_checkpoint

__all__ = ["CheckpointError", "convert_state_dict", "export_state_dict", "load_torch_checkpoint"]
