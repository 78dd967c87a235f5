"""The networks of the recorded cases, built from the original classes' constructor arguments; and quick weights."""

from typing import Any

import jax
import numpy as np
from flax import linen as nn

from vimd_jax.models.srresnet import SRResNet
from vimd_jax.models.vim import Vim


def vim(constructor: dict, **overrides) -> Vim:
    """The Vim that the original `VisionMamba(**constructor)` is."""
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
