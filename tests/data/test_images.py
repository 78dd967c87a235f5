import io
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from vimd_jax.data import images
from vimd_jax.data.images import check_header, decode_image, find_images, read_image
from vimd_jax.errors import UnreadableImage


def gradient(width=32, height=24):
    """A smooth RGB image, so that lossy formats stay close to it."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 7, y * 9, 255 - x * 7], -1).astype(np.uint8)


@pytest.mark.parametrize("name", ["a.jpg", "a.PNG", "a.bmp", "a.webp", "a.tif", "a.gif", "a.ppm"])
def test_reads_the_usual_formats(tmp_path, name):
    Image.fromarray(gradient()).save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert (image.mode, image.size) == ("RGB", (32, 24))
    # GIF has only 256 colours, and JPEG and WebP are lossy; none differs by more than this on average.
    assert np.abs(np.asarray(image, float) - gradient()).mean() < 8


def test_cmyk_jpeg(tmp_path):
    Image.fromarray(gradient()).convert("CMYK").save(tmp_path / "a.jpg")
    assert np.abs(np.asarray(read_image(tmp_path / "a.jpg"), float) - gradient()).mean() < 8


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_greyscale_becomes_three_equal_channels(tmp_path, mode):
    Image.fromarray(gradient()).convert(mode).save(tmp_path / "a.png")
    pixels = np.asarray(read_image(tmp_path / "a.png"))
    assert pixels.shape == (24, 32, 3)
    assert (pixels == pixels[..., :1]).all()
    assert pixels.min() < 40 and pixels.max() > 150


def test_palette(tmp_path):
    Image.fromarray(gradient()).quantize(64).save(tmp_path / "a.png")
    assert np.abs(np.asarray(read_image(tmp_path / "a.png"), float) - gradient()).mean() < 12


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_greyscale_is_scaled_not_clipped(tmp_path, suffix):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    pixels = np.asarray(read_image(tmp_path / f"a.{suffix}"))
    np.testing.assert_array_equal(pixels[..., 0].ravel(), np.arange(256))


def test_all_16_bit_values():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = np.asarray(images.as_rgb(Image.fromarray(values), "x"))[..., 0].astype(int)
    np.testing.assert_array_equal(pixels, (values.astype(int) * 255 + 32767) // 65535)


def test_signed_16_bit_values_are_not_black(tmp_path):
    values = np.linspace(-32768, 32767, 256).round().astype(np.int16).reshape(16, 16)
    for name, part in {"all.tif": values, "above_zero.tif": np.maximum(values, 0)}.items():
        Image.fromarray(part.view(np.uint16)).save(tmp_path / name, tiffinfo={339: 2})  # the sample format "signed"
        pixels = np.asarray(read_image(tmp_path / name))[..., 0].ravel()
        np.testing.assert_array_equal(pixels, np.maximum(np.arange(256), 128 if "above" in name else 0))


def test_a_named_range_of_values(tmp_path):
    deep = np.linspace(0, 4095, 256).round().reshape(16, 16)
    Image.fromarray(deep.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "float.tif")
    for name in ("deep.png", "float.tif"):
        pixels = np.asarray(read_image(tmp_path / name, value_range=(0, 4095)))[..., 0].ravel()
        np.testing.assert_array_equal(pixels, np.arange(256))
        assert (np.asarray(read_image(tmp_path / name, value_range=(5000, 6000))) == 0).all()
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "large.tif")
    with pytest.raises(UnreadableImage, match="large.tif: values .* 70000 are more than .*config.dataset.value_range"):
        read_image(tmp_path / "large.tif")


def test_a_small_part_of_16_bits_is_said(tmp_path):
    for name, largest in {"12": 4095, "16": 65535}.items():
        Image.fromarray(np.linspace(0, largest, 16).astype(np.uint16).reshape(4, 4)).save(tmp_path / f"{name}.png")
    Image.new("L", (4, 4)).save(tmp_path / "8.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    assert "values from 0 to 4095, a small part" in images.narrow_range([tmp_path / "12.png", tmp_path / "broken.png"])
    assert images.narrow_range([tmp_path / "12.png", tmp_path / "16.png"]) == ""
    assert images.narrow_range([tmp_path / "8.png"]) == images.narrow_range([]) == ""


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparency_is_composited_onto_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((200, 10, 10, 255), (0, 0, 4, 8))
    if mode == "P":
        image = image.quantize(4)
    image.save(tmp_path / "a.png")
    pixels = np.asarray(read_image(tmp_path / "a.png"))
    assert tuple(pixels[0, 7]) == (255, 255, 255)
    assert abs(int(pixels[0, 0, 0]) - 200) < 4


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated clockwise by 90 degrees
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "a.jpg")
    assert image.size == (24, 32)
    assert np.abs(np.asarray(image, float) - np.rot90(gradient(), -1)).mean() < 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_make_the_image_unreadable(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff rubbish")
    assert read_image(tmp_path / "a.jpg").size == (32, 24)


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (1, 2, 3)


def test_enormous_jpeg_is_decoded_at_reduced_size(tmp_path):
    Image.new("RGB", (9000, 4500), (90, 120, 30)).save(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").size == (4500, 2250)


@pytest.mark.parametrize("limit", [(Image, "MAX_IMAGE_PIXELS", 100), (images, "MAX_PIXELS", 300)])
@pytest.mark.parametrize("read", [read_image, check_header])
def test_decompression_bomb_is_named(tmp_path, monkeypatch, limit, read):
    monkeypatch.setattr(*limit)
    Image.new("RGB", (20, 20)).save(tmp_path / "bomb.png")
    with pytest.raises(UnreadableImage, match=r"bomb\.png: more than \d+ megapixels"):
        read(tmp_path / "bomb.png")


def damaged_files():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "JPEG")
    jpeg = file.getvalue()
    file = io.BytesIO()
    Image.fromarray(gradient()).save(file, "PNG")
    png = file.getvalue()
    return {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (png[: len(png) // 2], None),
        "header_only.jpg": (jpeg[:20], None),
        "empty.jpg": (b"", "the file is empty"),
        "text.jpg": (b"this is not an image\n" * 10, "not an image"),
        "flipped.png": (png[:40] + bytes(255 - b for b in png[40:60]) + png[60:], None),
    }


@pytest.mark.parametrize("name", damaged_files())
def test_damaged_files_are_named_with_the_cause(tmp_path, name):
    content, cause = damaged_files()[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableImage, match=cause) as error:
        read_image(tmp_path / name)
    message = str(error.value)
    assert (
        message.startswith(f"{tmp_path / name}: ")
        and "\n" not in message
        and len(message) > len(str(tmp_path / name)) + 8
    )


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UnreadableImage, match=r"gone\.jpg: No such file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(UnreadableImage, match="directory"):
        read_image(tmp_path)


def test_floating_point_tiff_is_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImage, match="floating-point"):
        read_image(tmp_path / "a.tif")


def test_random_damage_raises_nothing_else():
    rng = np.random.default_rng(1)
    for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        file = io.BytesIO()
        Image.fromarray(gradient()).save(file, format)
        clean = np.frombuffer(file.getvalue(), np.uint8)
        for _ in range(60):
            damaged = clean.copy()
            where = rng.integers(len(clean), size=rng.integers(1, 8))
            damaged[where] = rng.integers(0, 256, len(where))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    image = decode_image(io.BytesIO(damaged[: rng.integers(1, len(clean) + 1)].tobytes()), "x")
                    assert image.mode == "RGB"
                except UnreadableImage as error:
                    assert "\n" not in str(error)


def test_find_images_in_folders_and_subfolders(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("c.png", "a.JPG", "notes.txt", "._a.jpg", "b/z.webp"):
        (tmp_path / name).touch()
    inside = [tmp_path / name for name in ("a.JPG", "b/z.webp", "c.png")]
    assert find_images([tmp_path]) == inside
    assert find_images([tmp_path / "notes.txt", tmp_path / "b"]) == [tmp_path / "notes.txt", inside[1]]


def test_find_images_follows_links_once_and_leaves_out_what_is_no_image(tmp_path):
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for name in ("photos/a.jpg/1.jpg", "photos/.thumbnails/1.jpg", "photos/@eaDir/1.jpg", "elsewhere/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(folder)
    os.mkfifo(folder / "pipe.jpg")
    assert find_images([folder]) == [folder / "a.jpg/1.jpg", folder / "linked/1.jpg"]


def test_find_images_finds_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such file or folder"):
        find_images([tmp_path / "gone.png"])
    with pytest.raises(FileNotFoundError, match="no images in this folder"):
        find_images([tmp_path])


def test_reading_images_does_not_import_the_training_pipeline():
    code = "import sys, vimd_jax.data.images, vimd_jax.data.geometry; print('grain' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code]) == b"False\n"


@pytest.mark.parametrize("orientation, upright", [(1, (400, 240)), (6, (240, 400))])
@pytest.mark.parametrize("factor, scale", [(1, 1), (2, 2), (3, 2), (4, 4), (9, 8)])
def test_reduced_decoding(tmp_path, orientation, upright, factor, scale):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("image.jpg", "image.png"):
        Image.new("RGB", (400, 240), (200, 100, 0)).save(tmp_path / name, exif=exif)
    asked = []
    reduced = read_image(tmp_path / "image.jpg", lambda *size: asked.append(size) or factor)
    assert asked == [upright]
    assert (reduced.width * scale, reduced.height * scale) == upright
    assert read_image(tmp_path / "image.png", lambda *_: factor).size == upright
