"""Image files: finding them, and reading any of them as upright 8-bit RGB. Needs only NumPy and Pillow."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from vimd_jax.errors import UnreadableImage
from vimd_jax.files import open_regular

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
if features.check("avif"):
    EXTENSIONS += (".avif",)
# Folders that network drives, file systems and archive programs add; most others are hidden.
SERVICE_FOLDERS = ("@eadir", "lost+found", "__macosx", "#recycle", "$recycle.bin", "system volume information")
# JPEGs at least twice this size in both directions are decoded at 1/2, 1/4 or 1/8 scale: the networks see 224 pixels,
# so a 100-megapixel photograph need not take 300 MB of memory.
DRAFT_SIZE = 2048
# Larger images of other formats, which are decoded whole, are refused: they take a second and 200 MB each.
MAX_PIXELS = 64 * 10**6
_SAMPLE_FORMAT, _SIGNED = 339, 2  # a tag of TIFF files, and its value for signed integers
_NAME_RANGE = "set config.dataset.value_range, or save it with 8 or 16 bits"


# The values of deep images that become black and white; empty: those of the file's integers, 16-bit ones at most.
ValueRange = tuple[float, float] | tuple[()]
# From the (width, height) of an image when upright, the factor by which a JPEG may be decoded smaller.
Reduction = Callable[[int, int], int]


class Listing(NamedTuple):
    """The entries of a folder, apart from hidden and service files; a link counts as what it points to.

    Attributes:
        folders: their names, sorted.
        images: names of regular files with an image's extension, sorted; also of links that point nowhere.
        others: what each other entry is, as "with .txt".
    """

    folders: list[str]
    images: list[str]
    others: list[str]


def list_folder(folder: str | os.PathLike[str]) -> Listing:
    """Lists a folder, in the one way of training and prediction."""
    listing = Listing([], [], [])
    with os.scandir(os.fspath(folder)) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name.lower() in SERVICE_FOLDERS:
                continue
            if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                listing.folders.append(entry.name)
            elif not is_image_name(entry.name):
                suffix = Path(entry.name).suffix.lower()
                listing.others.append(f"with {suffix}" if suffix else "with no suffix")
            elif os.path.exists(entry) and not entry.is_file():
                listing.others.append("that are pipes, sockets or devices")
            else:
                listing.images.append(entry.name)
    return listing


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The given files, and the images in the given folders and their subfolders, sorted within each folder.

    Raises:
        FileNotFoundError: a path does not exist, or a folder contains no images.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        files = sorted(_images_below(path, set())) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"{path}: no images in this folder; supported are {' '.join(EXTENSIONS)}")
        found += files
    return found


def _images_below(folder: Path, visited: set[tuple[int, int]]) -> Iterator[Path]:
    """The images in a folder and its subfolders, of which none is visited twice: links may go round."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    listing = list_folder(folder)
    yield from (folder / name for name in listing.images)
    for name in listing.folders:
        yield from _images_below(folder / name, visited)


def is_image_name(name: str) -> bool:
    """Whether a file name has an image's extension and is not hidden, as the "._x.jpg" files of macOS are."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def read_image(
    path: str | os.PathLike, reduction: Reduction | None = None, value_range: ValueRange = ()
) -> Image.Image:
    """Reads an image file as upright 8-bit RGB.

    Args:
        path: a file in any format that Pillow reads: JPEG, PNG, BMP, WebP, GIF (first frame), TIFF…
        reduction: says how much smaller the image may be; a JPEG is then decoded at 1/2, 1/4 or 1/8 scale, which takes
            less time. Other formats ignore it.
        value_range: the values of a greyscale image of more than 8 bits that become black and white. By default those
            of 16-bit integers, signed ones if those of the file are; larger integers and floats have no default.

    Returns:
        An RGB image of any size from 1×1: EXIF rotation applied, 16-bit values scaled to 8 bits, palettes, greyscale
        and CMYK converted, transparent areas composited onto white.

    Raises:
        UnreadableImage: the file is missing, empty, truncated, not an image, or larger than `MAX_PIXELS`.
    """
    with _opened(path) as file:
        return decode_image(file, os.fspath(path), reduction, value_range)


def check_header(path: str | os.PathLike) -> None:
    """Raises UnreadableImage if the beginning of a file shows already that it cannot be read."""
    with _opened(path) as file:
        decode_image(file, os.fspath(path), header_only=True)


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[BinaryIO]:
    try:
        file = open_regular(path)  # closed below; only the errors of opening are caught
    except OSError as error:
        raise UnreadableImage(f"{os.fspath(path)}: {error.strerror}") from None
    with file:
        yield file


def decode_image(
    file: BinaryIO,
    name: str,
    reduction: Reduction | None = None,
    value_range: ValueRange = (),
    header_only: bool = False,
) -> Image.Image:
    """Decodes an open image file like `read_image`, or only its header; error messages call it `name`."""
    try:
        with Image.open(file) as image:
            image.draft(None, _smallest_size(image, reduction))
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if header_only:
                return image
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image, value_range)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        cause = f"more than {MAX_PIXELS // 10**6} megapixels; scale it down"
    except UnidentifiedImageError:
        cause = "not an image in a known format" if file.seek(0, os.SEEK_END) else "the file is empty"
    except Exception as error:  # On damaged files Pillow's decoders raise errors of nearly every type.
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise UnreadableImage(f"{name}: {cause}")


def as_rgb(image: Image.Image, name: str, value_range: ValueRange = ()) -> Image.Image:
    """A copy of a Pillow image, as `read_image` would return it; error messages call it `name`."""
    if 0 in image.size:
        raise UnreadableImage(f"{name}: an image without pixels")
    try:
        return _to_rgb(ImageOps.exif_transpose(image), value_range)
    except Exception as error:  # see decode_image
        raise UnreadableImage(f"{name}: {error or type(error).__name__}") from None


def _smallest_size(image: Image.Image, reduction: Reduction | None) -> tuple[int, int]:
    """The size at which, or above which, a JPEG is to be decoded."""
    if reduction is None:
        return DRAFT_SIZE, DRAFT_SIZE
    width, height = image.size
    sideways = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    factor = reduction(height, width) if sideways else reduction(width, height)
    return min(DRAFT_SIZE, width // factor), min(DRAFT_SIZE, height // factor)


def _to_rgb(image: Image.Image, value_range: ValueRange) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):  # which Pillow's own conversion would clip instead of scaling
        values = np.asarray(image)
        low, high = value_range or _usual_range(image, values)
        grey = (np.clip(np.nan_to_num(values.astype(np.float64)), low, high) - low) * (255 / (high - low))
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.mode == "RGB" and not image.has_transparency_data:
        image.load()
        return image  # without the copy that convert makes
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()
    return image


def _usual_range(image: Image.Image, values: np.ndarray) -> tuple[int, int]:
    """The range of the integers that a file holds."""
    if image.mode == "F":
        raise ValueError(f"floating-point pixels have no standard range; {_NAME_RANGE}")
    is_signed = getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT) in (_SIGNED, (_SIGNED,)) or values.min() < 0
    low, high = (-(2**15), 2**15 - 1) if is_signed else (0, 2**16 - 1)
    if values.min() < low or values.max() > high:
        raise ValueError(f"values from {values.min()} to {values.max()} are more than 16 bits hold; {_NAME_RANGE}")
    return low, high


def narrow_range(paths: Iterable[str | os.PathLike]) -> str:
    """In words that these 16-bit images use a small part of their range, "" if they do not; reads all of them."""
    lows, highs = [], []
    for path in paths:
        with (
            contextlib.suppress(Exception),
            _opened(path) as file,
            Image.open(file) as image,
        ):  # which reading will name
            if image.mode.startswith("I") and image.width * image.height <= MAX_PIXELS:
                values = np.asarray(image)
                lows.append(values.min())
                highs.append(values.max())
    if not lows or max(highs) - min(lows) >= 2**14 - 1:
        return ""
    return (
        f"16-bit images with values from {min(lows)} to {max(highs)}, a small part of the range, lose most of their "
        "contrast; config.dataset.value_range names the values that become black and white"
    )
