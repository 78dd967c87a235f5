"""Depthwise convolution, each channel with its own filter; `api.py` has the public function."""

from kernels.convolution.api import depthwise_convolution

__all__ = ["depthwise_convolution"]
