"""Preparing an image for a network, in the one way that training, evaluation and prediction share."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from vimd_jax.data.geometry import central_view, low_resolution_view


class NetworkView(NamedTuple):
    """The view of an image that a network reads.

    Attributes:
        size: (height, width) in pixels that an image is resized and cropped to.
        crop: share of the image's side that the crop keeps.
        low_resolution: (height, width) that this view is then reduced to, for a network that restores it first; None
            for others.
    """

    size: tuple[int, int]
    crop: float = 1.0
    low_resolution: tuple[int, int] | None = None

    def is_ready(self, image: Image.Image) -> bool:
        """Whether an image has the low resolution already, as a real low-resolution photograph has."""
        return self.low_resolution == (image.height, image.width)


def prepare(image: Image.Image, view: NetworkView) -> np.ndarray:
    """The pixels that a network reads of an image: (height, width, 3) uint8.

    An image of the network's low resolution is read as it is. Any other is resized until it covers `size / crop` and
    cropped to `size` around its centre, then reduced to the low resolution where there is one.

    Args:
        image: RGB, of any size.
        view: of the network.
    """
    return prepare_views(image, view)["low" if view.low_resolution else "high"]


def prepare_views(image: Image.Image, view: NetworkView) -> dict[str, np.ndarray]:
    """The views of an image, see `prepare`: "high", and "low" too for a network that restores images."""
    high = central_view(image.size, view.size, view.crop).apply(image)
    if not view.low_resolution:
        return {"high": np.asarray(high)}
    low = image if view.is_ready(image) else low_resolution_view(high, view.low_resolution)
    return {"high": np.asarray(high), "low": np.asarray(low)}
