"""Classification: scores and tables from sums that stay small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vimd_jax.tasks.classification import CLASSIFICATION as TASK
from vimd_jax.tasks.task import Sums


def evaluated(logits, labels, weights) -> Sums:
    batch = {"target": jnp.array(labels), "weight": jnp.array(weights, jnp.float32)}
    images = {name: np.asarray(x)[np.array(weights) > 0] for name, x in TASK.per_image(logits, batch).items()}
    return Sums(jax.tree.map(np.float64, TASK.sums(logits, batch)), images)


def test_scores_and_tables_count_every_image_once():
    logits = jnp.array([[3.0, 1, 0, -1, -2, -3], [3, 1, 0, -1, -2, -3], [0, 9, 0, 0, 0, 0], [0, 0, 0, 0, 0, 7]])
    sums = evaluated(logits, [0, 5, 1, 2], [1, 1, 1, 0])
    scores = TASK.scores(sums.total)
    assert list(scores) == ["top1", "loss", "top5"] and TASK.drawn[0] in scores
    assert [scores["top1"], scores["top5"]] == pytest.approx([100 * 2 / 3] * 2)
    expected = -jax.nn.log_softmax(logits)[np.arange(3), np.array([0, 5, 1])].mean()
    assert scores["loss"] == pytest.approx(float(expected), rel=1e-6)

    matrix = np.zeros((6, 6), int)
    matrix[0, 0] = matrix[5, 0] = matrix[1, 1] = 1
    np.testing.assert_array_equal(TASK.confusion(sums, 6), matrix)
    title, *rows = TASK.tables(sums, tuple("abcdef"))["per_class"]
    assert title == ("class", "images", "correct", "accuracy_percent")
    assert [row[:3] for row in rows] == [
        ("a", 1, 1), ("b", 1, 1), ("c", 0, 0), ("d", 0, 0), ("e", 0, 0), ("f", 1, 0),
    ]  # fmt: skip
    assert [rows[0][3], rows[5][3]] == [100, 0] and np.isnan(rows[2][3])


def test_nothing_that_a_batch_gives_grows_with_the_classes():
    """A dense confusion matrix of 5,000 classes would have 25 million entries a batch."""
    logits = jax.ShapeDtypeStruct((64, 5000), jnp.float32)
    batch = {"target": jax.ShapeDtypeStruct((64,), jnp.int32), "weight": jax.ShapeDtypeStruct((64,), jnp.float32)}
    for function in (TASK.sums, TASK.per_image):
        results = jax.eval_shape(function, logits, batch)
        assert all(x.size <= 64 for x in results.values())


def test_a_record_without_a_class_has_a_target_too():
    from PIL import Image

    from vimd_jax.data.geometry import central_view
    from vimd_jax.data.sources import Record

    image = Image.new("RGB", (8, 8))
    targets = [TASK.target(Record(image, label), central_view(image.size, 8)) for label in (3, None)]
    assert [(x, x.dtype) for x in targets] == [(3, np.int32), (0, np.int32)]
