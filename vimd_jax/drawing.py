"""Label maps in colours."""

import numpy as np
from PIL import Image


def palette(count: int) -> np.ndarray:
    """Colours that are easy to tell apart, (count, 3) uint8: Pascal VOC's, bits of a number spread over channels."""
    numbers = np.arange(1, count + 1)  # its first colour, black, is that of pixels without a label
    colours = np.zeros((count, 3), np.uint8)
    for shift in range(8):
        for channel in range(3):
            colours[:, channel] |= (((numbers >> (3 * shift + channel)) & 1) << (7 - shift)).astype(np.uint8)
    return colours


def with_palette(labels: np.ndarray, colours: np.ndarray) -> Image.Image:
    """A label map (height, width) as a picture whose values are its classes, shown in their colours (classes, 3)."""
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(colours.astype(np.uint8).tobytes())
    return picture


def blended(image: Image.Image, labels: np.ndarray, colours: np.ndarray, share: float = 0.6) -> Image.Image:
    """An image under its label map (height, width); values beyond the colours leave the image as it is.

    Args:
        image: RGB, of the map's size.
        labels: the map.
        colours: (classes, 3) uint8.
        share: of the colours in the mixture.
    """
    pixels, known = np.asarray(image).astype(np.float32), labels < len(colours)
    pixels[known] = (1 - share) * pixels[known] + share * colours[labels[known]]
    return Image.fromarray(pixels.round().astype(np.uint8))
