"""The arguments of a depthwise convolution, in the one form in which implementations take them."""

from typing import Any, NamedTuple


class ConvolutionInputs(NamedTuple):
    """The arrays, or a shape, a layout or a gradient for each of them."""

    u: Any  # (batch, rows * columns, channels), or channels / groups that all groups read; float32 or a half
    kernel: Any  # (filter's rows, filter's columns, channels) float32
    bias: Any  # (channels,) float32
    order: Any = None  # (groups, rows * columns) int32, see `depthwise_convolution`

    @property
    def groups(self) -> int:
        """Groups of channels, each with an order of its own."""
        return 1 if self.order is None else self.order.shape[0]


class ConvolutionOptions(NamedTuple):
    """Settings that are fixed when the convolution is traced."""

    rows: int  # of the map
    before: tuple[int, int]  # zeros before the first row and column
    silu: bool
