"""How a network labels images: in whatever form they come, and what it refuses to guess."""

import dataclasses
import io
import multiprocessing
import pickle
from pathlib import Path

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vimd_jax.checkpoints import trained_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.errors import DatasetError
from vimd_jax.models import create_model

VIM = {"num_classes": 3, "image_size": 32, "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 1}
NAMES = ("crow", "owl", "jay")


def trained(name: str, low_resolution=0, **options) -> TrainedModel:
    model = create_model(name, **options)
    shape = (1, *model.input_size, 3)
    names = NAMES if model.num_classes else ()
    return TrainedModel(model, golden_models.random_variables(model, jnp.zeros(shape)), names, low_resolution)


@pytest.fixture(scope="module")
def vim() -> TrainedModel:
    return trained("vim_tiny", **VIM)


@pytest.fixture(scope="module")
def student() -> TrainedModel:
    return trained("srvm_tiny", 8, sr="bicubic", **VIM)


@pytest.fixture
def files(tmp_path) -> Path:
    random = np.random.default_rng(0)
    for name, size in (("b.png", (8, 8)), ("a.png", (8, 8)), ("c.png", (20, 30))):
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / name)
    return tmp_path


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_arrays_files_and_folders(vim, files):
    paths = [files / name for name in ("a.png", "b.png", "c.png")]
    arrays = np.stack([vim.prepare(path) for path in paths])
    expected = jax.nn.softmax(vim.model.apply(vim.variables, arrays))
    for images in (arrays, list(arrays), jnp.asarray(arrays), files, str(files), [*paths[:2], str(paths[2])]):
        for batch_size in (2, 32):
            assert_close(vim.predict(images, batch_size=batch_size), expected)
    assert_close(vim.predict(files / "a.png"), expected[:1])


@pytest.mark.parametrize("image", [Image.new("RGB", (0, 0)), Image.new("RGB", (5, 0)), np.zeros((0, 4, 3), np.uint8)])
def test_images_without_pixels_are_refused(vim, image):
    with pytest.raises(ValueError, match=r"images\[0\]: an (image without pixels|array of shape)"):
        vim.predict(image)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_has_images(vim, files, batch_size):
    with pytest.raises(ValueError, match=f"batch_size: {batch_size}, expected"):
        vim.predict(files, batch_size=batch_size)


def test_whatever_holds_an_image(vim, files):
    path = files / "c.png"
    expected, pixels = vim.predict(path), np.asarray(Image.open(path))
    with path.open("rb") as file:
        for image in (Image.open(path), path.read_bytes(), file, pixels, io.BytesIO(path.read_bytes())):
            assert_close(vim.predict(image), expected)
    mixed = [Image.open(path), path.read_bytes(), pixels, str(path), vim.prepare(path)]
    assert_close(vim.predict(mixed), np.repeat(expected, 5, axis=0))
    rotated = Image.open(path)
    rotated.getexif()[0x0112] = 3  # upside down
    assert_close(vim.predict(rotated), vim.predict(Image.open(path).rotate(180)))
    assert np.array_equal(np.asarray(rotated), pixels)  # the caller's image is not changed


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((32, 32, 3), 200.0), r"images\[0\]: values from 200 to 200, expected 0 to 1: divide by 255"),
        (np.full((32, 32, 3), -1.5), "values from -1.5 to -1.5, expected 0 to 1: undo the normalisation"),
        (np.full((32, 32, 3), np.nan), "values from nan to nan, .*not finite"),
        (np.zeros((2, 33, 32, 3)), r"an array of shape \(33, 32, 3\), expected \(32, 32, 3\)"),
        (np.zeros((32, 32)), r"an array of shape \(32, 32\) is not an image"),
        (np.zeros((32, 32, 1), np.uint8), r"shape \(32, 32, 1\), expected \(height, width, 3\)"),
        (b"no image", r"images\[0\]: not an image in a known format"),
        (3, "a int is not an image"),
        ([], "There are no images"),
    ],
    ids=str,
)
def test_what_it_does_not_read_is_named(vim, image, message):
    with pytest.raises(ValueError, match=message):
        vim.predict(image)


def test_deep_images_are_read_with_the_range_of_the_training(vim, tmp_path):
    deep = Image.fromarray(np.linspace(0, 4095, 1024).astype(np.uint16).reshape(32, 32))
    deep.save(tmp_path / "deep.png")
    network = dataclasses.replace(vim, value_range=(0, 4095))
    for image in (tmp_path / "deep.png", (tmp_path / "deep.png").read_bytes(), deep):
        assert network.prepare(image).max() == 1 and vim.prepare(image).max() < 0.07


def test_a_student_resizes_only_when_asked(student, files):
    assert student.predict([files / "a.png", files / "b.png"]).shape == (2, 3)
    with pytest.raises(DatasetError, match="c.png: 30x20 pixels, but this network reads 8x8; add --downsample"):
        student.predict(files)
    assert student.predict(files, downsample=True).shape == (3, 3)
    with pytest.raises(ValueError, match=r"an array of shape \(32, 32, 3\), expected \(8, 8, 3\)"):
        student.predict(np.zeros((32, 32, 3)))


def test_images_that_are_not_square(files):
    options = VIM | {"image_size": (16, 32)}
    wide, student = trained("vim_tiny", **options), trained("srvm_tiny", (4, 8), sr="bicubic", **options)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8))
    np.testing.assert_array_equal(wide.prepare(image), np.asarray(image, np.float32) / 255)
    assert wide.prepare(files / "c.png").shape == (16, 32, 3)
    assert student.prepare(files / "c.png", downsample=True).shape == (4, 8, 3)
    assert student.predict(Image.new("RGB", (8, 4))).shape == (1, 3)


def test_a_super_resolution_network_predicts_nothing(files):
    with pytest.raises(ValueError, match="super-resolution network"):
        trained("srresnet_x4", channels=4, num_blocks=1).predict(files)


def test_few_sizes_of_batches_are_compiled(files):
    fresh = trained("vim_tiny", **VIM)
    image = fresh.prepare(files / "a.png")
    expected = fresh.predict(image)
    for count in np.random.default_rng(0).permutation(np.arange(1, 41)):
        assert_close(fresh.predict(np.repeat(image[None], count, axis=0)), np.repeat(expected, count, axis=0))
    assert fresh._classify.func._cache_size() == 6


def test_a_server_compiles_before_its_first_request(student, files):
    fresh = dataclasses.replace(student)
    fresh.warm_up([1, 4])
    fresh.predict(files / "a.png")
    fresh.predict([files / "a.png"] * 3)
    assert fresh._classify.func._cache_size() == 2


def test_images_are_read_batch_by_batch(vim, files, monkeypatch):
    """However many there are, no more than a batch is in memory."""
    read, most = 0, 0

    def read_one(path, value_range, original=trained_model.read_image):
        nonlocal read
        read += 1
        return original(path, value_range=value_range)

    def classify(classifier, images):
        nonlocal read, most
        read, most = 0, max(most, read)
        return np.zeros((len(images), 3))

    monkeypatch.setattr(trained_model, "read_image", read_one)
    monkeypatch.setattr(TrainedModel, "probabilities", classify)
    assert vim.predict([files / "a.png"] * 20, batch_size=8).shape == (20, 3)
    assert most == 8


def test_it_is_pickled_before_and_after_its_first_prediction(student, files):
    fresh = dataclasses.replace(student)
    before = pickle.loads(pickle.dumps(fresh))
    expected = fresh.predict(files / "a.png")
    after = pickle.loads(pickle.dumps(fresh))
    for copy in (before, after):
        assert copy.model == fresh.model and copy.class_names == NAMES
        assert_close(copy.predict(files / "a.png"), expected)


def _predict(model, path, answers):
    try:
        model.predict(path)
    except RuntimeError as error:
        answers.put(str(error))


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_is_told_instead_of_waiting_for_ever(vim, files):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_predict, args=(vim, files / "a.png", answers))
    child.start()
    assert "was forked from process" in answers.get(timeout=60)
    child.join()


def test_a_ruined_network_is_named(vim):
    ruined = dataclasses.replace(vim, variables=jax.tree.map(lambda x: x * np.nan, vim.variables))
    with pytest.raises(ValueError, match="the weights or the images contain invalid values"):
        ruined.predict(np.zeros((32, 32, 3)))
