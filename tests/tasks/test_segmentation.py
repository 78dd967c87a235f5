"""Segmentation against the recorded losses and metrics, and what evaluation makes of a label map's size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import golden
from tests.tiny import tiny_config
from vimd_jax import losses
from vimd_jax.data.geometry import whole_view
from vimd_jax.data.sources import Record
from vimd_jax.models.resize import resize_bilinear, resize_into
from vimd_jax.tasks import segmentation
from vimd_jax.tasks.segmentation import SEGMENTATION
from vimd_jax.tasks.task import Output, Sums

METRICS = {"mean_iou": "mIoU", "mean_accuracy": "mAcc", "pixel_accuracy": "aAcc"}


def small_config(**changes):
    return tiny_config("segmenter", **changes)


@pytest.mark.parametrize("over, recorded", [("all", "avg_non_ignore0"), ("labelled", "avg_non_ignore1")])
@pytest.mark.parametrize("case", golden.cases("c10_loss_*"))
def test_the_recorded_losses_and_gradients(case, over, recorded):
    tensors, made = golden.tensors(case), golden.meta(case)["constructor"]

    @jax.jit
    @jax.value_and_grad
    def loss(logits):
        config = small_config(loss__pixel_mean=over, loss__class_weights=tuple(made["class_weight"] or ()))
        output, batch = Output(logits), {"target": jnp.asarray(tensors["labels"], jnp.uint8)}
        return made["loss_weight"] * SEGMENTATION.loss(output, batch, config)[0]

    value, gradient = loss(np.moveaxis(tensors["logits"], 1, -1))
    np.testing.assert_allclose(value, tensors[f"loss_{recorded}"], rtol=1e-6, atol=1e-7)
    expected = np.moveaxis(tensors[f"grad_{recorded}"], 1, -1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6 * max(np.abs(expected).max(), 1e-6))


def test_the_auxiliary_loss_has_its_weight():
    logits, batch = jnp.zeros((1, 2, 2, 4)), {"target": jnp.ones((1, 8, 8), jnp.uint8)}
    output = Output(logits, {"auxiliary_logits": jnp.zeros((1, 1, 1, 4))})
    total, terms = SEGMENTATION.loss(output, batch, small_config())
    assert terms == pytest.approx({"cross_entropy": np.log(4), "auxiliary": np.log(4)})
    assert total == pytest.approx(1.4 * np.log(4))
    assert SEGMENTATION.loss(output, batch, small_config(loss__auxiliary_weight=0.0))[0] == pytest.approx(np.log(4))


@pytest.mark.parametrize("case", golden.cases("c10_metric_*"))
def test_the_recorded_metrics(case):
    tensors, classes = golden.tensors(case), golden.meta(case)["constructor"]["num_classes"]
    total, sums_of = {}, jax.jit(SEGMENTATION.sums)
    for i in range(sum(name.startswith("gt") for name in tensors)):
        labels, predicted = tensors[f"gt{i}"], tensors[f"pred{i}"]
        canvas = np.full((1, 40, 60), segmentation.IGNORED, np.uint8)
        canvas[0, : labels.shape[0], : labels.shape[1]] = labels
        size = np.array([labels.shape], np.int32)
        batch = {"target": canvas, "label_size": size, "weight": np.ones(1, np.float32)}
        sums = sums_of(10 * np.eye(classes, dtype=np.float32)[predicted][None], batch)
        total = {name: np.float64(x) + total.get(name, 0) for name, x in sums.items()}
    np.testing.assert_array_equal(total["confusion"], tensors["confusion_row_gt_col_pred"])
    iou, accuracy = segmentation.class_scores(total)
    np.testing.assert_allclose(iou, 100 * tensors["metric_IoU"], rtol=1e-6)
    np.testing.assert_allclose(accuracy, 100 * tensors["metric_Acc"], rtol=1e-6)
    scores, expected = SEGMENTATION.scores(total), golden.meta(case)["summary_percent_rounded"]
    for ours, theirs in METRICS.items():
        assert round(scores[ours], 2) == pytest.approx(expected[theirs], abs=1e-4)
    table = SEGMENTATION.tables(Sums(total, {}), tuple(map(str, range(classes))))["per_class"]
    assert len(table) == 1 + classes and table[1][2] == pytest.approx(iou[0], nan_ok=True)


def test_scores_reach_a_size_that_is_known_when_they_run():
    x = jax.random.normal(jax.random.key(0), (7, 5, 3))
    for size in ((7, 5), (13, 9), (4, 3), (1, 1)):
        resized = jax.jit(resize_into, static_argnums=2)(x, jnp.array(size), (16, 12))[: size[0], : size[1]]
        np.testing.assert_allclose(resized, resize_bilinear(x[None], size)[0], atol=1e-6)


def test_scales_and_mirroring_are_averaged():
    model, images = Pixelwise(), np.random.default_rng(0).uniform(size=(1, 8, 12, 3)).astype(np.float32)
    scores = model.segment({}, images)
    mirrored = model.segment({}, images[:, :, ::-1])[:, :, ::-1]
    expected = np.log((jax.nn.softmax(scores) + jax.nn.softmax(mirrored)) / 2)
    found = SEGMENTATION.answer(model, {}, images, small_config(inference__flip=True))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    halved = resize_bilinear(model.segment({}, resize_bilinear(images, (4, 6))), (8, 12))
    expected = np.log((jax.nn.softmax(scores) + jax.nn.softmax(halved)) / 2)
    found = SEGMENTATION.answer(model, {}, images, small_config(inference__scales=(0.5, 1.0)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


class Pixelwise:
    """Instead of a network: the score of a class is a colour of the pixel, weaker from left to right."""

    def segment(self, variables, images, *how):
        self.how = how
        return images * jnp.linspace(2, 1, images.shape[2])[:, None]


def test_windows_are_those_of_the_config():
    model, images = Pixelwise(), np.zeros((1, 4, 6, 3), np.float32)
    SEGMENTATION.answer(model, {}, images, small_config())
    assert model.how == ("whole", None, None)
    slid = small_config(inference__mode="slide", inference__window=32, inference__stride=16)
    SEGMENTATION.answer(model, {}, images, slid)
    assert model.how == ("slide", 32, 16)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss__class_weights": (1.0, 2.0)}, "config.loss.class_weights: 2 weights, but there are 3 classes"),
        ({"inference__window": 64}, "config.inference.window and stride belong to mode=slide"),
        ({"inference__scales": ()}, "config.inference.scales is empty"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        SEGMENTATION.check(small_config(**changes), 3)


def test_a_record_without_a_label_map_counts_nowhere():
    target = SEGMENTATION.target(Record(Image.new("RGB", (12, 8))), whole_view((12, 8), (6, 4)))
    assert target.shape == (4, 6) and (target == segmentation.IGNORED).all()
    assert losses.pixel_cross_entropy(jnp.zeros((1, 4, 6, 2)), target[None]) == 0
