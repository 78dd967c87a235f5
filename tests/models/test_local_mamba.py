"""LocalVim and LocalVMamba against the recorded vectors of the original code, their directions and their options."""

import golden
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vimd_jax.models import create_model
from vimd_jax.models.local_vim import SEARCHED, UNSEARCHED
from weight_convert import convert_state_dict

ISOTROPIC = golden.cases("c07_localvim_*")
HIERARCHICAL = golden.cases("c07_localvmamba_*")


def leaves(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def model_of(case: str):
    constructor = golden.meta(case)["constructor"]
    if case in HIERARCHICAL:
        return golden_models.local_vmamba(constructor)
    # The originals return the results of vertical scans to the wrong tokens where the grid is not square.
    return golden_models.local_vim(constructor, vertical_reverse="published")


@pytest.mark.parametrize("case", [*ISOTROPIC, *HIERARCHICAL])
def test_recorded_vectors(case):
    io, model = golden.tensors(case), model_of(case)
    variables = convert_state_dict(golden.tensors(case, "weights"), model)
    images = golden_models.nhwc(io["input"])
    cotangent = io.get("dlogits", np.zeros_like(io["logits"]))

    @jax.jit
    def gradients(variables, images):
        def scalar(variables, images):
            logits, features = model.apply(variables, images, return_features=True)
            return jnp.sum(logits * cotangent), (logits, features)

        return jax.grad(scalar, argnums=(0, 1), has_aux=True)(variables, images)

    (gradient, image_gradient), (logits, features) = gradients(variables, images)
    assert golden.relative_error(logits, io["logits"]) < 1e-5
    if "pre_head" in io:
        assert golden.relative_error(features["pre_logits"], io["pre_head"]) < 1e-5
    for stage, state in enumerate(features["hidden_states"] if case in HIERARCHICAL else []):
        name = f"layers.{stage}.blocks.{model.depths[stage] - 1}"
        if name in io:
            assert golden.relative_error(state, io[name]) < 1e-5, name
    named = {name.removeprefix("grad/"): x for name, x in io.items() if name.startswith("grad/")}
    if named:
        expected = leaves(convert_state_dict(named, model))
        for path, leaf in leaves(gradient).items():
            assert golden.relative_error(leaf, expected[path]) < 1e-4, path
    if "grad_input" in io:
        assert golden.relative_error(image_gradient, golden_models.nhwc(io["grad_input"])) < 1e-4


def test_gradients_are_recorded_for_each_kind():
    recorded = [case for case in [*ISOTROPIC, *HIERARCHICAL] if any("grad/" in name for name in golden.tensors(case))]
    assert {"c07_localvim_midcls_14x14", "c07_localvim_search_supernet", "c07_localvmamba_reduced"} <= set(recorded)


@pytest.mark.parametrize(("name", "options"), [("local_vim_tiny", {}), ("local_vmamba_tiny", {})])
def test_the_right_reverse_is_the_default_and_differs_only_off_the_square(name, options):
    small = {"local_vim_tiny": {"embed_dim": 16, "depth": 1, "patch_size": 4, "image_size": 16}}
    options = small.get(name, {"dims": 8, "depths": (1,)}) | {"num_classes": 3, "directions": (("h", "v", "v_flip"),)}
    correct = create_model(name, **options)
    published = correct.clone(vertical_reverse="published")
    assert correct.vertical_reverse == "correct"
    variables = golden_models.random_variables(correct, jnp.zeros((1, 16, 16, 3)))
    for size, same in (((16, 16), True), ((16, 32), False)):
        images = jax.random.uniform(jax.random.key(0), (1, *size, 3))
        states = [model.apply(variables, images, return_features=True)[1] for model in (correct, published)]
        first, second = (state["hidden_states"][0] for state in states)
        assert np.allclose(first, second, atol=1e-6) == same


def test_a_turned_image_gives_a_turned_result():
    """Rows and columns are scanned alike: swapping an image's axes and the directions' swaps the features' axes."""
    options = {"num_classes": 3, "dims": 8, "depths": (1,)}
    rows = create_model("local_vmamba_tiny", directions=(("h", "v_flip"),), **options)
    columns = create_model("local_vmamba_tiny", directions=(("v", "h_flip"),), **options)
    variables = golden_models.random_variables(rows, jnp.zeros((1, 16, 16, 3)))
    # The filters of patches and of the depthwise convolution turn with the image.
    turned = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            x.swapaxes(-4, -3) if x.ndim >= 4 and x.shape[-4] == x.shape[-3] and "kernel" in path[-1].key else x
        ),
        variables,
    )
    images = jax.random.uniform(jax.random.key(0), (1, 12, 20, 3))
    first = rows.apply(variables, images, return_features=True)[1]["hidden_states"][0]
    second = columns.apply(turned, images.swapaxes(1, 2), return_features=True)[1]["hidden_states"][0]
    np.testing.assert_allclose(first, second.swapaxes(1, 2), rtol=1e-4, atol=1e-5)


def test_initial_distributions():
    """As the original starts LocalVim: one deviation for linear layers, steps of 0.69; LocalVMamba as Mamba does."""
    options = {"embed_dim": 64, "depth": 4, "num_classes": 50, "directions": (("h", "v"),), "class_token": "middle"}
    model = create_model("local_vim_tiny", rope=False, **options)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    mixer = params["layers"]["mixer"]
    for name in ("x_proj_kernel", "dt_proj_kernel"):
        assert float(mixer["ssm"][name].std()) == pytest.approx(0.02, rel=0.05)
    for kernel in (mixer["in_proj"]["kernel"], params["head"]["kernel"], params["position_embedding"]):
        assert float(kernel.std()) == pytest.approx(0.02, rel=0.05)
    assert float(jnp.abs(mixer["out_proj"]["kernel"]).max()) == pytest.approx((128 * 4) ** -0.5, rel=0.01)
    assert float(jnp.abs(params["patch_embed"]["kernel"]).max()) == pytest.approx(768**-0.5, rel=0.01)
    assert not np.any(mixer["ssm"]["dt_proj_bias"]) and not np.any(params["class_token"])
    np.testing.assert_allclose(mixer["ssm"]["A_log"][0, 0, 0], np.log(np.arange(1, 17)), rtol=1e-6)

    model = create_model("local_vmamba_tiny", dims=32, depths=(2,), num_classes=5, directions=(("h", "v"),))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    ssm = params["stage_0"]["mixer"]["ssm"]
    steps = jax.nn.softplus(ssm["dt_proj_bias"])
    assert 0.0009 < steps.min() < 0.003 and 0.04 < steps.max() < 0.11
    assert float(jnp.abs(ssm["x_proj_kernel"]).max()) == pytest.approx(64**-0.5, rel=0.02)


def test_published_directions():
    assert len(SEARCHED) == 20 and all(len(directions) == 4 for directions in SEARCHED)
    assert create_model("local_vim_tiny").directions == SEARCHED
    assert create_model("local_vim_tiny_middle_token").directions == SEARCHED
    assert create_model("local_vim_small").directions in (SEARCHED, UNSEARCHED)
    assert create_model("local_vim_search").directions is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": (("h", "x2"),)}, "^directions: .*x2"),
        ({"directions": (("h", "w0"),)}, "^directions: .*w0"),
        ({"directions": (("h", "v"), ("h",)), "depth": 2}, "^directions: "),
        ({"directions": (("h",),) * 3, "depth": 2}, "^directions: "),
        ({"vertical_reverse": "wrong"}, "^vertical_reverse: "),
        ({"class_token": "double"}, "^class_token: "),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message) as error:
        create_model("local_vim_tiny", **options)
    assert "\n" not in str(error.value)
