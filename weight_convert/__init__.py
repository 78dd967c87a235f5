"""PyTorch checkpoints to Flax variables and back, without PyTorch."""

from weight_convert.checkpoint import load_converted, load_pretrained, save_converted
from weight_convert.finetune import resize_position_embedding
from weight_convert.mapping import convert_state_dict, export_state_dict
from weight_convert.torch_file import CheckpointError, load_torch_checkpoint

__all__ = [
    "CheckpointError",
    "convert_state_dict",
    "export_state_dict",
    "load_converted",
    "load_pretrained",
    "load_torch_checkpoint",
    "resize_position_embedding",
    "save_converted",
]
