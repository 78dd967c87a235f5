"""PyTorch checkpoints to Flax variables and back, without PyTorch."""

from weight_convert.mapping import convert_state_dict, export_state_dict

__all__ = ["convert_state_dict", "export_state_dict"]
