"""SRVM-Net, the student of ViMD: super-resolution, then classification (Chen et al., "Vision Mamba Distillation for
Low-resolution Fine-grained Image Classification", IEEE SPL 2025, https://arxiv.org/abs/2411.17980, figure 1).
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vimd_jax.models import registry
from vimd_jax.models.network import Composite, Network, part, square
from vimd_jax.models.registry import CLASSIFIERS, create_model, describe, model_options
from vimd_jax.models.srresnet import SRResNet

_CLASSIFIER = "vim_tiny_stride8"  # the default


class SRVM(Composite):
    """A frozen super-resolution network followed by a classifier.

    Attributes:
      sr: the super-resolution network; None: bicubic interpolation to the classifier's image_size.
      classifier: any classifier or segmenter of `list_models()`, which reads the enlarged image.
    """

    sr: SRResNet | None
    classifier: Network

    @property
    def num_classes(self) -> int:
        """See `Network`."""
        return self.classifier.num_classes

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side, or (height, width), in pixels, of the enlarged images that the classifier reads."""
        return self.classifier.image_size

    @property
    def grid(self) -> tuple[int, int] | None:
        """See `Network`."""
        return self.classifier.grid

    @property
    def class_token(self) -> str | None:
        """See `Network`."""
        return self.classifier.class_token

    @property
    def scale(self) -> int:
        """See `Network`; 1 for bicubic interpolation, which enlarges any image to one size."""
        return 1 if self.sr is None else self.sr.scale

    @property
    def dense(self) -> bool:
        """See `Network`."""
        return self.classifier.dense

    @property
    def input_size(self) -> tuple[int, int]:
        """See `Network`."""
        return tuple(-(-side // self.scale) for side in self.classifier.input_size)

    @classmethod
    def option_types(cls, chosen: dict[str, Any]) -> dict[str, Any]:
        """See `Network`: the parameters of `from_options`, and the options of the classifier that is chosen."""
        parameters = inspect.signature(cls.from_options).parameters
        own = {name: parameter.annotation for name, parameter in parameters.items() if name != "options"}
        classifier = chosen.get("classifier")
        return own | model_options(classifier if _reads_images(classifier) else _CLASSIFIER)

    @classmethod
    def from_options(
        cls,
        sr: Literal["srresnet", "bicubic"] = "srresnet",
        scale: int = 4,
        sr_channels: int = 64,
        sr_num_blocks: int = 16,
        classifier: str = _CLASSIFIER,
        **options: Any,
    ) -> "SRVM":
        """The network whose parts have these options; `options` are those of the classifier."""
        if sr not in ("srresnet", "bicubic"):
            raise ValueError(f'sr: {sr!r} is not valid, expected "srresnet" or "bicubic"')
        if not _reads_images(classifier):
            raise ValueError(f"classifier: {classifier!r} is not a classifier, choose one of {', '.join(CLASSIFIERS)}")
        first = SRResNet(scale=scale, channels=sr_channels, num_blocks=sr_num_blocks) if sr == "srresnet" else None
        return cls(sr=first, classifier=create_model(classifier, **options))

    def to_options(self) -> dict[str, Any]:
        """See `Network`."""
        own, sr, classifier = {"sr": "bicubic"}, self.sr, describe(self.classifier)
        if sr is not None:
            own = {"sr": "srresnet", "scale": sr.scale, "sr_channels": sr.channels, "sr_num_blocks": sr.num_blocks}
        return own | {"classifier": classifier["architecture"]} | classifier["options"]

    def __call__(
        self, images: jax.Array, *, train: bool = False, return_features: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        """Class scores of low-resolution images.

        Args:
          images: (batch, height, width, 3) floats in [0, 1].
          train: for the classifier; the super-resolution network always uses its running averages and gets no gradient.
          return_features: also return the features below.

        Returns:
          logits (batch, num_classes); with `return_features`, the pair (logits, features): the classifier's features
          and features["super_resolved"], the images that it read.
        """
        image = self.enlarge(images)
        output = self.classifier(image, train=train, return_features=return_features)
        if not return_features:
            return output
        logits, features = output
        return logits, features | {"super_resolved": image}

    def feature_maps(
        self, images: jax.Array, layers: Sequence[int] | None = None, **options: Any
    ) -> tuple[jax.Array, ...]:
        """The classifier's maps of the enlarged images; see its `feature_maps`."""
        return self.classifier.feature_maps(self.enlarge(images), layers, **options)

    def segment(self, variables: dict[str, Any], images: jax.Array, *how: Any) -> jax.Array:
        """Class scores for every pixel of the enlarged images; see `Segmenter.segment`."""
        enlarged = self.apply(variables, images, method="enlarge")
        return self.classifier.segment(part(variables, "classifier"), enlarged, *how)

    def enlarge(self, images: jax.Array) -> jax.Array:
        """Enlarges low-resolution images for the classifier, without a gradient."""
        enlarged = bicubic(images, self.classifier.image_size) if self.sr is None else self.sr(images)
        return jax.lax.stop_gradient(enlarged)


def bicubic(images: jax.Array, size: int | tuple[int, int]) -> jax.Array:
    """Enlarges images (batch, height, width, channels) to `size`, a side or (height, width), and clips to [0, 1].

    Uses Pillow's kernel, without rounding to bytes: a = -0.5 (PyTorch's is -0.75), weights renormalised at the edges.
    """
    resized = jax.image.resize(images, (images.shape[0], *square(size), images.shape[3]), "bicubic")
    return jnp.clip(resized, 0.0, 1.0)


def _reads_images(name: str | None) -> bool:
    """Whether it is the name of a classifier or a segmenter: neither a super-resolution network nor an SRVM."""
    return name in registry.MODELS and name not in registry.SR_NETWORKS and name not in MODELS


MODELS = {"srvm_tiny": SRVM}
