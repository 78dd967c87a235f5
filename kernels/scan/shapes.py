"""The scans of real models by name, for tests and benchmarks: one direction of one layer, of one image."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one scan; channel c belongs to group c // (channels // groups)."""

    length: int
    channels: int
    state: int = 16
    groups: int = 1


SHAPES = {
    # Vim: embedding 192, 384, 768, twice as many channels; patches of 16 pixels from a 224-pixel image at stride 16
    # (14x14 and a class token) and 8 (27x27 and a class token).
    "vim_tiny": Shape(197, 384),
    "vim_small": Shape(197, 768),
    "vim_base": Shape(197, 1536),
    "vim_tiny_stride8": Shape(730, 384),
    "vim_small_stride8": Shape(730, 768),
    "vim_base_stride8": Shape(730, 1536),
    # 1248-pixel images: 78x78 patches and a class token.
    "vim_tiny_1248px": Shape(6085, 384),
    # LocalVim: four such scans a layer; without class token 196 = 14x14, which windows of 2 and 7 divide exactly.
    "local_vim_tiny": Shape(196, 384),
    "local_vim_small": Shape(196, 768),
    # VMamba (vanilla tiny): the four directions of a stage are four groups of one scan.
    "vmamba_tiny_stage1": Shape(56 * 56, 4 * 192, groups=4),
    "vmamba_tiny_stage2": Shape(28 * 28, 4 * 384, groups=4),
    "vmamba_tiny_stage3": Shape(14 * 14, 4 * 768, groups=4),
    "vmamba_tiny_stage4": Shape(7 * 7, 4 * 1536, groups=4),
    # VMamba's later presets have a single state per channel.
    "vmamba_tiny_s2l5_stage1": Shape(56 * 56, 4 * 192, state=1, groups=4),
}

BATCH_SIZES = (1, 16, 64, 128)
