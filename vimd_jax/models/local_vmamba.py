"""LocalVMamba, VMamba with windowed scans (Huang et al., "LocalMamba: Visual State Space Model with Windowed Selective
Scan", 2024, https://arxiv.org/abs/2403.09338).

VMamba's stages and blocks, with two differences: every block has four directions of its own, found by the search of
local_vim.py, and a gate weights the channels of each direction's result.
"""

from functools import partial

import jax

from vimd_jax.models.hierarchical import Block, Hierarchical
from vimd_jax.models.layers import ChannelGate
from vimd_jax.models.local_vim import DirectionWeights
from vimd_jax.models.scan_order import (
    LayerDirections,
    ScanOrder,
    VerticalReverse,
    check_directions,
    layer_directions,
    local_scan_order,
    parse_directions,
    stack_orders,
    sum_visits,
)
from vimd_jax.models.vmamba import SS2D, VSSBlock

# The published results of the search, a line for each block, stage after stage.
SEARCHED_TINY = parse_directions("""
    h h_flip w7 w7_flip
    h_flip v_flip w2 w2_flip
    h_flip v_flip w2_flip w7
    h_flip v v_flip w2
    h h_flip v_flip w2_flip
    h_flip v_flip w2 w2_flip
    h w2_flip w7 w7_flip
    h h_flip v v_flip
    h v_flip w7 w7_flip
    h_flip v w2 w7_flip
    v v_flip w2 w7_flip
    h h_flip v_flip w2_flip
    v_flip w2_flip w7 w7_flip
    h_flip v_flip w2_flip w7_flip
    h_flip v w7 w7_flip
""")
SEARCHED_SMALL = parse_directions("""
    h v v_flip w7_flip
    h h_flip v w7
    h_flip v v_flip w7
    h_flip v w2_flip w7
    h_flip v w2_flip w7
    h_flip v_flip w2 w7_flip
    h_flip v v_flip w7
    h v v_flip w7
    h v v_flip w7
    h v v_flip w7_flip
    h h_flip v v_flip
    h v v_flip w2
    v v_flip w2_flip w7
    h h_flip v w2
    h_flip v v_flip w7_flip
    h h_flip v v_flip
    h v v_flip w7_flip
    h v v_flip w7_flip
    h h_flip v_flip w7
    h_flip v_flip w2_flip w7
    h_flip v v_flip w7_flip
    v v_flip w7 w7_flip
    h v v_flip w7_flip
    h_flip v v_flip w2
    h v v_flip w2_flip
    h h_flip v w7
    h h_flip w7 w7_flip
    h v_flip w2 w2_flip
    h v_flip w2 w7
    h v v_flip w7_flip
    h_flip v w2_flip w7
    h_flip v_flip w7 w7_flip
    h v w7 w7_flip
""")


class LocalVMamba(Hierarchical):
    """Image classifier; the options of `Hierarchical`, and:

    Attributes:
      directions: names of the directions that each block scans (see scan_order.py), a tuple for each block, stage after
        stage, or one for all; the same number in every block. A network with fewer blocks than a published list uses
        the beginning of the list. None is the network of the search: all directions in every block, each result
        normalised and weighted by a learned softmax.
      vertical_reverse: "correct", or "published": on maps that are not square the original returns the results of
        vertical scans to the wrong tokens (see `scan_order.reverse_map`).
    """

    directions: LayerDirections | None = SEARCHED_TINY
    vertical_reverse: VerticalReverse = "correct"

    def __post_init__(self):
        super().__post_init__()
        check_directions(self.directions, sum(self.depths), [SEARCHED_TINY, SEARCHED_SMALL])
        if min(self.widths) < 4:
            raise ValueError(f"dims: {self.dims} is not valid, the channel gates need at least 4 in each stage")

    def make_block(self, stage: int, train: bool) -> partial[Block]:
        """See `Hierarchical`."""
        search = self.directions is None
        mixer = partial(LocalSS2D, state_size=self.state_size, dtype=self.dtype, search=search)
        return partial(VSSBlock, drops=train and self.drop_path_rate > 0, mixer=mixer)

    def block_inputs(self, stage: int, grid: tuple[int, int]) -> ScanOrder:
        """See `Hierarchical`."""
        first = sum(self.depths[:stage])
        directions = layer_directions(self.directions, sum(self.depths))[first : first + self.depths[stage]]
        order = stack_orders(
            [local_scan_order(names, grid, vertical_reverse=self.vertical_reverse) for names in directions]
        )
        return order if self.vertical_reverse == "published" else order._replace(places=None)

    @staticmethod
    def decays(path: tuple[str, ...]) -> bool:
        """See `Network`; the search's weights decay too, as published."""
        return Hierarchical.decays(path) or path[-1] == "direction_weights"


class LocalSS2D(SS2D):
    """`SS2D` with a channel gate before the results are summed.

    Attributes:
      search: combine the directions by `DirectionWeights` instead of summing them.
    """

    search: bool

    def merge(self, y: jax.Array) -> jax.Array:
        """See `SS2D`."""
        y = ChannelGate(axes=(2,), name="gate")(y)
        return DirectionWeights(name="search")(y) if self.search else sum_visits(y)


MODELS = {
    "local_vmamba_tiny": partial(LocalVMamba, dims=96, depths=(2, 2, 9, 2), directions=SEARCHED_TINY),
    "local_vmamba_small": partial(LocalVMamba, dims=96, depths=(2, 2, 27, 2), directions=SEARCHED_SMALL),
    "local_vmamba_search": partial(LocalVMamba, dims=32, depths=(2, 2, 9, 2), directions=None),
}
