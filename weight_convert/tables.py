"""Tables of the PyTorch tensors that fill the Flax variables, one for each network.

A row is a PyTorch name, a Flax path and the transposition between them. Placeholders such as `{i}` stand for numbers.
One in the name alone is an index along a leading axis of the variable (layers stacked by `nn.scan`, in the order of the
name's placeholders); one in both is a part of the variable's path; `{i+1}` is one more. Rows are skipped if a network,
with its options, lacks the variable.
"""

import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np

from vimd_jax.models.efficient_vmamba import SCANNING_STAGES, EfficientVMamba
from vimd_jax.models.heads import POOL_SCALES
from vimd_jax.models.network import Network, options_of
from vimd_jax.models.positions import rotary_angles


class Rule(NamedTuple):
    """A row of a table.

    Attributes:
      source: PyTorch's name.
      target: the path of the Flax variable.
      axes: the transposition from PyTorch's axes to Flax's; None: the same order. Where Flax has fewer axes, the first
        of PyTorch's have length 1 and are dropped: a 1×1 convolution is a linear layer.
      shape: a function from Flax's shape to PyTorch's, where the same numbers in the same order have other axes.
    """

    source: str
    target: str
    axes: tuple[int, ...] | None = None
    shape: Callable[..., tuple[int, ...]] | None = None


_LINEAR = (1, 0)  # (out, in) -> (in, out)
_LINEARS = (0, 2, 1)  # (directions, out, in) -> (directions, in, out)
_CONV1D = (2, 1, 0)  # (out, in, width) -> (width, in, out)
_CONV2D = (2, 3, 1, 0)  # (out, in, height, width) -> (height, width, in, out)
_DECONV2D = (2, 3, 0, 1)  # (in, out, height, width) -> (height, width, in, out)

_MIXER = "layers.{i}.mixer"
_STACKED_MIXER = "params/layers/mixer"


def _direction(name: str, a_log: str, suffix: str) -> tuple[Rule, ...]:
    """The rows of one of a mixer's two scans; the second has a suffix in PyTorch."""
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


def _layer_norm(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(f"{source}.weight", f"params/{target}/scale"), Rule(f"{source}.bias", f"params/{target}/bias")


def _batch_norm(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.weight", f"params/{target}/scale"),
        Rule(f"{source}.bias", f"params/{target}/bias"),
        Rule(f"{source}.running_mean", f"batch_stats/{target}/mean"),
        Rule(f"{source}.running_var", f"batch_stats/{target}/var"),
    )


def _conv(source: str, target: str) -> tuple[Rule, ...]:
    """The rows of a convolution with bias."""
    return Rule(f"{source}.weight", f"params/{target}/kernel", _CONV2D), Rule(f"{source}.bias", f"params/{target}/bias")


_ISOTROPIC = (
    Rule("patch_embed.proj.weight", "params/patch_embed/kernel", _CONV2D),
    Rule("patch_embed.proj.bias", "params/patch_embed/bias"),
    Rule("cls_token", "params/class_token"),
    Rule("cls_token_head", "params/class_token_head"),
    Rule("cls_token_tail", "params/class_token_tail"),
    Rule("pos_embed", "params/position_embedding"),
    *_layer_norm("layers.{i}.norm", "layers/norm"),
    Rule(f"{_MIXER}.in_proj.weight", f"{_STACKED_MIXER}/in_proj/kernel", _LINEAR),
    Rule(f"{_MIXER}.out_proj.weight", f"{_STACKED_MIXER}/out_proj/kernel", _LINEAR),
    *_layer_norm("norm_f", "norm"),
    Rule("head.weight", "params/head/kernel", _LINEAR),
    Rule("head.bias", "params/head/bias"),
)

_PYRAMID = (  # of a segmenter
    Rule("fpn1.0.weight", "params/neck/deconv_0_0/kernel", _DECONV2D),
    Rule("fpn1.0.bias", "params/neck/deconv_0_0/bias"),
    *_batch_norm("fpn1.1", "neck/norm_0"),
    Rule("fpn1.3.weight", "params/neck/deconv_0_1/kernel", _DECONV2D),
    Rule("fpn1.3.bias", "params/neck/deconv_0_1/bias"),
    Rule("fpn2.0.weight", "params/neck/deconv_1_0/kernel", _DECONV2D),
    Rule("fpn2.0.bias", "params/neck/deconv_1_0/bias"),
    Rule("norm_f.weight", "params/neck/final_norm/scale"),
)

VIM = (*_ISOTROPIC, *_direction("forward", "A_log", ""), *_direction("backward", "A_b_log", "_b"), *_PYRAMID)
V2M = (*_ISOTROPIC, *_direction("along", "A_log", ""), *_direction("across", "A_2_log", "_2"), *_PYRAMID)


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
    *_layer_norm("outnorm_{i}", "neck/norm_{i}"),
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


_BLOCK, _STAGE = "layers.{s}.blocks.{b}", "params/stage_{s}"


_STAGES = (  # common to networks with stages
    *_conv("patch_embed.0", "patch_embed"),
    *_layer_norm("patch_embed.2", "patch_norm"),
    *_layer_norm(f"{_BLOCK}.norm", "stage_{s}/norm"),
    Rule(f"{_BLOCK}.op.in_proj.weight", f"{_STAGE}/mixer/in_proj/kernel", _LINEAR),
    Rule(f"{_BLOCK}.op.conv2d.weight", f"{_STAGE}/mixer/conv/kernel", _CONV2D),
    Rule(f"{_BLOCK}.op.conv2d.bias", f"{_STAGE}/mixer/conv/bias"),
    Rule(f"{_BLOCK}.op.x_proj_weight", f"{_STAGE}/mixer/ssm/x_proj_kernel", _LINEARS),
    Rule(f"{_BLOCK}.op.dt_projs_weight", f"{_STAGE}/mixer/ssm/dt_proj_kernel", _LINEARS),
    Rule(f"{_BLOCK}.op.dt_projs_bias", f"{_STAGE}/mixer/ssm/dt_proj_bias"),
    Rule(f"{_BLOCK}.op.A_logs", f"{_STAGE}/mixer/ssm/A_log", shape=lambda k, d, n: (k * d, n)),
    Rule(f"{_BLOCK}.op.Ds", f"{_STAGE}/mixer/ssm/D", shape=lambda k, d: (k * d,)),
    *_layer_norm(f"{_BLOCK}.op.out_norm", "stage_{s}/mixer/norm"),
    Rule(f"{_BLOCK}.op.out_proj.weight", f"{_STAGE}/mixer/out_proj/kernel", _LINEAR),
    *_layer_norm(f"{_BLOCK}.norm2", "stage_{s}/mlp_norm"),
    Rule(f"{_BLOCK}.mlp.fc1.weight", f"{_STAGE}/mlp_in/kernel", _LINEAR),
    Rule(f"{_BLOCK}.mlp.fc1.bias", f"{_STAGE}/mlp_in/bias"),
    Rule(f"{_BLOCK}.mlp.fc2.weight", f"{_STAGE}/mlp_out/kernel", _LINEAR),
    Rule(f"{_BLOCK}.mlp.fc2.bias", f"{_STAGE}/mlp_out/bias"),
    *_layer_norm("outnorm{i}", "neck/norm_{i}"),
    *_layer_norm("classifier.norm", "norm"),
    Rule("classifier.head.weight", "params/head/kernel", _LINEAR),
    Rule("classifier.head.bias", "params/head/bias"),
)


def _merging(source: str, stage: int | str) -> tuple[Rule, ...]:
    """The rows of the patch merging after a stage."""
    return (
        *_layer_norm(f"{source}.norm", f"downsample_{stage}/norm"),
        Rule(f"{source}.reduction.weight", f"params/downsample_{stage}/reduction/kernel", _LINEAR),
    )


VMAMBA = (*_STAGES, *_merging("layers.{s}.downsample", "{s}"))

VMAMBA2 = (
    *_STAGES,
    *_conv("patch_embed.0", "stem_0/conv"),
    *_layer_norm("patch_embed.2", "stem_0/norm"),
    *_conv("patch_embed.5", "stem_1/conv"),
    *_layer_norm("patch_embed.7", "stem_1/norm"),
    *_conv("layers.{s}.downsample.1", "downsample_{s}/conv"),
    *_layer_norm("layers.{s}.downsample.3", "downsample_{s}/norm"),
)

LOCAL_VMAMBA = (
    *VMAMBA,
    *_channel_gate(f"{_BLOCK}.op.multi_scan.attn", "stage_{s}/mixer/gate"),
    Rule(
        f"{_BLOCK}.op.multi_scan.weights",
        f"{_STAGE}/mixer/search/direction_weights",
        shape=lambda directions: (directions, 1, 1, 1),
    ),
)


_CONVOLVING = "layers.{s}.{b+1}"  # a stage of convolutions is a list of modules: an axes swap, its blocks, and more

_EFFICIENT_STAGES = (
    *_STAGES,
    Rule(f"{_BLOCK}.conv_branch.0.weight", f"{_STAGE}/conv/kernel", _CONV2D),
    Rule(f"{_BLOCK}.conv_branch.0.bias", f"{_STAGE}/conv/bias"),
    *_batch_norm(f"{_BLOCK}.conv_branch.1", "stage_{s}/conv_norm"),
    Rule(f"{_BLOCK}.conv_branch.3.weight", f"{_STAGE}/conv_out/kernel", _CONV2D),
    Rule(f"{_BLOCK}.conv_branch.3.bias", f"{_STAGE}/conv_out/bias"),
    *_channel_gate(f"{_BLOCK}.se", "stage_{s}/gate"),
    Rule(f"{_CONVOLVING}.conv_pw.0.weight", f"{_STAGE}/expand/kernel", _CONV2D),
    *_batch_norm(f"{_CONVOLVING}.conv_pw.1", "stage_{s}/expand_norm"),
    Rule(f"{_CONVOLVING}.conv_dw.0.weight", f"{_STAGE}/depthwise/kernel", _CONV2D),
    *_batch_norm(f"{_CONVOLVING}.conv_dw.1", "stage_{s}/depthwise_norm"),
    Rule(f"{_CONVOLVING}.se.conv_reduce.weight", f"{_STAGE}/se_reduce/kernel", _CONV2D),
    Rule(f"{_CONVOLVING}.se.conv_reduce.bias", f"{_STAGE}/se_reduce/bias"),
    Rule(f"{_CONVOLVING}.se.conv_expand.weight", f"{_STAGE}/se_expand/kernel", _CONV2D),
    Rule(f"{_CONVOLVING}.se.conv_expand.bias", f"{_STAGE}/se_expand/bias"),
    Rule(f"{_CONVOLVING}.conv_pw2.0.weight", f"{_STAGE}/project/kernel", _CONV2D),
    *_batch_norm(f"{_CONVOLVING}.conv_pw2.1", "stage_{s}/project_norm"),
)


def _efficient_vmamba(model: EfficientVMamba) -> tuple[Rule, ...]:
    rules = _EFFICIENT_STAGES
    for stage, depth in enumerate(model.depths[:-1]):
        place = "downsample" if stage < SCANNING_STAGES else depth + 2  # after the blocks and an axes swap
        source, target = f"layers.{stage}.{place}", f"downsample_{stage}"
        if model.downsample == "merge":
            rules += _merging(source, stage)
        else:
            rules += (*_conv(f"{source}.1", f"{target}/conv"), *_layer_norm(f"{source}.3", f"{target}/norm"))
    return rules


def _conv_norm(source: str, target: str) -> tuple[Rule, ...]:
    """The rows of a convolution without bias and the batch norm after it, under mmsegmentation's names."""
    kernel = Rule(f"{source}.conv.weight", f"params/{target}/kernel", _CONV2D)
    return kernel, *_batch_norm(f"{source}.bn", f"{target}_norm")


_CLASSES = (
    Rule("conv_seg.weight", "params/classes/kernel", _CONV2D),
    Rule("conv_seg.bias", "params/classes/bias"),
)
UPERNET = (
    *(rule for i, scale in enumerate(POOL_SCALES) for rule in _conv_norm(f"psp_modules.{i}.1", f"pool_{scale}")),
    *_conv_norm("bottleneck", "bottleneck"),
    *_conv_norm("lateral_convs.{i}", "lateral_{i}"),
    *_conv_norm("fpn_convs.{i}", "level_{i}"),
    *_conv_norm("fpn_bottleneck", "fusion"),
    *_CLASSES,
)
FCN = (*_conv_norm("convs.{i}", "conv_{i}"), *_conv_norm("conv_cat", "joint"), *_CLASSES)


def _inside(part: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rows of a part of a composite."""

    def target(path: str) -> str:
        collection, rest = path.split("/", 1)
        return f"{collection}/{part}/{rest}"

    return tuple(rule._replace(source=f"{part}.{rule.source}", target=target(rule.target)) for rule in rules)


TABLES = {  # by class
    "Vim": VIM,
    "V2M": V2M,
    "LocalVim": LOCAL_VIM,
    "SRResNet": SRRESNET,
    "LocalVMamba": LOCAL_VMAMBA,
    "VMamba": VMAMBA,
    "VMamba2": VMAMBA2,
    "UperNet": UPERNET,
    "FCN": FCN,
    "EfficientVMamba": _efficient_vmamba,  # a function of the model: its depths are in the names
}

# Names in older or differently organised code, by class: patterns, and their replacements in the tables.
_FIRST_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^(norm|head)\.", r"classifier.\1."),
)
_ONE_FILE_NAMES = (  # of VMamba's single-file version
    (r"\.op\.(x_proj|dt_projs)\.weight$", r".op.\1_weight"),
    (r"\.downsample\.1\.", ".downsample.norm."),
    (r"\.downsample\.2\.", ".downsample.reduction."),
)
RENAMES = {
    "VMamba": (*_FIRST_NAMES, *_ONE_FILE_NAMES),
    "VMamba2": _ONE_FILE_NAMES[:1],
    "EfficientVMamba": _FIRST_NAMES,
}

# Origin of the files of a class, for authors who published two kinds of files under similar names.
RELEASES = {
    "VMamba": "VMamba's first release (#v0cls)",
    "VMamba2": "VMamba's second release (#v2cls: vssm_*_0229, vssm_*_0230 and vssm1_*)",
}


def table(model: Network) -> tuple[Rule, ...]:
    """The rows of a network, or of all parts of a composite; ValueError if no table describes it."""
    if model.parts:
        return tuple(rule for name, inner in model.parts.items() for rule in _inside(name, table(inner)))
    kind = type(model).__name__
    if kind not in TABLES:
        raise ValueError(f"model {kind} has no PyTorch counterpart here; convertible: {', '.join(TABLES)}")
    rules = TABLES[kind]
    return rules(model) if callable(rules) else rules


def name_in_table(name: str, model: Network) -> str:
    """The name of a tensor in the table, which has the latest names of the original code."""
    part, _, rest = name.partition(".")
    if part in model.parts:
        return f"{part}.{name_in_table(rest, model.parts[part])}"
    for pattern, replacement in RENAMES.get(type(model).__name__, ()):
        name = re.sub(pattern, replacement, name)
    return name


def computed_tensors(model: Network) -> dict[str, np.ndarray]:
    """PyTorch buffers that are computed here, not stored: the rotary tables."""
    if getattr(model, "rope", False):
        angles = rotary_angles(model.grid, None, model.embed_dim)
        return {"rope.freqs_cos": np.cos(angles), "rope.freqs_sin": np.sin(angles)}
    parts = {part: computed_tensors(inner) for part, inner in model.parts.items()}
    return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


def tensors_by_part(state_dict: dict[str, Any], parts: Collection[str]) -> dict[str, dict[str, Any]]:
    """The tensors of a composite by part, with names that follow the part's name; all others under "".

    VMamba calls its head "classifier", so a file counts as that of a composite only if most names contain a part.
    """
    pattern = re.compile(rf"(?:\w+\.){{0,3}}?({'|'.join(parts)})\.(.+)")
    found = {name: pattern.match(name) for name in state_dict}
    if 2 * sum(match is not None for match in found.values()) <= len(found):
        return {"": state_dict}
    tensors: dict[str, dict[str, Any]] = {}
    for name, match in found.items():
        part, rest = match.groups() if match else ("", name)
        tensors.setdefault(part, {})[rest] = state_dict[name]
    return tensors


_STATES = ("mixer.A_log", "mixer.A_log_0", "blocks.0.op.A_logs")


def recorded_options(shapes: dict[str, tuple[int, ...]], kind: type[Network]) -> dict[str, Any]:
    """The options of a class of networks that a file's names and shapes imply, in the form of `as_recorded`.

    They do not tell, for example, a class token in the middle from one at the head.
    """

    def count(pattern: str) -> int:
        return len({match[1] for name in shapes if (match := re.match(pattern, name))})

    def side(name: str, axis: int) -> int | None:
        return next(iter(shapes.get(name, ())[axis:]), None)

    hidden, width, inner = (side(f"layers.0.blocks.0.{name}.weight", 0) for name in ("mlp.fc1", "norm", "op.in_proj"))
    stages = range(count(r"layers\.(\d+)\.(?:blocks|\d+)\."))
    counted = {
        "depth": count(r"layers\.(\d+)\.mixer\."),
        "embed_dim": side("norm_f.weight", 0),
        "patch_size": side("patch_embed.proj.weight", 2),
        "state_size": next(filter(None, (side(f"layers.0.{name}", 1) for name in _STATES)), None),
        "expand": inner // width if inner and width else None,
        "num_blocks": count(r"trunk\.(\d+)\."),
        "channels": side("conv3.weight", 1),
        "scale": 2 ** count(r"upsampling\.([0-2])\."),
        "dims": width,
        "depths": tuple(count(rf"layers\.{stage}\.(blocks\.\d+\.norm|\d+\.conv_pw)\.") for stage in stages),
    }
    if not (counted["depth"] or counted["num_blocks"] or counted["depths"]):
        return {}  # a different kind of network
    there = {
        "class_token": "double" if "cls_token_head" in shapes else "middle" if "cls_token" in shapes else None,
        "mlp_ratio": hidden / width if hidden and width else 0.0,
        "downsample": "conv" if "layers.0.downsample.1.weight" in shapes else "merge",
        "directions": None if any(name.endswith("multi_scan.weights") for name in shapes) else "fixed",
    }
    if "rope.freqs_cos" in shapes:  # files may also lack the rotary tables
        there["rope"] = True
    recorded = {name: value for name, value in counted.items() if value} | there
    return {name: value for name, value in recorded.items() if name in options_of(kind)}


def as_recorded(model: Network, option: str) -> Any:
    """An option's value, as far as the network's tensors imply it."""
    value = getattr(model, option)
    if option == "dims" and isinstance(value, tuple):
        return value[0]
    if option == "directions" and value is not None:
        return "fixed"  # but not which directions
    return "middle" if (option, value) == ("class_token", "head") else value
