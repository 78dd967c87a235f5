"""Operations with several implementations, a folder each; `choice` selects one of them, `build` compiles C++."""

from kernels.choice import use
from kernels.convolution import depthwise_convolution
from kernels.scan import selective_scan

__all__ = ["depthwise_convolution", "selective_scan", "use"]
