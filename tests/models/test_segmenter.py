"""Segmenters against the recorded vectors of the authors' code, and what they do at any size."""

import functools

import golden
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vimd_jax.models.network import part
from vimd_jax.models.resize import resize_bilinear
from weight_convert import convert_state_dict, export_state_dict

BACKBONES = [
    case
    for family in ("vimseg", "localvim", "localvmamba", "vmamba", "efficientvmamba")
    for case in golden.cases(f"c10_{family}_*")
]
SEGMENTERS = golden.cases("c10_segmentor_*")


@functools.partial(jax.jit, static_argnums=0)
def run(model, variables, images):
    return model.apply(variables, images, return_features=True)


def of_backbone(tensors: dict, model) -> dict:
    """Variables of a segmenter from the tensors of its backbone, and any for its head."""
    variables = golden_models.random_variables(model, jnp.zeros((1, *model.input_size, 3)))
    named = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    return convert_state_dict(export_state_dict(variables, model) | named, model)


@pytest.mark.parametrize("case", BACKBONES)
def test_recorded_maps(case):
    io, constructor = golden.tensors(case), golden.meta(case)["constructor"]
    model = golden_models.segmenter(constructor)
    variables = of_backbone(golden.tensors(case, "weights"), model)
    for k in range(len([name for name in io if name.endswith("/image")])):
        images = golden_models.nhwc(io[f"in{k}/image"])
        maps = run(model, variables, images)[1]["hidden_states"]
        if not constructor.get("if_fpn", True):  # as the layers leave them, all of one resolution
            maps = model.backbone.apply(
                part(variables, "backbone"), images, model.taps, state="update", method="feature_maps"
            )
        for i, found in enumerate(maps):
            expected = golden_models.nhwc(io[f"in{k}/feature{i}"])
            assert golden.relative_error(found, expected) < 2e-5, (k, i)


@pytest.mark.parametrize("case", [case for case in SEGMENTERS if not case.endswith("_train")])
def test_recorded_segmentation(case):
    io, meta = golden.tensors(case), golden.meta(case)
    model = golden_models.segmenter(meta["constructor"])
    variables = convert_state_dict(golden.tensors(case, "weights"), model)
    images = golden_models.nhwc(io["image"])
    logits, features = run(model, variables, images)
    assert golden.relative_error(logits, golden_models.nhwc(io["decode_logits"])) < 2e-5
    assert golden.relative_error(features["auxiliary_logits"], golden_models.nhwc(io["aux_logits"])) < 2e-5
    whole = resize_bilinear(jax.jit(model.segment)(variables, images), meta["ori_shape"])
    assert golden.relative_error(whole, golden_models.nhwc(io["whole_logits"])) < 2e-5
    np.testing.assert_array_equal(whole.argmax(axis=-1), io["whole_pred"].reshape(whole.shape[:-1]))
    if meta["slide"]:
        how = {"window": tuple(meta["slide"]["crop_size"]), "stride": tuple(meta["slide"]["stride"])}
        segment = jax.jit(functools.partial(model.segment, mode="slide", **how))
        slid = segment(variables, golden_models.nhwc(io["slide_image"]))
        assert golden.relative_error(slid, golden_models.nhwc(io["slide_logits"])) < 2e-5
        np.testing.assert_array_equal(slid.argmax(axis=-1), io["slide_pred"].reshape(slid.shape[:-1]))


@pytest.mark.parametrize("case", [case for case in SEGMENTERS if case.endswith("_train")])
def test_recorded_training_step(case):
    """Loss, gradients and updated statistics with the batch's own statistics; dropout and stochastic depth are off."""
    io, constructor = golden.tensors(case), golden.meta(case)["constructor"]
    model = golden_models.segmenter(constructor, head_dropout_rate=0.0)
    variables = convert_state_dict(golden.tensors(case, "weights"), model)
    images, labels = golden_models.nhwc(io["image"]), io["labels"]

    def cross_entropy(logits):  # as published: the mean over all pixels, of which the unlabelled ones say nothing
        logits = jax.nn.log_softmax(resize_bilinear(logits, labels.shape[1:]))
        picked = jnp.take_along_axis(logits, np.where(labels == 255, 0, labels)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(labels == 255, 0, picked)) / (labels.size + jnp.finfo(jnp.float32).eps)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(params):
        (logits, features), updated = model.apply(
            variables | {"params": params}, images, train=True, return_features=True, mutable=["batch_stats"]
        )
        terms = cross_entropy(logits), 0.4 * cross_entropy(features["auxiliary_logits"])
        return sum(terms), (terms, updated)

    (loss, (terms, updated)), gradient = step(variables["params"])
    expected = [io["loss"], io["decode.loss_ce"], io["aux.loss_ce"]]
    np.testing.assert_allclose([loss, *terms], expected, rtol=1e-5)
    found = export_state_dict({"params": gradient, **updated}, model)
    largest = max(np.abs(x).max() for name, x in io.items() if name.startswith("grad/"))
    for name, expected in io.items():
        kind, _, tensor = name.partition("/")
        if kind == "after" and not name.endswith("num_batches_tracked"):
            np.testing.assert_allclose(found[tensor], expected, rtol=1e-4, atol=1e-5, err_msg=name)
        if kind == "grad":
            np.testing.assert_allclose(found[tensor], expected, rtol=1e-3, atol=1e-4 * largest, err_msg=name)
        if kind == "gradstat":
            flat = found[tensor].astype(np.float64).reshape(-1)
            figures = [np.linalg.norm(flat), flat @ np.linspace(-1, 1, flat.size)]
            np.testing.assert_allclose(figures, expected, rtol=1e-3, atol=1e-3 * largest, err_msg=name)
