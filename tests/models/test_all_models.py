"""What holds for every registered network: shapes, finite gradients, half precision, two resolutions, features."""

import functools

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vimd_jax.models import SR_NETWORKS, create_model, list_models
from vimd_jax.training.optimizer import decay_mask

ISOTROPIC = {"num_classes": 5, "image_size": 32, "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 2}
HIERARCHICAL = {"num_classes": 5, "image_size": 32, "dims": 8, "depths": (1, 1)}
WINDOWS = {"directions": (("h", "v_flip", "w2"),)}
# By the start of a name: the longest that fits.
SMALL = {
    "vim": ISOTROPIC,
    "v2m": ISOTROPIC,
    "local_vim": ISOTROPIC | WINDOWS,
    "local_vim_search": ISOTROPIC,
    "vmamba": HIERARCHICAL,
    "vmamba2": HIERARCHICAL | {"mlp_ratio": 2.0},
    "local_vmamba": HIERARCHICAL | WINDOWS,
    "local_vmamba_search": HIERARCHICAL,
    "efficient_vmamba": HIERARCHICAL,
    "srresnet": {"channels": 4, "num_blocks": 1},
    "srvm": ISOTROPIC | {"sr_channels": 4, "sr_num_blocks": 1},
}
# One of each kind; the others of its family differ in size only.
NAMES = [name for name in list_models() if not name.endswith(("_small", "_base", "8", "l20"))]
CLASSIFIERS = [name for name in NAMES if name not in SR_NETWORKS]


def small(name: str, **options):
    starts = [start for start in SMALL if name.startswith(start)]
    assert starts, f"{name}: add a small version of this family to SMALL"
    return create_model(name, **SMALL[max(starts, key=len)] | options)


def images(height: int, width: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(0), (2, height, width, 3))


@functools.cache
def variables(name: str):
    return golden_models.random_variables(small(name), images(16, 16))


def test_what_is_left_out_is_another_size_of_what_is_not():
    assert {type(create_model(name)) for name in list_models()} == {type(create_model(name)) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (40, 24)], ids=str)
def test_forward_and_backward(name, size):
    model, batch, traces = small(name), images(*size), []
    if name.startswith("srvm"):  # which quadruples its images
        batch = batch[:, ::4, ::4]

    @jax.jit
    def gradient(variables, batch):
        traces.append(1)

        def mean_square(variables):
            output, updated = model.apply(variables, batch, train=True, mutable=["batch_stats"])
            return jnp.mean(jnp.square(output)), (output, updated)

        return jax.grad(mean_square, has_aux=True, allow_int=True)(variables)

    for _ in range(2):
        gradients, (output, updated) = gradient(variables(name), batch)
    assert len(traces) == 1
    scale = getattr(model, "scale", None)
    expected = (2, 5) if scale is None else (2, scale * size[0], scale * size[1], 3)
    assert output.shape == expected and output.dtype == jnp.float32
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((output, updated, gradients)))
    trained = gradients["params"].get("classifier", gradients["params"])
    idle = [jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(trained) if not np.any(x)]
    assert not idle, "parameters without a gradient"


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_features(name):
    model, batch = small(name), images(32, 32)
    if name.startswith("srvm"):
        batch = batch[:, ::4, ::4]
    logits, features = jax.eval_shape(functools.partial(model.apply, return_features=True), variables(name), batch)
    assert logits.shape == (2, 5)
    states = features["hidden_states"]
    if isinstance(states, tuple):
        assert [state.shape for state in states] == [(2, 8, 8, 8), (2, 4, 4, 16)]
        assert features["pre_logits"].shape == (2, 16)
    else:
        classifier = getattr(model, "classifier", model)
        assert states.shape == (2, 2, 16 + (classifier.class_token is not None), 16)
        assert features["pre_logits"].shape == (2, 16)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_bfloat16_is_finite_and_logits_are_float32(name):
    model = small(name, dtype="bfloat16")
    batch = images(32, 32)[:, ::4, ::4] if name.startswith("srvm") else images(32, 32)
    logits = jax.jit(model.apply)(variables(name), batch)
    assert logits.dtype == jnp.float32 and np.all(np.isfinite(logits))


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_spares_vectors_of_norms_and_biases(name):
    model = small(name)
    trained = getattr(model, "classifier", model)
    params = variables(name)["params"].get("classifier", variables(name)["params"])
    mask = {
        tuple(key.key for key in path): decays
        for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params, decays=trained.decays))
    }
    assert any(mask.values())
    for path, decays in mask.items():
        if path[-1] in ("kernel", "A_log"):
            assert decays, path
        if path[-1] in ("bias", "scale", "D", "class_token", "position_embedding", "alpha"):
            assert not decays, path
