"""SRVM-Net, the student of ViMD: enlarge, then classify (Chen et al., "Vision Mamba Distillation for Low-resolution
Fine-grained Image Classification", IEEE SPL 2025, https://arxiv.org/abs/2411.17980, figure 1).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vimd_jax.models.network import square
from vimd_jax.models.srresnet import SRResNet


class SRVM(nn.Module):
    """A frozen super-resolution network followed by a classifier.

    Attributes:
      sr: the super-resolution network; None is bicubic interpolation to the classifier's image_size.
      classifier: what reads the enlarged image, any classifier of `list_models()`.
    """

    sr: SRResNet | None
    classifier: nn.Module

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, return_features: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        """Class scores of low-resolution images.

        Args:
          images: (batch, height, width, 3) floats in [0, 1].
          train: for the classifier; the super-resolution network always uses its running averages and gets no gradient.
          return_features: also return the features below.

        Returns:
          logits (batch, num_classes); with `return_features` the pair (logits, features): the classifier's features and
          features["super_resolved"], the image that it saw.
        """
        enlarged = bicubic(images, self.classifier.image_size) if self.sr is None else self.sr(images)
        image = jax.lax.stop_gradient(enlarged)
        output = self.classifier(image, train=train, return_features=return_features)
        if not return_features:
            return output
        logits, features = output
        return logits, features | {"super_resolved": image}


def join(sr: dict[str, Any] | None, classifier: dict[str, Any]) -> dict[str, Any]:
    """The variables of an SRVM from those of its parts; `sr` is None where there is no such network."""
    parts = {"classifier": classifier} | ({} if sr is None else {"sr": sr})
    collections = sorted({collection for variables in parts.values() for collection in variables})
    return {
        collection: {name: variables[collection] for name, variables in parts.items() if collection in variables}
        for collection in collections
    }


def part(variables: dict[str, Any], name: str) -> dict[str, Any]:
    """Of the variables of an SRVM those of one part, "sr" or "classifier"."""
    return {collection: tree[name] for collection, tree in variables.items() if name in tree}


def bicubic(images: jax.Array, size: int | tuple[int, int]) -> jax.Array:
    """Enlarges images (batch, height, width, channels) to size, a side or (height, width), clamped to [0, 1].

    Pillow's kernel, without its rounding to bytes: a = -0.5, weights renormalised at the edges (PyTorch's a is -0.75).
    """
    resized = jax.image.resize(images, (images.shape[0], *square(size), images.shape[3]), "bicubic")
    return jnp.clip(resized, 0.0, 1.0)
