"""Restoration: the high-resolution image from the low-resolution one, by a super-resolution network."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vimd_jax.models import SR_NETWORKS
from vimd_jax.models.srvm import bicubic
from vimd_jax.tasks.task import Batch, Output, Task, Terms, unit


def loss(output: Output, batch: Batch, config: ConfigDict) -> tuple[jax.Array, Terms]:
    """Pixel loss: mean squared error between the restored and the true image (Ledig et al., SRGAN, eq. 4)."""
    pixel = jnp.mean(jnp.square(output.value - unit(batch["high"])))
    return pixel, {"pixel": pixel}


def per_image(restored: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """PSNR of the restored image, and of bicubic interpolation."""
    high = unit(batch["high"])
    enlarged = bicubic(unit(batch["low"]), high.shape[1:3])
    return {"psnr": psnr(restored, high), "psnr_bicubic": psnr(enlarged, high)}


def sums(restored: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """The sums of these."""
    weight = batch["weight"]
    return {"count": jnp.sum(weight)} | {k: jnp.sum(weight * x) for k, x in per_image(restored, batch).items()}


def scores(total: dict[str, np.ndarray]) -> dict[str, float]:
    """PSNR in dB beside that of bicubic interpolation, means over the images."""
    return {name: float(total[name]) / float(total["count"]) for name in ("psnr", "psnr_bicubic")}


def remark(scores: dict[str, float]) -> str | None:
    """A warning if the network is worse than bicubic interpolation."""
    if scores["psnr"] >= scores["psnr_bicubic"]:
        return None
    return (
        f"the SR network is worse than bicubic interpolation, PSNR {scores['psnr']:.2f} dB against "
        f"{scores['psnr_bicubic']:.2f} dB: train it longer, or give a student --config.sr.name=bicubic"
    )


def panel(restored: np.ndarray, *_: Any) -> tuple[dict[str, np.ndarray], list[str]]:
    return {"super-resolved": restored}, [""] * len(restored)


def psnr(image: jax.Array, truth: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of each image; (b, H, W, 3) in [0, 1] -> (b,)."""
    return -10 * jnp.log10(jnp.maximum(jnp.mean(jnp.square(image - truth), axis=(1, 2, 3)), 1e-10))


RESTORATION = Task(
    networks=SR_NETWORKS,
    network="srresnet_x4",
    loss=loss,
    sums=sums,
    scores=scores,
    drawn=("psnr", "psnr_bicubic"),
    axis="PSNR (dB)",
    view="low",
    truth=("high",),
    remark=remark,
    per_image=per_image,
    panel=panel,
)
