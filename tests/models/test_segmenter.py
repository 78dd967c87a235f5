"""Segmenters against the recorded vectors of the authors' code, and their behaviour at any size."""

import functools

import golden
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vimd_jax.models import create_model, describe, list_models
from vimd_jax.models.network import part
from vimd_jax.models.resize import resize_bilinear
from vimd_jax.models.segmenter import Segmenter
from weight_convert import convert_state_dict, export_state_dict

BACKBONES = [
    case
    for family in ("vimseg", "localvim", "localvmamba", "vmamba", "efficientvmamba")
    for case in golden.cases(f"c10_{family}_*")
]
SEGMENTERS = golden.cases("c10_segmentor_*")
ISOTROPIC = {"image_size": 32, "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 4, "drop_path_rate": 0.2}
STAGES = {"image_size": 32, "dims": 8, "depths": (1, 1), "drop_path_rate": 0.2}
WINDOWS = {"directions": (("h", "v_flip", "w2"),)}
HEADS = {"num_classes": 3, "head_channels": 8, "auxiliary_channels": 4}
SMALL = {  # one of each family
    "upernet_vim_tiny": ISOTROPIC,
    "upernet_v2m_tiny": ISOTROPIC,
    "upernet_local_vim_tiny": ISOTROPIC | WINDOWS,
    "upernet_vmamba_tiny": STAGES,
    "upernet_vmamba2_tiny": STAGES,
    "upernet_local_vmamba_tiny": STAGES | WINDOWS,
    "upernet_efficient_vmamba_tiny": STAGES | {"depths": (1, 1, 1)},  # the third stage is of another kind
}


def small(name: str, **options):
    return create_model(name, **SMALL[name] | HEADS | options)


@functools.cache
def variables_of(name: str):
    return golden_models.random_variables(small(name), jnp.zeros((1, 32, 32, 3)))


def images(height: int, width: int, batch: int = 2) -> jax.Array:
    return jax.random.uniform(jax.random.key(0), (batch, height, width, 3))


@functools.partial(jax.jit, static_argnums=0)
def run(model, variables, images):
    return model.apply(variables, images, return_features=True)


@functools.partial(jax.jit, static_argnums=0)
def maps_of(model, variables, images):
    """Only the maps: the heads, which are not returned, are not compiled either."""
    return model.apply(variables, images, return_features=True)[1]["hidden_states"]


def of_backbone(tensors: dict, model) -> dict:
    """Variables of a segmenter from the tensors of its backbone, with random ones for its heads."""
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
        if constructor.get("if_fpn", True):
            maps = maps_of(model, variables, images)
        else:  # the layers' outputs, all of one resolution
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
    """Loss, gradients and updated statistics, normalised by batch statistics; dropout and stochastic depth are off."""
    io, constructor = golden.tensors(case), golden.meta(case)["constructor"]
    model = golden_models.segmenter(constructor, head_dropout_rate=0.0)
    variables = convert_state_dict(golden.tensors(case, "weights"), model)
    images, labels = golden_models.nhwc(io["image"]), io["labels"]

    def cross_entropy(logits):  # as published: the mean over all pixels, with 0 for unlabelled ones
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
            scale = np.abs(expected).max() + 0.1 * largest
            np.testing.assert_allclose(found[tensor], expected, rtol=0, atol=1e-3 * scale, err_msg=name)
        if kind == "gradstat":
            flat = found[tensor].astype(np.float64).reshape(-1)
            figures = [np.linalg.norm(flat), flat @ np.linspace(-1, 1, flat.size)]
            np.testing.assert_allclose(figures, expected, rtol=1e-3, atol=1e-3 * largest, err_msg=name)


def test_every_family_has_a_small_segmenter():
    families = {type(create_model(name).backbone) for name in list_models("upernet_*")}
    assert families == {type(small(name).backbone) for name in SMALL}


@pytest.mark.parametrize("name", SMALL)
def test_every_backbone_at_odd_sizes_and_in_half_precision(name):
    """Finite scores for every pixel; each size is traced once."""
    model, traced = small(name, dtype="bfloat16"), []

    @jax.jit
    def scores(images):
        traced.append(images.shape)
        return model.segment(variables_of(name), images)

    assert jax.eval_shape(scores, images(32, 32)).shape == (2, 32, 32, 3)
    for _ in range(2):
        found = scores(images(41, 59))
        assert found.shape == (2, 41, 59, 3) and found.dtype == jnp.float32
        assert np.all(np.isfinite(found))
    assert traced == [(2, 32, 32, 3), (2, 41, 59, 3)]


@pytest.mark.parametrize("name", SMALL)
def test_every_backbone_trains_on_images_that_are_not_square(name):
    model, variables = small(name), variables_of(name)

    @jax.jit
    def gradient(params):
        def loss(params):
            (logits, features), updated = model.apply(
                variables | {"params": params},
                images(40, 56),
                train=True,
                return_features=True,
                mutable=["batch_stats"],
                rngs={"drop_path": jax.random.key(1)},
            )
            return jnp.mean(logits**2) + jnp.mean(features["auxiliary_logits"] ** 2), updated

        return jax.grad(loss, has_aux=True)(params)

    gradients, updated = gradient(variables["params"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((gradients, updated)))
    idle = {"/".join(path) for path, leaf in flatten_dict(gradients).items() if not np.any(leaf)}
    assert idle <= {"backbone/neck/final_norm/scale"}  # in the authors' files, but not used


def test_a_map_for_each_quarter_of_the_layers_or_each_stage():
    for name, channels, sizes in [
        ("upernet_vim_tiny", (16,) * 4, (6, 3, 1, 1)),
        ("upernet_local_vim_tiny", (16,) * 4, (3, 3, 3, 3)),
        ("upernet_vmamba_tiny", (8, 16), (6, 3)),
    ]:
        apply = functools.partial(small(name).apply, return_features=True)
        logits, features = jax.eval_shape(apply, variables_of(name), images(24, 24))
        assert [x.shape for x in features["hidden_states"]] == [(2, s, s, c) for s, c in zip(sizes, channels)]
        assert logits.shape == (2, sizes[0], sizes[0], 3)
        assert features["auxiliary_logits"].shape[1] == sizes[-1 if "local_vim" in name else -2]
    assert create_model("upernet_vim_tiny")._layers == (5, 11, 17, 23)
    assert create_model("upernet_local_vim_tiny")._layers == (4, 9, 14, 19)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"head": "linear"}, ("classes", "norm")),
        ({"auxiliary_channels": 0}, None),
    ],
    ids=str,
)
def test_other_heads(options, expected):
    model = small("upernet_vmamba_tiny", **options)
    params = jax.eval_shape(model.init, jax.random.key(0), images(32, 32))["params"]
    assert ("auxiliary_head" in params) == ("auxiliary_channels" not in options)
    assert expected is None or tuple(sorted(params["decode_head"])) == expected
    assert create_model(**_described(model)).to_options() == model.to_options()


def _described(model) -> dict:
    description = describe(model)
    return {"name": description["architecture"]} | description["options"]


def test_windows_cover_the_image_and_are_averaged(monkeypatch):
    """Scores that encode a window's position are averaged over the windows that contain a pixel."""
    model, size = small("upernet_vim_tiny"), (20, 27)
    monkeypatch.setattr(Segmenter, "_scores", lambda self, variables, images: images)
    slid = model.segment({}, images(*size), mode="slide", window=(16, 16), stride=(3, 10))
    np.testing.assert_allclose(slid, images(*size), rtol=1e-6)
    monkeypatch.setattr(Segmenter, "_scores", lambda self, variables, images: jnp.ones_like(images) * images[0, 0, 0])
    slid = model.segment({}, images(*size, batch=1), mode="slide", window=16, stride=10)
    corners = images(*size, batch=1)[0, :: size[0] - 16][:, jnp.array([0, 10, 11])]
    np.testing.assert_allclose(slid[0, 0, 12], corners[0].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(slid[0, -1, -1], corners[1, 2], rtol=1e-6)


def test_small_images_are_one_window(monkeypatch):
    seen = []
    monkeypatch.setattr(Segmenter, "_scores", lambda self, variables, images: seen.append(images.shape) or images)
    small("upernet_vmamba_tiny").segment({}, images(24, 20), "slide")
    assert seen == [(2, 24, 20, 3)]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"backbone": "srvm_tiny"}, "backbone"),
        ({"num_classes": 0}, "num_classes"),
        ({"head": "segmenter"}, "head"),
        ({"head_channels": 0}, "head_channels"),
        ({"head_dropout_rate": 1.0}, "head_dropout_rate"),
        ({"auxiliary_channels": -1}, "auxiliary_channels"),
        ({"auxiliary_tap": 4}, "auxiliary_tap"),
        ({"taps": (0, 9)}, "taps"),
        ({"tapped": "output"}, "tapped"),
        ({"stride": 2}, "stride"),
        ({"depth": 0}, "depth"),
        ({"heads": 2}, "heads"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, field):
    with pytest.raises(ValueError, match=f"^{field}: .*") as error:
        small("upernet_vim_tiny", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"mode": "tiled"}, "mode"),
        ({"window": 16}, "mode"),
        ({"mode": "slide", "stride": 0}, "stride"),
        ({"mode": "slide", "window": 16, "stride": 17}, "stride"),
    ],
    ids=str,
)
def test_bad_windows_are_named(arguments, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        small("upernet_vim_tiny").segment({}, images(32, 32), **arguments)
