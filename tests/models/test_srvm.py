"""SRVM-Net: its parts in sequence, the frozen first part, and the bicubic alternative."""

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vimd_jax.models import create_model
from vimd_jax.models.srvm import bicubic

SIZES = dict(
    num_classes=5, image_size=32, patch_size=8, stride=8, embed_dim=16, depth=2, sr_channels=4, sr_num_blocks=1
)


@pytest.fixture(scope="module")
def student():
    model = create_model("srvm_tiny", **SIZES)
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
    return model, golden_models.random_variables(model, images), images


def test_enlarges_then_classifies(student):
    model, variables, images = student
    logits, features = jax.jit(lambda v, x: model.apply(v, x, return_features=True))(variables, images)
    sr = {kind: variables[kind]["sr"] for kind in ("params", "batch_stats")}
    enlarged = jax.jit(model.sr.apply)(sr, images)
    classifier = {"params": variables["params"]["classifier"]}
    np.testing.assert_allclose(features["super_resolved"], enlarged, atol=1e-6)
    np.testing.assert_allclose(logits, jax.jit(model.classifier.apply)(classifier, enlarged), rtol=1e-4, atol=1e-5)
    assert enlarged.shape == (2, 32, 32, 3)
    assert features["hidden_states"].shape == (2, 2, 17, 16)
    assert set(variables["params"]) == {"sr", "classifier"}


def test_super_resolution_is_frozen(student):
    """No gradient, and running averages although the classifier trains: applying needs no mutable statistics."""
    model, variables, images = student
    gradient = jax.jit(jax.grad(lambda v: model.apply(v, images, train=True).sum()))(variables)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["params"]["sr"]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["batch_stats"]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient["params"]["classifier"]))


def test_bicubic_student_has_no_other_parameters():
    sizes = {name: value for name, value in SIZES.items() if not name.startswith("sr_")}
    model = create_model("srvm_tiny", sr="bicubic", **sizes)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    assert set(jax.eval_shape(model.init, jax.random.key(0), images)["params"]) == {"classifier"}


def test_bicubic_is_pillow_s():
    image = np.random.default_rng(0).uniform(size=(7, 9)).astype(np.float32)
    expected = np.clip(np.asarray(Image.fromarray(image).resize((36, 28), Image.Resampling.BICUBIC)), 0, 1)
    np.testing.assert_allclose(bicubic(image[None, :, :, None], (28, 36))[0, :, :, 0], expected, atol=1e-5)


def test_unknown_kind_of_super_resolution_is_named():
    with pytest.raises(ValueError, match='^sr: "?.nearest'):
        create_model("srvm_tiny", sr="nearest")
