"""Operations with several implementations, a folder for each; `choice` decides which one runs, `build` compiles C++."""

from kernels.scan import selective_scan

__all__ = ["selective_scan"]
