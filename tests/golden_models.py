"""The networks of the recorded cases, from the original classes' constructor arguments; and weights for tests."""

import re
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from vimd_jax.models import create_model
from vimd_jax.models.efficient_vmamba import EfficientVMamba
from vimd_jax.models.hierarchical import Hierarchical
from vimd_jax.models.local_vim import LocalVim
from vimd_jax.models.local_vmamba import LocalVMamba
from vimd_jax.models.segmenter import Segmenter
from vimd_jax.models.srresnet import SRResNet
from vimd_jax.models.v2m import V2M
from vimd_jax.models.vim import Vim
from vimd_jax.models.vmamba import VMamba
from weight_convert import convert_state_dict, export_state_dict


def vim(constructor: dict, **overrides) -> Vim:
    """The Vim that corresponds to the original `VisionMamba(**constructor)`."""
    size = constructor["img_size"]
    class_token = "middle" if constructor["use_middle_cls_token"] else "head"
    if constructor.get("use_double_cls_token"):
        class_token = "double"
    if not constructor["if_cls_token"]:
        class_token = None
    divide = constructor.get("if_divide_out", constructor.get("if_devide_out"))
    pool = constructor["final_pool_type"]
    options = {
        "num_classes": constructor["num_classes"],
        "image_size": tuple(size) if isinstance(size, list) else size,
        "patch_size": constructor["patch_size"],
        "stride": constructor["stride"],
        "embed_dim": constructor["embed_dim"],
        "depth": constructor["depth"],
        "state_size": constructor.get("d_state", 16),
        "class_token": class_token,
        "pool": "last" if pool == "none" else pool,
        "merge": "mean" if divide else "sum",
        "rope": constructor.get("if_rope_residual", False),
    }
    return Vim(**(options | overrides))


def v2m(constructor: dict, **overrides) -> V2M:
    """The V2M of the original `VisionMamba(**constructor, bimamba_type="2d")`, which never uses a class token."""
    options = {name: constructor[name] for name in ("num_classes", "patch_size", "stride", "embed_dim", "depth")}
    options |= {"image_size": constructor["img_size"], "routing": "published"}
    options["merge"] = "mean" if constructor["if_devide_out"] else "sum"
    return V2M(**(options | overrides))


def local_vim(constructor: dict, **overrides) -> LocalVim:
    """The LocalVim that corresponds to LocalMamba's `VisionMamba(**constructor)`."""
    class_token = "middle" if constructor.get("use_middle_cls_token") else "head"
    options = {
        "num_classes": constructor["num_classes"],
        "image_size": constructor["img_size"],
        "patch_size": constructor["patch_size"],
        "embed_dim": constructor["embed_dim"],
        "depth": constructor["depth"],
        "class_token": class_token if constructor.get("if_cls_token") else None,
        "rope": constructor["if_rope"],
        "directions": constructor["directions"] and tuple(map(tuple, constructor["directions"])),
    }
    return LocalVim(**(options | overrides))


def local_vmamba(constructor: dict, **overrides) -> LocalVMamba:
    """The LocalVMamba that corresponds to LocalMamba's `VSSM(**constructor)`."""
    depths, dims, directions = constructor["depths"], constructor["dims"], constructor["directions"]
    options = {
        "num_classes": constructor["num_classes"],
        "dims": dims if isinstance(dims, int) else tuple(dims),
        "depths": tuple(depths),
        "directions": directions and tuple(map(tuple, directions)),
    }
    return LocalVMamba(**(options | overrides))


def vmamba(constructor: dict) -> VMamba:
    """The VMamba that corresponds to the original `VSSM(**constructor)`."""
    return VMamba(
        num_classes=constructor["num_classes"],
        dims=tuple(constructor["dims"]),
        depths=tuple(constructor["depths"]),
        state_size=constructor["ssm_d_state"],
    )


def efficient_vmamba(constructor: dict) -> EfficientVMamba:
    """The EfficientVMamba of the original `EfficientVSSM(**constructor)`, which ignores d_state."""
    dims = constructor["dims"]
    return EfficientVMamba(
        num_classes=constructor["num_classes"],
        dims=dims if isinstance(dims, int) else tuple(dims),
        depths=tuple(constructor["depths"]),
        mlp_ratio=constructor["mlp_ratio"],
        downsample={"v1": "merge", "v2": "conv"}[constructor["downsample_version"]],
    )


def first_block(tensors: dict[str, np.ndarray], model: Hierarchical, prefix: str = "") -> Any:
    """Variables of the first block of a network with stages, from recorded tensors of it or a part of it."""
    names = {f"layers.0.blocks.0.{prefix}{name}": tensor for name, tensor in tensors.items()}
    whole = export_state_dict(random_variables(model, np.zeros((1, 32, 32, 3), np.float32)), model)
    variables = convert_state_dict(whole | names, model)
    return {kind: jax.tree.map(lambda x: x[0], stages["stage_0"]) for kind, stages in variables.items()}


def srresnet(constructor: dict) -> SRResNet:
    """The SRResNet that corresponds to the original `SRResNet(**constructor)`."""
    return SRResNet(
        scale=constructor["upscale_factor"], channels=constructor["channels"], num_blocks=constructor["num_rcb"]
    )


def nhwc(images: np.ndarray) -> np.ndarray:
    """Transposes recorded images (batch, channels, height, width) to this project's layout."""
    return np.moveaxis(images, 1, -1)


def random_variables(model: nn.Module, images: Any, seed: int = 0) -> Any:
    """Random variables of the right shapes, from NumPy: compiling `model.init` takes longer than most tests."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(0, 0.3, leaf.shape).astype(np.float32)
        return np.abs(values) + 0.5 if path[-1].key == "var" else values

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0), images))


def weights_by_rule(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Parameters under PyTorch's names, set by the rule for which figures of the originals are known: waves around the
    initial value of each kind of parameter, with phases by alphabetical order of names. Includes batch statistics."""
    parameters = sorted(name for name in shapes if ".running_" not in name)
    weights = {name: _weight_by_rule(rank, name, shapes[name]) for rank, name in enumerate(parameters)}
    for name in set(shapes) - set(parameters):
        angle = 0.37 * np.arange(shapes[name][0])
        weights[name] = 0.1 * np.cos(angle) if name.endswith("mean") else 1 + 0.1 * np.sin(angle)
    return weights


def _weight_by_rule(rank: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    wave = np.cos(rank + 0.37 * np.arange(np.prod(shape))).reshape(shape)
    kind = name.split(".")[-1]
    if re.match(r"A_(\w_)?log", kind):
        return np.log(np.arange(1, shape[1] + 1)) + 0.1 * wave
    if re.fullmatch(r"D(s|_\w)?", kind) or (len(shape) == 1 and kind == "weight"):
        return 1 + 0.1 * wave
    if kind in ("x_proj_weight", "dt_projs_weight"):
        return wave / np.sqrt(shape[-1])
    if kind == "dt_projs_bias" or ("dt_proj" in name and kind == "bias"):
        return -2 + 0.5 * wave
    if kind == "bias":
        return 0.1 * wave
    if kind in ("pos_embed", "cls_token"):
        return wave / 2
    return wave / np.sqrt(np.prod(shape[1:]))


def images_by_rule(shape: tuple[int, ...]) -> np.ndarray:
    """The images for `weights_by_rule`, in the originals' layout."""
    return np.sin(0.05 * np.arange(np.prod(shape), dtype=np.float64)).reshape(shape).astype(np.float32)


def segmenter(constructor: dict, **overrides) -> Segmenter:
    """The segmenter of mmsegmentation's `EncoderDecoder(**constructor)`; a backbone alone gets a small head."""
    backbone, head = constructor.get("backbone", constructor), constructor.get("decode_head", {})
    auxiliary = constructor.get("auxiliary_head", {})
    name, options = _segmenter_backbone(backbone)
    options |= {
        "num_classes": head.get("num_classes", 3),
        "head_channels": head.get("channels", 4),
        "auxiliary_channels": auxiliary.get("channels", 0),
        "drop_path_rate": backbone.get("drop_path_rate", 0.0),
    }
    return create_model(name, **options | overrides)


def _segmenter_backbone(constructor: dict) -> tuple[str, dict]:
    options = {"taps": tuple(constructor["out_indices"])}
    if "dims" not in constructor:
        size = constructor["img_size"]
        options |= {name: constructor[name] for name in ("patch_size", "embed_dim", "depth")}
        options |= {"image_size": tuple(size) if isinstance(size, list) else size, "rope": constructor["if_rope"]}
        options["stride"] = options["patch_size"]
        if "directions" in constructor:
            options["directions"] = tuple(map(tuple, constructor["directions"]))
            return "upernet_local_vim_tiny", options | {"vertical_reverse": "published"}
        options["tapped"] = "rotated_stream" if constructor.get("use_residual_as_feature") else "update"
        options["merge"] = "mean" if constructor.get("if_divide_out") else "sum"
        options["normalize_last"] = constructor.get("last_layer_process") == "add & norm"
        return "upernet_vim_tiny", options
    dims = constructor["dims"]
    options |= {"dims": dims if isinstance(dims, int) else tuple(dims), "depths": tuple(constructor["depths"])}
    if "directions" in constructor:
        options["directions"] = tuple(map(tuple, constructor["directions"]))
        return "upernet_local_vmamba_tiny", options | {"vertical_reverse": "published"}
    if constructor.get("forward_type") == "v05_noz":
        return "upernet_vmamba2_tiny", options
    return "upernet_vmamba_tiny" if "forward_type" in constructor else "upernet_efficient_vmamba_tiny", options
