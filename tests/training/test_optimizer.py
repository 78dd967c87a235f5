"""Schedules, the choice of decayed parameters and whole optimiser steps against recorded PyTorch runs."""

import golden
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from configs import (
    efficient_vmamba_base_imagenet,
    efficient_vmamba_tiny_imagenet,
    local_vim_tiny_imagenet,
    local_vmamba_tiny_imagenet,
    v2m_small_imagenet,
    v2m_tiny_imagenet,
    vim_small_imagenet,
    vim_tiny_imagenet,
    vim_tiny_stride8_finetune,
)
from vimd_jax import losses
from vimd_jax.config import default_config
from vimd_jax.models import create_model
from vimd_jax.models.network import variable_shapes
from vimd_jax.models.srvm import SRVM
from vimd_jax.training.optimizer import create_optimizer, create_schedule, decay_mask, layer_scales, scaled_schedule
from vimd_jax.training.roles import build_networks
from weight_convert import convert_state_dict
from weight_convert.mapping import plan


def schedule_config(**fields) -> ConfigDict:
    defaults = dict(
        name="cosine",
        learning_rate=1e-3,
        min_learning_rate=1e-5,
        warmup_learning_rate=1e-6,
        warmup_epochs=5,
        num_epochs=60,
    )
    return ConfigDict(defaults | fields)


def optimizer_config(**fields) -> ConfigDict:
    defaults = dict(weight_decay=0.05, b1=0.9, b2=0.999, eps=1e-8, clip_norm=None, decay_state_matrix=True)
    return ConfigDict(defaults | fields)


@pytest.mark.parametrize("case", golden.cases("c05_lr_schedule_*"))
def test_recorded_epoch_schedules(case):
    options = golden.meta(case)["constructor"]
    expected = golden.tensors(case)["lr_used_in_training_epoch"]
    config = schedule_config(
        name="timm_epoch",
        learning_rate=options["lr"],
        min_learning_rate=options["min_lr"],
        warmup_learning_rate=options["warmup_lr"],
        warmup_epochs=options["warmup_epochs"],
        num_epochs=options["epochs"],
    )
    schedule = jax.jit(jax.vmap(create_schedule(config, steps_per_epoch=7)))
    epochs = np.arange(options["epochs"])
    for step_of_epoch in (0, 6):
        np.testing.assert_allclose(schedule(7 * epochs + step_of_epoch), expected, rtol=1e-5)


def test_cosine_rises_to_the_peak_and_falls_to_the_minimum():
    schedule = create_schedule(schedule_config(), steps_per_epoch=10)
    rates = np.array([float(schedule(step)) for step in range(0, 651)])
    assert rates[0] == pytest.approx(1e-6) and rates[50] == pytest.approx(1e-3)
    np.testing.assert_allclose(np.diff(rates[:51]), (1e-3 - 1e-6) / 50, rtol=1e-3)
    assert np.all(np.diff(rates[50:601]) < 0)
    assert rates[325] == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-4)
    np.testing.assert_allclose(rates[600:], 1e-5, rtol=1e-5)


def test_cosine_without_warm_up_starts_at_the_peak():
    schedule = create_schedule(schedule_config(warmup_epochs=0), steps_per_epoch=10)
    assert float(schedule(0)) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"name": "step"}, "name"), ({"warmup_epochs": 60}, "warmup_epochs"), ({"warmup_epochs": -1}, "warmup_epochs")],
)
def test_bad_schedules_are_named(fields, field):
    with pytest.raises(ValueError, match=rf"^config\.schedule\.{field}: "):
        create_schedule(schedule_config(**fields), steps_per_epoch=10)


def test_recorded_choice_of_decayed_parameters():
    meta = golden.meta("c05_adamw3_clip")
    model = golden_models.vim(meta["constructor"]["student"])
    marks = {entry.source: np.full(entry.shape, entry.source in meta["decayed"], np.float32) for entry in plan(model)}
    params = convert_state_dict(marks, model)["params"]
    expected = jax.tree.map(lambda leaf: bool(leaf.all()), params)
    assert decay_mask(params) == expected
    assert sum(jax.tree.leaves(expected)) == 12

    spared = decay_mask(params, decay_state_matrix=False)
    for direction in ("forward", "backward"):
        expected["layers"]["mixer"][direction]["A_log"] = False
    assert spared == expected


def test_super_resolution_decays_kernels_alone():
    model = golden_models.srresnet({"upscale_factor": 2, "channels": 4, "num_rcb": 1})
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
    for path, decayed in jax.tree_util.tree_leaves_with_path(decay_mask(params)):
        assert decayed == (path[-1].key == "kernel"), path


def test_recorded_steps():
    """Three steps of the released recipe with gradient clipping and averaged weights (EMA)."""
    case = "c05_adamw3_clip"
    io, meta = golden.tensors(case), golden.meta(case)
    constructors, options = meta["constructor"], meta["optimizer"]
    student = SRVM(sr=golden_models.srresnet(constructors["sr"]), classifier=golden_models.vim(constructors["student"]))
    weights = {"sr": golden.tensors(case, "sr_weights"), "classifier": golden.tensors(case, "weights")}
    variables = convert_state_dict(weights, student)
    params, sr, statistics = variables["params"]["classifier"], variables["params"]["sr"], variables["batch_stats"]
    teacher = golden_models.vim(constructors["teacher"])
    teacher_variables = convert_state_dict(golden.tensors(case, "teacher_weights"), teacher)
    optimizer = create_optimizer(
        optimizer_config(weight_decay=options["args"]["weight_decay"], clip_norm=options["clip_grad_norm"]),
        params,
        optax.constant_schedule(options["args"]["lr"]),
    )

    @jax.jit
    def step(params, state, ema, low, high, labels):
        _, teacher_features = teacher.apply(teacher_variables, high, return_features=True)

        def objective(params):
            trees = {"params": {"sr": sr, "classifier": params}, "batch_stats": statistics}
            logits, features = student.apply(trees, low, train=True, return_features=True)
            states = features["hidden_states"], teacher_features["hidden_states"]
            cross_entropy = losses.label_smoothing_cross_entropy(logits, labels, 0.1)
            return cross_entropy + 5 * losses.hidden_state_distillation(*states, "last")

        loss, gradients = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, optax.incremental_update(params, ema, 1 - options["ema_decay"]), loss

    state, ema = optimizer.init(params), params
    for i in range(3):
        low, high = (golden_models.nhwc(io[f"{name}{i}"]) for name in ("lr", "hr"))
        params, state, ema, loss = step(params, state, ema, low, high, io[f"target{i}"])
        assert float(loss) == pytest.approx(meta["losses"][i], rel=1e-4)

    for prefix, tree in (("final/", params), ("ema/", ema)):
        named = {name.removeprefix(prefix): x for name, x in io.items() if name.startswith(prefix)}
        expected = convert_state_dict(named, student.classifier)["params"]
        errors = jax.tree.map(golden.relative_error, tree, expected)
        assert max(jax.tree.leaves(errors)) < 1e-3


def test_clipping_bounds_the_norm_of_all_gradients_together():
    params = {"a": {"kernel": jnp.zeros(4)}, "b": {"kernel": jnp.zeros(4)}}
    gradients = jax.tree.map(lambda x: x + 3.0, params)
    config = optimizer_config(weight_decay=0.0, clip_norm=1.0, b1=0.0, b2=0.0, eps=1.0)
    optimizer = create_optimizer(config, params, optax.constant_schedule(1.0))
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    clipped = 8**-0.5  # what is left of each of eight equal gradients
    np.testing.assert_allclose(updates["a"]["kernel"], -clipped / (clipped + 1), rtol=1e-5)


def test_decay_is_decoupled_and_skips_exempt_parameters():
    params = {"conv": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "A_log": jnp.ones(2), "D": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for decay_state_matrix in (True, False):
        config = optimizer_config(weight_decay=0.1, decay_state_matrix=decay_state_matrix)
        optimizer = create_optimizer(config, params, optax.constant_schedule(0.5))
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        shrunk = {"conv": {"kernel": -0.05, "bias": 0.0}, "A_log": -0.05 * decay_state_matrix, "D": 0.0}
        for update, expected in zip(jax.tree.leaves(updates), jax.tree.leaves(shrunk)):
            np.testing.assert_allclose(update, expected, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Published recipes


def name_of(value) -> str:
    return getattr(value, "__name__", str(value))


def rates_of(config, steps_per_epoch):
    schedule = create_schedule(scaled_schedule(config), steps_per_epoch)
    return lambda epoch, step=0: float(schedule(jnp.asarray(epoch * steps_per_epoch + step)))


def test_vim_tiny_learning_rates():
    """The table of Vim's published script, which keeps a rate for an epoch."""
    rate = rates_of(vim_tiny_imagenet.get_config(), 1251)
    expected = [1e-6, 1e-6, 2.008e-4, 4.006e-4, 6.004e-4, 8.002e-4, 9.993e-4, 9.990e-4]
    np.testing.assert_allclose([rate(epoch) for epoch in range(8)], expected, rtol=1e-4)
    np.testing.assert_allclose([rate(150), rate(299)], [5.10e-4, 1.011e-5], rtol=2e-3)
    assert rate(7) == rate(7, 1250)


def test_fine_tuning_at_stride_8_keeps_its_learning_rate():
    rate = rates_of(vim_tiny_stride8_finetune.get_config(), 1251)
    np.testing.assert_allclose([rate(epoch) for epoch in range(30)], 1e-5, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "peak"),
    [(local_vim_tiny_imagenet, 1e-3), (efficient_vmamba_tiny_imagenet, 2e-3)],
    ids=name_of,
)
def test_local_mamba_learning_rates(config, peak):
    """Warm-up: lr(e) = 1e-7 + (peak - 1e-7) e / 20; then a cosine over the steps that are left."""
    epoch_steps = 625
    rate = rates_of(config.get_config(), epoch_steps)
    warm = [1e-7 + (peak - 1e-7) * epoch / 20 for epoch in range(20)]
    np.testing.assert_allclose([rate(epoch, epoch_steps - 1) for epoch in range(20)], warm, rtol=1e-5)
    warmup, total = 20 * epoch_steps, 300 * epoch_steps
    for step in (warmup + 1, warmup + 5000, total // 2, total - 1):
        cosine = 1e-6 + 0.5 * (peak - 1e-6) * (1 + np.cos(np.pi * (step - warmup - 1) / (total - warmup)))
        assert rate(0, step) == pytest.approx(cosine, rel=1e-3)


@pytest.mark.parametrize(
    ("config", "batch", "peak", "weight_decay", "drop_path", "clip", "average"),
    [
        (vim_tiny_imagenet, 1024, 1e-3, 0.1, 0.0, None, 0.0),
        (vim_small_imagenet, 512, 1e-3, 0.05, 0.05, None, 0.0),
        (vim_tiny_stride8_finetune, 1024, 1e-5, 1e-8, 0.0, None, 0.0),
        (v2m_tiny_imagenet, 512, 5e-4, 0.1, 0.0, None, 0.0),
        (v2m_small_imagenet, 512, 1e-3, 0.05, 0.05, None, 0.0),
        (local_vim_tiny_imagenet, 1024, 1e-3, 0.04, 0.1, None, 0.0),
        (local_vmamba_tiny_imagenet, 1024, 1e-3, 0.04, 0.1, None, 0.0),
        (efficient_vmamba_tiny_imagenet, 2048, 2e-3, 0.04, 0.1, 1.0, 0.9999),
        (efficient_vmamba_base_imagenet, 1024, 2e-3, 0.04, 0.1, 1.0, 0.9999),
    ],
    ids=name_of,
)
def test_recipes(config, batch, peak, weight_decay, drop_path, clip, average):
    config = config.get_config()
    found = (
        *(config.batch_size, scaled_schedule(config).learning_rate, config.optimizer.weight_decay),
        *(config.classifier.drop_path_rate, config.optimizer.clip_norm, config.ema_decay),
    )
    assert found == pytest.approx((batch, peak, weight_decay, drop_path, clip, average))


def test_drop_path_rates_grow_linearly():
    model = build_networks(vim_small_imagenet.get_config(), [str(i) for i in range(1000)]).trained
    np.testing.assert_allclose(model.drop_rates(), 0.05 * np.arange(24) / 23, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "decayed", "spared"),
    [
        ("vim_tiny", ["forward/A_log", "in_proj/kernel", "head/kernel"], ["class_token", "position_embedding", "D"]),
        ("local_vim_search", ["direction_weights", "A_log", "patch_embed/kernel"], ["position_embedding", "head/bias"]),
        ("local_vmamba_tiny", ["dt_proj_bias", "A_log", "reduction/kernel"], ["norm/scale", "D"]),
        ("efficient_vmamba_tiny", ["dt_proj_bias", "A_log", "conv/kernel"], ["conv/bias", "depthwise_norm/scale"]),
        ("v2m_tiny", ["A_log", "head/kernel"], ["position_embedding", "D"]),
    ],
)
def test_what_each_family_decays(name, decayed, spared):
    model = create_model(name)
    params = unflatten_dict(variable_shapes(model), sep="/")["params"]
    mask = flatten_dict(decay_mask(params, decays=model.decays), sep="/")
    for ending, expected in [*((x, True) for x in decayed), *((x, False) for x in spared)]:
        found = [shrinks for path, shrinks in mask.items() if f"/{path}".endswith(f"/{ending}")]
        assert found and set(found) == {expected}, ending


# ---------------------------------------------------------------------------------------------------------------------
# Frozen parameters, layer-wise rates


def test_the_learning_rate_is_scaled_by_the_batch_where_asked():
    config = default_config("classifier")
    config.batch_size = 64
    assert scaled_schedule(config).learning_rate == config.schedule.learning_rate
    config.schedule.reference_batch_size = 512
    scaled = scaled_schedule(config)
    assert scaled.learning_rate == config.schedule.learning_rate / 8
    assert scaled.min_learning_rate == config.schedule.min_learning_rate


def one_update(params, **options):
    config = optimizer_config(weight_decay=0.1)
    with config.unlocked():
        config.update(options)
    optimizer = create_optimizer(config, params, optax.constant_schedule(0.5))
    gradients = jax.tree.map(jnp.ones_like, params)
    return optimizer.update(gradients, optimizer.init(params), params)[0]


STACKED = {
    "patch_embed": {"kernel": jnp.ones(2)},
    "layers": {"kernel": jnp.ones((3, 2))},
    "norm": {"scale": jnp.ones(2)},
    "head": {"kernel": jnp.ones(2)},
}


def test_frozen_parameters_stay_and_do_not_count():
    plain, frozen = one_update(STACKED, clip_norm=1.0), one_update(STACKED, freeze="^(patch|layers)", clip_norm=1.0)
    assert not any(np.any(frozen[name]["kernel"]) for name in ("patch_embed", "layers"))
    rest = {name: STACKED[name] for name in ("norm", "head")}
    expected = one_update(rest, clip_norm=1.0)
    jax.tree.map(np.testing.assert_array_equal, {name: frozen[name] for name in rest}, expected)
    assert np.all(plain["layers"]["kernel"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "which is no regular expression"),
        ("body", "matches no parameter; .* begin with head, layers"),
        (".", "every"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_named(pattern, message):
    with pytest.raises(ValueError, match=f"^config.optimizer.freeze is .*{message}"):
        one_update(STACKED, freeze=pattern)


def test_layer_wise_rates():
    ratio = jax.tree.map(jnp.divide, one_update(STACKED, layer_decay=0.5), one_update(STACKED))
    np.testing.assert_allclose(ratio["head"]["kernel"], 1)
    np.testing.assert_allclose(ratio["norm"]["scale"], 1)
    np.testing.assert_allclose(ratio["layers"]["kernel"][:, 0], [0.125, 0.25, 0.5])
    np.testing.assert_allclose(ratio["patch_embed"]["kernel"], 0.0625)


def test_layer_wise_rates_of_stages():
    stages = {f"stage_{i}": {"kernel": jnp.ones((depth, 2))} for i, depth in enumerate((1, 2))}
    scales = layer_scales(stages | {"downsample_0": {"kernel": jnp.ones(2)}, "patch_norm": {"scale": jnp.ones(2)}}, 0.5)
    np.testing.assert_allclose(scales["stage_0"]["kernel"].ravel(), [0.125])
    np.testing.assert_allclose(scales["stage_1"]["kernel"].ravel(), [0.25, 0.5])
    np.testing.assert_allclose(scales["downsample_0"]["kernel"], 0.25)
    np.testing.assert_allclose(scales["patch_norm"]["scale"], 0.0625)


@pytest.mark.parametrize(
    "recorded, fields",
    [
        ("mmengine_6e-5_1500_160000", dict(name="poly", learning_rate=6e-5, warmup_steps=1500, num_steps=160000)),
        ("mmcv1_1e-4_1500_60000", dict(name="poly_mmcv", learning_rate=1e-4, warmup_steps=1500, num_steps=60000)),
        ("mmcv1_2e-4_1500_60000", dict(name="poly_mmcv", learning_rate=2e-4, warmup_steps=1500, num_steps=60000)),
        ("mmengine_small_all", dict(name="poly", learning_rate=1e-3, warmup_steps=10, num_steps=60)),
        ("mmcv1_small_all", dict(name="poly_mmcv", learning_rate=1e-3, warmup_steps=10, num_steps=60)),
        (
            "mmengine_small_power0.9_eta1e-4",
            dict(name="poly", learning_rate=1e-2, warmup_steps=8, num_steps=40, power=0.9, min_learning_rate=1e-4),
        ),
        (
            "mmcv1_small_power0.9_min1e-4",
            dict(name="poly_mmcv", learning_rate=1e-2, warmup_steps=8, num_steps=40, power=0.9, min_learning_rate=1e-4),
        ),
    ],
)
def test_recorded_schedules_of_segmenters(recorded, fields):
    tensors = golden.tensors("c10_schedule")
    expected, numbers = tensors[f"f64/{recorded}"], {160000: "iters_160k", 60000: "iters_60k"}.get(fields["num_steps"])
    fields = {"min_learning_rate": 0.0, "warmup_learning_rate": 1e-6 * fields["learning_rate"]} | fields
    schedule = create_schedule(schedule_config(**fields), steps_per_epoch=7)
    steps = tensors[numbers] if numbers else np.arange(len(expected))
    actual = jax.vmap(schedule)(jnp.asarray(steps))
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-7 * fields["learning_rate"])


def test_recorded_layer_decay_of_a_segmenter():
    tensors, meta = golden.tensors("c10_layer_decay_tiny"), golden.meta("c10_layer_decay_tiny")
    model = create_model("upernet_vim_tiny")
    params = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, np.float32), unflatten_dict(variable_shapes(model), sep="/")["params"]
    )
    entries = {entry.source: entry for entry in plan(model)}
    assert set(meta["parameter_names_in_order"]) <= set(entries)
    for decayed, recorded in (("layers", "intended"), ("embeddings", "published")):
        scales = flatten_dict(layer_scales(params, meta["constructor"]["layer_decay_rate"], decayed), sep="/")
        for name, expected in zip(meta["parameter_names_in_order"], tensors[f"f64/{recorded}_lr_scale"]):
            scale = scales[entries[name].target.removeprefix("params/")]
            number = entries[name].index[0] if scale.size > 1 else 0
            assert np.ravel(scale)[number] == pytest.approx(expected, rel=1e-6), name
    decays = flatten_dict(decay_mask(params, decays=model.decays), sep="/")
    for name, expected in zip(meta["parameter_names_in_order"], tensors["f64/intended_weight_decay"]):
        assert decays[entries[name].target.removeprefix("params/")] == (expected > 0), name


def test_steps_and_epochs_are_not_mixed():
    with pytest.raises(ValueError, match="config.schedule.warmup_steps: 9 is not below num_steps, 9"):
        create_schedule(schedule_config(name="poly", warmup_steps=9, num_steps=9), steps_per_epoch=1)
    with pytest.raises(ValueError, match="timm_epoch counts epochs"):
        create_schedule(schedule_config(name="timm_epoch", warmup_steps=1, num_steps=9), steps_per_epoch=1)
