"""Semantic segmentation: a head that predicts a label map from a classifier's feature maps at several depths.

The networks are those of the families' authors (Vim, LocalMamba, VMamba, EfficientVMamba), who all train UperNet with
a convolutional auxiliary head; V2M's is built like Vim's. Defaults are the published settings, with mistakes corrected.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vimd_jax.models.heads import FCN, Head, Linear, UperNet
from vimd_jax.models.isotropic import Isotropic, State
from vimd_jax.models.layers import IMAGENET_MEAN
from vimd_jax.models.local_vim import SEARCHED, LocalVim
from vimd_jax.models.necks import OutputNorms, Pyramid
from vimd_jax.models.network import Composite, Network, square
from vimd_jax.models.registry import CLASSIFIERS, create_model, describe, model_options
from vimd_jax.models.resize import resize_bilinear


class Segmenter(Composite):
    """A backbone and a head for label maps.

    Attributes:
      backbone: a classifier without its head.
      decode_head: computes class scores from the backbone's maps.
      auxiliary_head: computes class scores from one of the maps, for a second training loss; or None.
      taps: the layers or stages after which maps are taken, counted from 0; None: the last layer of each quarter of the
        layers, or all stages.
      auxiliary_tap: the map that the auxiliary head reads, counted from 0; None: the second to last.
      tapped: the state that is taken there, see `Isotropic.feature_maps`; for networks with stages the "stream".
      normalize_last: normalise the last map, an option of Vim's and V2M's segmenters that no published one uses.
    """

    backbone: Network
    decode_head: Head | Linear
    auxiliary_head: FCN | None
    taps: tuple[int, ...] | None = None
    auxiliary_tap: Literal[0, 1, 2, 3] | None = None
    tapped: State = "stream"
    normalize_last: bool = False

    dense = True

    def __post_init__(self):
        super().__post_init__()
        if not self.num_classes:
            raise ValueError("num_classes: 0 is not valid, expected at least 1")
        depth = self.backbone.depth if self.isotropic else len(self.backbone.depths)
        if self.taps == () or not set(self.taps or ()) <= set(range(depth)):
            raise ValueError(f"taps: {self.taps} is not valid, expected numbers from 0 to below {depth}")
        if self.auxiliary_head and not 0 <= self._auxiliary_index < len(self._layers):
            raise ValueError(f"auxiliary_tap: {self.auxiliary_tap} is not valid with {len(self._layers)} taps")
        if self.tapped != "stream" and not self.isotropic:
            raise ValueError(f'tapped: {self.tapped!r} is not valid, networks with stages have only the "stream"')
        if self.normalize_last and not self._pyramid:
            raise ValueError("normalize_last: True is not valid, every map of this network has a norm already")
        if self._pyramid and self.backbone.stride not in (4, 8, 16):
            raise ValueError(f"stride: {self.backbone.stride} is not valid in a segmenter, expected 4, 8 or 16")

    @property
    def isotropic(self) -> bool:
        """True if the backbone's layers all have one shape; False if it has stages."""
        return isinstance(self.backbone, Isotropic)

    @property
    def num_classes(self) -> int:
        """Classes of the label map."""
        return self.decode_head.num_classes

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side, or (height, width), in pixels, of the crops that the network is meant for."""
        return self.backbone.image_size

    @property
    def grid(self) -> tuple[int, int] | None:
        """See `Network`."""
        return self.backbone.grid

    @classmethod
    def option_types(cls, chosen: dict[str, Any]) -> dict[str, Any]:
        """See `Network`: the parameters of `from_options`, and the options of the backbone that is chosen."""
        parameters = inspect.signature(cls.from_options).parameters
        own = {name: parameter.annotation for name, parameter in parameters.items() if name != "options"}
        backbone = chosen.get("backbone")
        return model_options(backbone if backbone in CLASSIFIERS else "vim_tiny") | own

    @classmethod
    def from_options(
        cls,
        backbone: str,
        num_classes: int = 150,
        head: Literal["upernet", "linear"] = "upernet",
        head_channels: int = 512,
        head_dropout_rate: float = 0.1,
        auxiliary_channels: int = 256,
        auxiliary_tap: Literal[0, 1, 2, 3] | None = None,
        taps: tuple[int, ...] | None = None,
        tapped: State = "stream",
        normalize_last: bool = False,
        bn_axis_name: str | None = None,
        dtype: Any = jnp.float32,
        **options: Any,
    ) -> "Segmenter":
        """The network whose parts have these options.

        Args:
          backbone: name of a classifier.
          num_classes: classes of the label map.
          head: "upernet", or "linear" to probe what the backbone's maps encode.
          head_channels: width of UperNet's convolutions.
          head_dropout_rate: see `heads.Head`; of both heads.
          auxiliary_channels: width of the auxiliary head; 0 for none.
          auxiliary_tap: see the attributes.
          taps: see the attributes.
          tapped: see the attributes.
          normalize_last: see the attributes.
          bn_axis_name: axis of devices across which training batches are normalised together.
          dtype: of all parts.
          **options: of the backbone.
        """
        if head not in ("upernet", "linear"):
            raise ValueError(f'head: {head!r} is not valid, expected "upernet" or "linear"')
        shared = {"num_classes": num_classes, "bn_axis_name": bn_axis_name}
        convolving = shared | {"dtype": dtype, "dropout_rate": head_dropout_rate}
        if backbone not in CLASSIFIERS:
            raise ValueError(f"backbone: {backbone!r} is not a classifier, choose one of {', '.join(CLASSIFIERS)}")
        own = {"bn_axis_name": bn_axis_name} if "bn_axis_name" in model_options(backbone) else {}
        decode_head = Linear(**shared)
        if head == "upernet":
            decode_head = _named("head", UperNet, channels=head_channels, **convolving)
        auxiliary_head = None
        if auxiliary_channels != 0:
            auxiliary_head = _named("auxiliary", FCN, channels=auxiliary_channels, **convolving)
        trunk = create_model(backbone, num_classes=0, dtype=dtype, **own, **options)
        how = {"auxiliary_tap": auxiliary_tap, "tapped": tapped, "normalize_last": normalize_last}
        return cls(backbone=trunk, decode_head=decode_head, auxiliary_head=auxiliary_head, taps=taps, **how)

    def to_options(self) -> dict[str, Any]:
        """See `Network`."""
        backbone, head, auxiliary = describe(self.backbone), self.decode_head, self.auxiliary_head
        own = {"backbone": backbone["architecture"], "num_classes": self.num_classes, "head": "linear"}
        if isinstance(head, UperNet):
            own |= {"head": "upernet", "head_channels": head.channels, "head_dropout_rate": head.dropout_rate}
        own |= {"auxiliary_channels": auxiliary.channels if auxiliary else 0, "auxiliary_tap": self.auxiliary_tap}
        own |= {"taps": self.taps, "tapped": self.tapped, "normalize_last": self.normalize_last}
        return backbone["options"] | own

    def decays(self, path: tuple[str, ...]) -> bool:
        """See `Network`: Vim's rule for Vim and V2M; for the other families, all but norms, positions and class tokens.

        The authors select parameters by name, so that the norms of heads and stems decay in their training as well.
        """
        if self._pyramid:
            return super().decays(path)
        return not any("norm" in name for name in path) and path[-1] not in ("position_embedding", "class_token")

    def __call__(
        self, images: jax.Array, *, train: bool = False, return_features: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, Any]]:
        """Class scores for every 4×4 pixels, or for every token where the first map is coarser.

        Args:
          images: (batch, height, width, 3) floats in [0, 1].
          train: apply stochastic depth and dropout, which need the rng stream "drop_path" where a rate is above 0;
            normalise by batch statistics and update the running averages: pass mutable=["batch_stats"].
          return_features: also return the features below.

        Returns:
          logits (batch, rows, columns, num_classes) float32; with `return_features`, the pair (logits, features):
          features["hidden_states"]: the maps that the heads read, a tuple of (batch, rows, columns, channels) float32;
          features["auxiliary_logits"]: class scores of the auxiliary head, where there is one, at its map's resolution.

        Raises:
          ValueError: images have a wrong rank, channel count or dtype, or are too small; or a training batch has a
            single image.
        """
        kind = {"state": self.tapped} if self.isotropic else {}
        maps = self.backbone.feature_maps(images, self._layers, train=train, neck=self._neck(train), **kind)
        logits, features = self.decode_head(maps, train=train), {"hidden_states": maps}
        if self.auxiliary_head is not None and (return_features or self.is_initializing()):
            features["auxiliary_logits"] = self.auxiliary_head(maps[self._auxiliary_index], train=train)
        return (logits, features) if return_features else logits

    @property
    def _layers(self) -> tuple[int, ...]:
        """The taps: by default the last layer of each quarter, or all stages."""
        if self.taps is not None:
            return self.taps
        if not self.isotropic:
            return tuple(range(len(self.backbone.depths)))
        return tuple(max(self.backbone.depth * quarter // 4, 1) - 1 for quarter in (1, 2, 3, 4))

    @property
    def _auxiliary_index(self) -> int:
        return len(self._layers) - 2 if self.auxiliary_tap is None else self.auxiliary_tap

    @property
    def _pyramid(self) -> bool:
        """True if the neck is a `Pyramid`: for all isotropic backbones but LocalVim."""
        return self.isotropic and not isinstance(self.backbone, LocalVim)

    def _neck(self, train: bool) -> Callable[..., nn.Module]:
        if not self._pyramid:
            return OutputNorms
        return partial(
            Pyramid,
            stride=self.backbone.stride,
            normalize_last=self.normalize_last,
            train=train,
            bn_axis_name=self.decode_head.bn_axis_name,
            dtype=self.backbone.dtype,
        )

    def segment(
        self,
        variables: dict[str, Any],
        images: jax.Array,
        mode: Literal["whole", "slide"] = "whole",
        window: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
    ) -> jax.Array:
        """Class scores for every pixel of images of any size.

        Args:
          variables: of this network.
          images: (batch, height, width, 3) floats in [0, 1].
          mode: "whole" images at once, or "slide" a window over them and average the scores of overlapping windows.
          window: side, or (height, width), of the windows in pixels; None: the network's image_size. It is cropped to
            the size of smaller images.
          stride: pixels from one window to the next, or (vertical, horizontal); None: two thirds of the window. The
            last windows end at the border.

        Returns:
          (batch, height, width, num_classes) float32.

        Raises:
          ValueError: an unknown mode; a window or stride where whole images are segmented, or that leaves gaps.
        """
        if mode == "whole" and (window, stride) == (None, None):
            return self._scores(variables, images)
        if mode != "slide":
            raise ValueError(f'mode: {mode!r} is not valid, expected "slide", or "whole" without window and stride')
        size = images.shape[1:3]
        window = np.minimum(square(self.image_size if window is None else window), size)
        steps = window * 2 // 3 if stride is None else np.array(square(stride))
        if np.any(steps < 1) or np.any(steps > window):
            raise ValueError(f"stride: {tuple(steps)} is not valid, expected 1 to the window's {tuple(window)}")
        rows, columns = (_starts(*sides) for sides in zip(size, window.tolist(), steps.tolist()))
        corners = np.array([(row, column) for row in rows for column in columns])
        hits = np.zeros((*size, 1), np.float32)
        for row, column in corners:
            hits[row : row + window[0], column : column + window[1]] += 1

        def add(total, corner):
            place, shape = (0, *corner, 0), (len(images), *window.tolist())
            scores = self._scores(variables, jax.lax.dynamic_slice(images, place, (*shape, 3)))
            before = jax.lax.dynamic_slice(total, place, scores.shape)
            return jax.lax.dynamic_update_slice(total, before + scores, place), None

        total, _ = jax.lax.scan(add, jnp.zeros((*images.shape[:3], self.num_classes)), corners)
        return total / hits

    def _scores(self, variables: dict[str, Any], images: jax.Array) -> jax.Array:
        """Class scores for every pixel, from images padded to whole patches so that no pixel is left out."""
        size = images.shape[1:3]
        patch = self.backbone.stride if self.isotropic else 4
        padded = [-(-side // patch) * patch for side in size]
        mean = jnp.array(IMAGENET_MEAN if self.backbone.input_normalization else 0.0, images.dtype)
        margins = ((0, 0), *((0, more - side) for more, side in zip(padded, size)), (0, 0))
        logits = self.apply(variables, jnp.pad(images - mean, margins) + mean)
        return resize_bilinear(logits, padded)[:, : size[0], : size[1]]


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Start positions of windows that cover a side."""
    count = max(side - window + stride - 1, 0) // stride + 1
    return [min(k * stride, side - window) for k in range(count)]


def _named(prefix: str, head: type[Network], **options: Any) -> Network:
    """Creates a head; errors name its options as `Segmenter.from_options` does."""
    try:
        return head(**options)
    except ValueError as error:
        raise ValueError(f"{prefix}_{error}") from None


_VIM = {"class_token": None, "image_size": 512}
_LOCAL_VIM = {
    "tapped": "update",
    "auxiliary_tap": 3,
    "normalization": "layer",
    "directions": SEARCHED,
    "image_size": 512,
}
_EFFICIENT_CHANNELS = {"tiny": 256, "small": 384, "base": 512}  # inferred from the paper's parameter counts

MODELS = {
    "upernet_vim_tiny": partial(Segmenter, backbone="vim_tiny", head_channels=192, tapped="update", **_VIM),
    "upernet_vim_small": partial(Segmenter, backbone="vim_small", head_channels=384, rope=True, **_VIM),
    "upernet_v2m_tiny": partial(Segmenter, backbone="v2m_tiny", head_channels=192, **_VIM),
    "upernet_v2m_small": partial(Segmenter, backbone="v2m_small", head_channels=384, **_VIM),
    "upernet_local_vim_tiny": partial(Segmenter, backbone="local_vim_tiny", **_LOCAL_VIM),
    "upernet_local_vim_small": partial(Segmenter, backbone="local_vim_small", **_LOCAL_VIM),
    **{
        f"upernet_{name}": partial(Segmenter, backbone=name, image_size=512)
        for name in CLASSIFIERS
        if name.startswith(("vmamba", "local_vmamba")) and not name.endswith("search")
    },
    **{
        f"upernet_efficient_vmamba_{size}": partial(
            Segmenter, backbone=f"efficient_vmamba_{size}", head_channels=channels, image_size=512
        )
        for size, channels in _EFFICIENT_CHANNELS.items()
    },
}
