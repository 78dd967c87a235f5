"""Schedules, the choice of decayed parameters and whole optimiser steps against recorded PyTorch runs."""

import golden
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from vimd_jax import losses
from vimd_jax.models.srvm import SRVM
from vimd_jax.training.optimizer import create_optimizer, create_schedule, decay_mask
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
