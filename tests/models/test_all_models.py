"""Properties of every registered network: shapes, finite gradients, half precision, two resolutions, features."""

import functools

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax import export
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

import kernels
from vimd_jax.models import SR_NETWORKS, create_model, list_models
from vimd_jax.models.layers import rms_norm
from vimd_jax.models.segmenter import Segmenter
from vimd_jax.training.optimizer import decay_mask

ISOTROPIC = {"num_classes": 5, "image_size": 32, "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 2}
HIERARCHICAL = {"num_classes": 5, "image_size": 32, "dims": 8, "depths": (1, 1)}
WINDOWS = {"directions": (("h", "v_flip", "w2"),)}
# By the prefix of a name; the longest matching one applies.
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
# One of each kind; the others of its family differ only in size. Segmenters have their own tests.
NAMES = [name for name in list_models() if not name.endswith(("_small", "_base", "8", "l20")) and "upernet" not in name]
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
    kinds = {type(create_model(name)) for name in list_models()}
    assert kinds == {type(create_model(name)) for name in NAMES} | {Segmenter}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (40, 24)], ids=str)
def test_forward_and_backward(name, size):
    model, batch, traces = small(name), images(*size), []
    if name.startswith("srvm"):  # it enlarges images four times
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
    restored = (2, model.scale * size[0], model.scale * size[1], 3)
    expected = restored if name in SR_NETWORKS else (2, 5)
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
        assert states.shape == (2, 2, 16 + (model.class_token is not None), 16)
        assert features["pre_logits"].shape == (2, 16)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_maps_have_the_grid_of_the_image(name):
    model, batch = small(name), images(64, 32)
    if name.startswith("srvm"):
        batch = batch[:, ::4, ::4]
    maps = jax.eval_shape(functools.partial(model.apply, method="feature_maps"), variables(name), batch)
    hierarchical = "vmamba" in name
    shapes = [(2, 16, 8, 8), (2, 8, 4, 16)] if hierarchical else [(2, 8, 4, 16), (2, 8, 4, 16)]
    assert [x.shape for x in maps] == shapes and {x.dtype for x in maps} == {jnp.dtype("float32")}
    with pytest.raises(ValueError, match=r"^layers: \(1, 2\) is not valid, expected numbers from 0 to 1"):
        model.apply(variables(name), batch, (1, 2), method="feature_maps")


@pytest.mark.parametrize("name", ["local_vim_tiny_middle_token", "vmamba_tiny"])
def test_maps_are_the_hidden_states_without_class_tokens(name):
    model, batch = small(name), images(40, 24)

    @jax.jit
    def both(variables):
        states = model.apply(variables, batch, return_features=True)[1]["hidden_states"]
        return states[1], *model.apply(variables, batch, (1, 0), method="feature_maps")

    states, last, first = map(np.asarray, both(variables(name)))
    if model.class_token:  # at position 7 of 5 x 3 patches
        states = np.delete(states, 7, axis=1).reshape(last.shape)
    np.testing.assert_array_equal(last, states)
    assert not np.array_equal(first, last)


def test_maps_of_the_stream_and_of_its_updates():
    model, batch = small("vim_tiny"), images(16, 24)

    maps = {
        state: jax.jit(functools.partial(model.apply, state=state, method="feature_maps"))(variables("vim_tiny"), batch)
        for state in ("stream", "update", "normalized")
    }
    np.testing.assert_allclose(maps["stream"][1], maps["stream"][0] + maps["update"][1], rtol=1e-5, atol=1e-6)
    norm = rms_norm().apply({"params": variables("vim_tiny")["params"]["norm"]}, maps["stream"][1])
    np.testing.assert_allclose(maps["normalized"][1], norm, rtol=1e-5)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_without_a_head_the_pooled_features_come_out(name):
    model, batch = small(name, num_classes=0), images(32, 32)
    if name.startswith("srvm"):
        batch = batch[:, ::4, ::4]
    shapes, whole = jax.eval_shape(model.init, jax.random.key(0), batch), variables(name)["params"]
    trunk = {path for path in flatten_dict(whole) if "head" not in path}
    assert set(flatten_dict(shapes["params"])) == trunk
    assert jax.eval_shape(model.apply, shapes, batch).shape == (2, 16)


def test_without_a_head_the_maximum_is_that_of_the_features():
    model, batch = small("vim_tiny", num_classes=0, class_token=None, pool="max", depth=1), images(16, 16)
    output, features = jax.jit(lambda key: model.init_with_output(key, batch, return_features=True)[0])(
        jax.random.key(0)
    )
    np.testing.assert_array_equal(output, features["pre_logits"].max(axis=1))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_bfloat16_is_finite_and_logits_are_float32(name):
    model = small(name, dtype="bfloat16")
    batch = images(32, 32)[:, ::4, ::4] if name.startswith("srvm") else images(32, 32)
    logits = jax.jit(model.apply)(variables(name), batch)
    assert logits.dtype == jnp.float32 and np.all(np.isfinite(logits))


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_spares_vectors_of_norms_and_biases(name):
    model = small(name)
    params = variables(name)["params"]
    mask = {
        tuple(key.key for key in path): decays
        for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params, decays=model.decays))
    }
    assert any(mask.values())
    for path, decays in mask.items():
        if path[-1] in ("kernel", "A_log"):
            assert decays, path
        if path[-1] in ("bias", "scale", "D", "class_token", "position_embedding", "alpha"):
            assert not decays, path


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_sharded_over_an_explicit_mesh_stays_so(name):
    model, mesh = small(name), AbstractMesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), variables(name))
    batch = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32, sharding=split)

    def gradient(variables, batch):
        output = model.apply(variables, batch)
        return output, jax.grad(lambda v: model.apply(v, batch).sum(), allow_int=True)(variables)

    with use_abstract_mesh(mesh), kernels.use(scan="sequential"):
        output, _ = jax.eval_shape(gradient, shapes, batch)
    assert output.sharding.spec[0] == "data"


@pytest.mark.parametrize("name", ["vim_tiny", "efficient_vmamba_tiny", "srvm_tiny"])
def test_exports_for_every_platform_and_any_number_of_images(name):
    model, (count,) = small(name), export.symbolic_shape("count")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables(name))
    batch = jax.ShapeDtypeStruct((count, 16, 16, 3), jnp.float32)
    with kernels.use(scan="sequential"):
        exported = export.export(jax.jit(model.apply), platforms=["cpu", "cuda", "tpu"])(shapes, batch)
    assert exported.out_avals[0].shape == (count, 5)


@pytest.mark.parametrize("name", NAMES)
def test_variables_are_float32_where_jax_has_64_bits(name):
    with jax.enable_x64(True):
        shapes = jax.eval_shape(small(name).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3), jnp.float32))
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["v2m_tiny", "local_vim_tiny", "vmamba_tiny", "srvm_tiny"])
def test_tabulate(name):
    table = small(name).tabulate(jax.random.key(0), images(16, 16), console_kwargs={"width": 200})
    assert "patch_embed" in table


DERIVATIVES = {
    "forward": lambda f, x: jax.jvp(f, (x,), (x,)),
    "forward, mapped": lambda f, x: jax.jacfwd(lambda scale: f(scale * x))(1.0),
    "reverse over reverse": lambda f, x: jax.grad(lambda x: jax.grad(f)(x).sum())(x),
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_other_derivatives_of_a_network_name_the_implementation_that_has_them(derivative):
    model, batch = small("vim_tiny"), images(16, 16)
    with pytest.raises(TypeError, match="once, in reverse mode.*associative"):
        DERIVATIVES[derivative](lambda x: model.apply(variables("vim_tiny"), x).sum(), batch)


def test_gradients_of_a_network_can_be_mapped():
    model, batch = small("vim_tiny"), images(16, 16)
    gradient = jax.grad(lambda image: model.apply(variables("vim_tiny"), image[None]).sum())
    mapped = jax.jit(jax.vmap(gradient))(batch)
    np.testing.assert_allclose(mapped[1], jax.jit(gradient)(batch[1]), rtol=1e-4, atol=1e-6)
