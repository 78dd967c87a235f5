"""The heads against the recorded vectors of mmsegmentation, and the effects of their options."""

import functools

import golden
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vimd_jax.models.heads import FCN, Linear, UperNet
from weight_convert.mapping import expand
from weight_convert.tables import TABLES

CASES = golden.cases("c10_uperhead_*") + golden.cases("c10_fcnhead_*")


def recorded_head(case: str):
    """A recorded head, its inputs in this project's layout, and the shapes of its variables."""
    constructor, io = golden.meta(case)["constructor"], golden.tensors(case)
    options = {name: constructor[name] for name in ("num_classes", "channels")}
    options["dropout_rate"] = constructor["dropout_ratio"]
    if "uperhead" in case:
        head, inputs = UperNet(**options), tuple(golden_models.nhwc(io[f"feature{i}"]) for i in range(4))
    else:
        convs, joins = constructor["num_convs"], constructor["concat_input"]
        head, inputs = FCN(num_convs=convs, join_input=joins, **options), golden_models.nhwc(io["feature2"])
    return head, inputs, flatten_dict(jax.eval_shape(head.init, jax.random.key(0), inputs), sep="/")


def converted(tensors: dict, head, shapes: dict) -> dict:
    """Converts recorded tensors to variables, each used once except the batch counters."""
    entries = expand(TABLES[type(head).__name__], {path: leaf.shape for path, leaf in shapes.items()})
    assert {entry.source for entry in entries} == {name for name in tensors if not name.endswith("num_batches_tracked")}
    assert {entry.target for entry in entries} == set(shapes)
    leaves = {}
    for entry in entries:
        tensor = tensors[entry.source].transpose(entry.axes) if entry.axes else tensors[entry.source]
        leaves[entry.target] = tensor.reshape(shapes[entry.target].shape)
    return unflatten_dict(leaves, sep="/")


@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith("_train")])
def test_recorded_logits(case):
    head, inputs, shapes = recorded_head(case)
    logits = jax.jit(head.apply)(converted(golden.tensors(case, "weights"), head, shapes), inputs)
    assert golden.relative_error(logits, golden_models.nhwc(golden.tensors(case)["logits"])) < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("_train")])
def test_recorded_training_step(case):
    """Output, updated statistics and gradients, normalised by batch statistics."""
    head, inputs, shapes = recorded_head(case)
    io, variables = golden.tensors(case), converted(golden.tensors(case, "weights"), head, shapes)
    cotangent = golden_models.nhwc(io["cotangent"])

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradients(params, inputs):
        logits, updated = head.apply(variables | {"params": params}, inputs, train=True, mutable=["batch_stats"])
        return jnp.sum(logits * cotangent), (logits, updated)

    (gradient, input_gradients), (logits, updated) = gradients(variables["params"], inputs)
    after = {name.removeprefix("after/"): x for name, x in io.items() if name.startswith("after/")}
    named = {name.removeprefix("grad/"): x for name, x in io.items() if name.startswith("grad/")}
    expected = converted(after | named, head, shapes)
    assert golden.relative_error(logits, golden_models.nhwc(io["logits"])) < 1e-5
    for found, recorded in ((updated["batch_stats"], expected["batch_stats"]), (gradient, expected["params"])):
        recorded = flatten_dict(recorded, sep="/")
        largest = max(np.abs(leaf).max() for leaf in recorded.values())
        for path, leaf in flatten_dict(found, sep="/").items():
            np.testing.assert_allclose(leaf, recorded[path], rtol=1e-4, atol=1e-5 * largest, err_msg=path)
    for i, leaf in enumerate(jax.tree.leaves(input_gradients)):
        recorded = io["grad_input" if "grad_input" in io else f"grad_input/{i}"]
        assert golden.relative_error(leaf, golden_models.nhwc(recorded)) < 1e-4


def maps(batch: int = 2) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((6, 8, 4), (3, 4, 5), (2, 2, 6))
    return tuple(jax.random.normal(key, (batch, *size)) for key, size in zip(keys, sizes))


@pytest.fixture(scope="module")
def small():
    head = UperNet(num_classes=3, channels=8, dropout_rate=0.5)
    return head, golden_models.random_variables(head, maps())


def test_channels_are_dropped_only_while_training(small):
    head, variables = small

    @jax.jit
    def train(key):
        return head.apply(variables, maps(), train=True, mutable=["batch_stats"], rngs={"drop_path": key})[0]

    first, again, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(head.apply(variables, maps()), head.clone(dropout_rate=0.0).apply(variables, maps()))


def test_a_single_image_cannot_be_normalised_by_its_batch(small):
    head, variables = small
    with pytest.raises(ValueError, match="^images: .*pool_1_norm.* two images"):
        jax.eval_shape(
            lambda: head.clone(dropout_rate=0.0).apply(variables, maps(1), train=True, mutable=["batch_stats"])
        )


def test_batches_of_several_devices_are_normalised_together(small):
    head = small[0].clone(dropout_rate=0.0, bn_axis_name="device")
    alone = head.clone(bn_axis_name=None)

    def train(head, maps):
        return head.apply(small[1], maps, train=True, mutable=["batch_stats"])

    whole, updated = jax.jit(functools.partial(train, alone))(maps(4))
    shards = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), maps(4))
    each, updates = jax.jit(jax.vmap(functools.partial(train, head), axis_name="device"))(shards)
    assert golden.relative_error(each.reshape(whole.shape), whole) < 1e-4
    for leaf, expected in zip(jax.tree.leaves(updates), jax.tree.leaves(updated), strict=True):
        np.testing.assert_allclose(leaf, jnp.stack([expected] * 2), rtol=1e-4, atol=1e-4)


def test_linear_head_reads_every_map():
    head = Linear(num_classes=3)
    variables = golden_models.random_variables(head, maps())
    assert variables["params"]["classes"]["kernel"].shape == (4 + 5 + 6, 3)
    logits = head.apply(variables, maps())
    assert logits.shape == (2, 6, 8, 3) and logits.dtype == jnp.float32
    for i in range(3):
        changed = tuple(x + (i == k) for k, x in enumerate(maps()))
        assert not np.allclose(head.apply(variables, changed), logits)


def test_initial_distributions():
    """He's deviation by the number of outputs for convolutions before a ReLU; 0.01 for the class layer."""
    head = UperNet(num_classes=150, channels=64)
    params = jax.jit(head.init)(jax.random.key(0), maps())["params"]
    assert float(params["fusion"]["kernel"].std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert float(params["classes"]["kernel"].std()) == pytest.approx(0.01, rel=0.05)
    assert not np.any(params["classes"]["bias"])


@pytest.mark.parametrize(
    ("options", "field"),
    [({"dropout_rate": 1.0}, "dropout_rate"), ({"channels": 0}, "channels"), ({"dtype": "int8"}, "dtype")],
    ids=str,
)
def test_bad_options_are_named(options, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        UperNet(**options)
