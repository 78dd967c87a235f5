"""The networks of the recorded cases, built from the original classes' constructor arguments; and quick weights."""

from typing import Any

import jax
import numpy as np
from flax import linen as nn

from vimd_jax.models.local_vim import LocalVim
from vimd_jax.models.local_vmamba import LocalVMamba
from vimd_jax.models.srresnet import SRResNet
from vimd_jax.models.vim import Vim
from vimd_jax.models.vim_ablations import VimAblation


def vim(constructor: dict, **overrides) -> Vim:
    """The Vim that the original `VisionMamba(**constructor)` is."""
    size = constructor["img_size"]
    class_token = "middle" if constructor["use_middle_cls_token"] else "head"
    if constructor.get("use_double_cls_token"):
        class_token = "double"
    if not constructor["if_cls_token"]:
        class_token = None
    divide = constructor.get("if_divide_out", constructor.get("if_devide_out"))
    bimamba_type = "v1" if constructor.get("if_bimamba") else constructor["bimamba_type"]
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
    ablations = {
        "bimamba_type": None if bimamba_type == "none" else bimamba_type,
        "norm": "rms" if constructor.get("rms_norm", True) else "layer",
        "layer_scale": constructor.get("init_layer_scale"),
        "paired_layers": constructor.get("if_bidirectional", False),
        "flip_tokens": constructor.get("flip_img_sequences_ratio", 0) >= 1,
    }
    if any(value != getattr(VimAblation, name) for name, value in ablations.items()):
        return VimAblation(**(options | ablations | overrides))
    return Vim(**(options | overrides))


def local_vim(constructor: dict, **overrides) -> LocalVim:
    """The LocalVim that the original `VisionMamba(**constructor)` of LocalMamba is."""
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
    """The LocalVMamba that the original `VSSM(**constructor)` of LocalMamba is."""
    depths, dims, directions = constructor["depths"], constructor["dims"], constructor["directions"]
    options = {
        "num_classes": constructor["num_classes"],
        "dims": dims if isinstance(dims, int) else tuple(dims),
        "depths": tuple(depths),
        "directions": directions and tuple(map(tuple, directions)),
    }
    return LocalVMamba(**(options | overrides))


def srresnet(constructor: dict) -> SRResNet:
    """The SRResNet that the original `SRResNet(**constructor)` is."""
    return SRResNet(
        scale=constructor["upscale_factor"], channels=constructor["channels"], num_blocks=constructor["num_rcb"]
    )


def nhwc(images: np.ndarray) -> np.ndarray:
    """Recorded images, (batch, channels, height, width), in this project's layout."""
    return np.moveaxis(images, 1, -1)


def random_variables(model: nn.Module, images: Any, seed: int = 0) -> Any:
    """Variables of the right shapes, drawn by NumPy: compiling `model.init` would take longer than most tests."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(0, 0.3, leaf.shape).astype(np.float32)
        return np.abs(values) + 0.5 if path[-1].key == "var" else values

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0), images))
