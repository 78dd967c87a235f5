"""Operations with several implementations, a folder each; `choice` selects one of them, `build` compiles C++."""

from kernels.choice import use
from kernels.scan import selective_scan

__all__ = ["selective_scan", "use"]
