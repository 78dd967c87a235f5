"""One table per network: which PyTorch tensor fills which Flax variable.

A row is a PyTorch name, a Flax path and the transposition between them. Placeholders such as `{i}` stand for numbers:
one that the path lacks counts along a leading axis of the variable (layers stacked by `nn.scan`, in the order of the
name's placeholders), one that both have counts variables. Rows whose variable a network does not have, by its options,
are skipped.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from flax import linen as nn

from vimd_jax.models.positions import rotary_angles
from vimd_jax.models.srvm import SRVM


class Rule(NamedTuple):
    """One table row.

    Attributes:
      source: PyTorch's name.
      target: the path of the Flax variable.
      axes: the transposition from PyTorch's axes to Flax's; None: the same order.
      shape: PyTorch's shape from Flax's where numbers in the same order are divided into axes otherwise.
    """

    source: str
    target: str
    axes: tuple[int, ...] | None = None
    shape: Callable[..., tuple[int, ...]] | None = None


_LINEAR = (1, 0)  # (out, in) -> (in, out)
_LINEARS = (0, 2, 1)  # (directions, out, in) -> (directions, in, out)
_CONV1D = (2, 1, 0)  # (out, in, width) -> (width, in, out)
_CONV2D = (2, 3, 1, 0)  # (out, in, height, width) -> (height, width, in, out)

_MIXER = "layers.{i}.mixer"
_STACKED_MIXER = "params/layers/mixer"


def _direction(name: str, a_log: str, suffix: str) -> tuple[Rule, ...]:
    """The rows of one scan direction of a Vim mixer; PyTorch marks the backward one by a suffix."""
    target = f"{_STACKED_MIXER}/{name}"
    return (
        Rule(f"{_MIXER}.conv1d{suffix}.weight", f"{target}/conv/kernel", _CONV1D),
        Rule(f"{_MIXER}.conv1d{suffix}.bias", f"{target}/conv/bias"),
        Rule(f"{_MIXER}.x_proj{suffix}.weight", f"{target}/x_proj/kernel", _LINEAR),
        Rule(f"{_MIXER}.dt_proj{suffix}.weight", f"{target}/dt_proj/kernel", _LINEAR),
        Rule(f"{_MIXER}.dt_proj{suffix}.bias", f"{target}/dt_proj/bias"),
        Rule(f"{_MIXER}.{a_log}", f"{target}/A_log"),
        Rule(f"{_MIXER}.D{suffix}", f"{target}/D"),
    )


_ISOTROPIC = (
    Rule("patch_embed.proj.weight", "params/patch_embed/kernel", _CONV2D),
    Rule("patch_embed.proj.bias", "params/patch_embed/bias"),
    Rule("cls_token", "params/class_token"),
    Rule("cls_token_head", "params/class_token_head"),
    Rule("cls_token_tail", "params/class_token_tail"),
    Rule("pos_embed", "params/position_embedding"),
    Rule("layers.{i}.norm.weight", "params/layers/norm/scale"),
    Rule(f"{_MIXER}.in_proj.weight", f"{_STACKED_MIXER}/in_proj/kernel", _LINEAR),
    Rule(f"{_MIXER}.out_proj.weight", f"{_STACKED_MIXER}/out_proj/kernel", _LINEAR),
    Rule("norm_f.weight", "params/norm/scale"),
    Rule("head.weight", "params/head/kernel", _LINEAR),
    Rule("head.bias", "params/head/bias"),
)

VIM = (*_ISOTROPIC, *_direction("forward", "A_log", ""), *_direction("backward", "A_b_log", "_b"))


def _layer_norm(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(f"{source}.weight", f"params/{target}/scale"), Rule(f"{source}.bias", f"params/{target}/bias")


def _channel_gate(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *_layer_norm(f"{source}.norm", f"{target}/norm"),
        Rule(f"{source}.global_reduce.weight", f"params/{target}/reduce/kernel", _LINEAR),
        Rule(f"{source}.global_reduce.bias", f"params/{target}/reduce/bias"),
        Rule(f"{source}.channel_select.weight", f"params/{target}/expand/kernel", _LINEAR),
        Rule(f"{source}.channel_select.bias", f"params/{target}/expand/bias"),
    )


LOCAL_VIM = (
    *_ISOTROPIC,
    Rule(f"{_MIXER}.conv1d_{{k}}.weight", f"{_STACKED_MIXER}/conv/kernel", _CONV1D),
    Rule(f"{_MIXER}.conv1d_{{k}}.bias", f"{_STACKED_MIXER}/conv/bias"),
    Rule(f"{_MIXER}.x_proj_{{k}}.weight", f"{_STACKED_MIXER}/ssm/x_proj_kernel", _LINEAR),
    Rule(f"{_MIXER}.dt_proj_{{k}}.weight", f"{_STACKED_MIXER}/ssm/dt_proj_kernel", _LINEAR),
    Rule(f"{_MIXER}.dt_proj_{{k}}.bias", f"{_STACKED_MIXER}/ssm/dt_proj_bias"),
    Rule(f"{_MIXER}.A_log_{{k}}", f"{_STACKED_MIXER}/ssm/A_log"),
    Rule(f"{_MIXER}.D_{{k}}", f"{_STACKED_MIXER}/ssm/D"),
    *_channel_gate(f"{_MIXER}.attn", "layers/mixer/gate"),
    Rule(
        f"{_MIXER}.multi_scan.weights",
        f"{_STACKED_MIXER}/search/direction_weights",
        shape=lambda directions: (directions, 1, 1, 1),
    ),
)


def _batch_norm(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.weight", f"params/{target}/scale"),
        Rule(f"{source}.bias", f"params/{target}/bias"),
        Rule(f"{source}.running_mean", f"batch_stats/{target}/mean"),
        Rule(f"{source}.running_var", f"batch_stats/{target}/var"),
    )


SRRESNET = (
    Rule("conv1.0.weight", "params/conv_in/kernel", _CONV2D),
    Rule("conv1.0.bias", "params/conv_in/bias"),
    Rule("conv1.1.weight", "params/prelu_in/alpha"),
    Rule("trunk.{i}.rcb.0.weight", "params/blocks/conv1/kernel", _CONV2D),
    *_batch_norm("trunk.{i}.rcb.1", "blocks/norm1"),
    Rule("trunk.{i}.rcb.2.weight", "params/blocks/prelu/alpha"),
    Rule("trunk.{i}.rcb.3.weight", "params/blocks/conv2/kernel", _CONV2D),
    *_batch_norm("trunk.{i}.rcb.4", "blocks/norm2"),
    Rule("conv2.0.weight", "params/conv_mid/kernel", _CONV2D),
    *_batch_norm("conv2.1", "norm_mid"),
    Rule("upsampling.{i}.upsample_block.0.weight", "params/upsample_{i}/conv/kernel", _CONV2D),
    Rule("upsampling.{i}.upsample_block.0.bias", "params/upsample_{i}/conv/bias"),
    Rule("upsampling.{i}.upsample_block.2.weight", "params/upsample_{i}/prelu/alpha"),
    Rule("conv3.weight", "params/conv_out/kernel", _CONV2D),
    Rule("conv3.bias", "params/conv_out/bias"),
)


_BLOCK = "layers.{s}.blocks.{b}"

# What the networks with stages have in common (`VSSM` of VMamba).
HIERARCHICAL = (
    Rule("patch_embed.0.weight", "params/patch_embed/kernel", _CONV2D),
    Rule("patch_embed.0.bias", "params/patch_embed/bias"),
    *_layer_norm("patch_embed.2", "patch_norm"),
    *_layer_norm(f"{_BLOCK}.norm", "stage_{s}/norm"),
    Rule(f"{_BLOCK}.op.in_proj.weight", "params/stage_{s}/mixer/in_proj/kernel", _LINEAR),
    Rule(f"{_BLOCK}.op.conv2d.weight", "params/stage_{s}/mixer/conv/kernel", _CONV2D),
    Rule(f"{_BLOCK}.op.conv2d.bias", "params/stage_{s}/mixer/conv/bias"),
    Rule(f"{_BLOCK}.op.x_proj_weight", "params/stage_{s}/mixer/ssm/x_proj_kernel", _LINEARS),
    Rule(f"{_BLOCK}.op.dt_projs_weight", "params/stage_{s}/mixer/ssm/dt_proj_kernel", _LINEARS),
    Rule(f"{_BLOCK}.op.dt_projs_bias", "params/stage_{s}/mixer/ssm/dt_proj_bias"),
    Rule(f"{_BLOCK}.op.A_logs", "params/stage_{s}/mixer/ssm/A_log", shape=lambda k, d, n: (k * d, n)),
    Rule(f"{_BLOCK}.op.Ds", "params/stage_{s}/mixer/ssm/D", shape=lambda k, d: (k * d,)),
    *_layer_norm(f"{_BLOCK}.op.out_norm", "stage_{s}/mixer/norm"),
    Rule(f"{_BLOCK}.op.out_proj.weight", "params/stage_{s}/mixer/out_proj/kernel", _LINEAR),
    *_layer_norm("layers.{s}.downsample.norm", "downsample_{s}/norm"),
    Rule("layers.{s}.downsample.reduction.weight", "params/downsample_{s}/reduction/kernel", _LINEAR),
    *_layer_norm("classifier.norm", "norm"),
    Rule("classifier.head.weight", "params/head/kernel", _LINEAR),
    Rule("classifier.head.bias", "params/head/bias"),
)


LOCAL_VMAMBA = (
    *HIERARCHICAL,
    *_channel_gate(f"{_BLOCK}.op.multi_scan.attn", "stage_{s}/mixer/gate"),
    Rule(
        f"{_BLOCK}.op.multi_scan.weights",
        "params/stage_{s}/mixer/search/direction_weights",
        shape=lambda directions: (directions, 1, 1, 1),
    ),
)


def _inside(part: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rows of a network that is one part of a larger one."""

    def target(path: str) -> str:
        collection, rest = path.split("/", 1)
        return f"{collection}/{part}/{rest}"

    return tuple(rule._replace(source=f"{part}.{rule.source}", target=target(rule.target)) for rule in rules)


_ABLATION = (
    Rule("layers.{i}.norm.bias", "params/layers/norm/bias"),
    Rule("norm_f.bias", "params/norm/bias"),
    Rule(f"{_MIXER}.A_b_log", f"{_STACKED_MIXER}/forward/A_log_backward"),
    Rule(f"{_MIXER}.gamma", f"{_STACKED_MIXER}/layer_scale"),
)

TABLES = {  # by class
    "Vim": VIM,
    "VimAblation": VIM + _ABLATION,
    "LocalVim": LOCAL_VIM,
    "SRResNet": SRRESNET,
    "LocalVMamba": LOCAL_VMAMBA,
    "VMamba": HIERARCHICAL,
}


def table(model: nn.Module) -> tuple[Rule, ...]:
    """The rows of a network; ValueError if no table describes it."""
    if isinstance(model, SRVM):
        sr = () if model.sr is None else _inside("sr", table(model.sr))
        return sr + _inside("classifier", table(model.classifier))
    kind = type(model).__name__
    if kind not in TABLES:
        raise ValueError(f"model {kind} has no PyTorch counterpart here; convertible: {', '.join(TABLES)}")
    return TABLES[kind]


def computed_tensors(model: nn.Module) -> dict[str, np.ndarray]:
    """PyTorch's buffers that are computed here: the rotary tables."""
    if isinstance(model, SRVM):
        return {f"classifier.{name}": value for name, value in computed_tensors(model.classifier).items()}
    if not getattr(model, "rope", False):
        return {}
    angles = rotary_angles(model.grid, None, model.embed_dim)
    return {"rope.freqs_cos": np.cos(angles), "rope.freqs_sin": np.sin(angles)}


# Options on which tensors depend, by a part of their names: what to look at when such a tensor is missing or unexpected.
OPTIONS = {
    "rope.freqs": "rope",
    "cls_token": "class_token",
    "mixer.gamma": "layer_scale (vim_ablation)",
    "norm.bias": "norm (vim_ablation)",
    "norm_f.bias": "norm (vim_ablation)",
    "_b.": "bimamba_type (vim_ablation)",
    "multi_scan.weights": "directions",
    "A_b_log": "bimamba_type (vim_ablation)",
}
