"""One step of training: in parts as in one piece, averages, and maps between networks of different shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import tiny_config

from vimd_jax.models import create_model
from vimd_jax.training import hidden_map, parallel, steps
from vimd_jax.training.optimizer import create_optimizer, create_schedule
from vimd_jax.training.roles import build_networks


def one_step(config, count=8, seed=0):
    """State before and after a step on random images, and the metrics."""
    networks = build_networks(config, "abcd")
    rng = np.random.default_rng(seed)
    views = {"high": config.dataset.high_resolution, "low": config.dataset.low_resolution}
    batch = {name: rng.integers(0, 256, (count, size, size, 3), np.uint8) for name, size in views.items()}
    batch["target"] = rng.integers(0, 4, count).astype(np.int32)

    def variables(model, side):
        return jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, side, side, 3)))

    sides = {"teacher": views["high"], "sr": views["low"]}
    frozen = {role: variables(model, sides[role]) for role, model in networks.frozen.items()}
    trained = hidden_map.add(config, networks, variables(networks.trained, views["high"]))
    optimizer = create_optimizer(
        config.optimizer, trained["params"], create_schedule(config.schedule, 2), networks.trained.decays
    )
    before = steps.create_state(config, trained, optimizer)
    step = steps.make_train_step(config, networks, optimizer)
    after, metrics = step(parallel.replicate(before), parallel.replicate(frozen), parallel.shard(batch))
    return before, parallel.fetch(after), parallel.fetch(metrics)


def with_stages(stage="classifier", **changes):
    """A config whose network has stages and batch statistics."""
    maps = {"name": "efficient_vmamba_tiny", "dims": (8, 16), "depths": (1, 1)}
    config = tiny_config(stage, schedule__warmup_learning_rate=1e-3, **changes)
    config[stage].update(dict.fromkeys(tiny.VIM) | maps)
    return config


def test_a_batch_in_parts_gives_the_gradients_of_the_whole():
    whole, parts = (
        one_step(tiny_config("classifier", schedule__warmup_learning_rate=1e-3, accumulation_steps=n)) for n in (1, 4)
    )
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(parts[2][name], whole[2][name], rtol=1e-5)
    moments = (state[1].opt_state[0].mu for state in (whole, parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), *moments)


def test_batch_statistics_pass_through_the_parts_and_the_average_follows_them():
    before, after, _ = one_step(with_stages(accumulation_steps=2, ema_decay=0.75))
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.batch_stats, after.batch_stats)
    assert all(jax.tree.leaves(changed))
    for name in ("params", "batch_stats"):
        expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, getattr(before, name), getattr(after, name))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.average[name], expected)


@pytest.mark.parametrize("changes", [{}, {"accumulation_steps": 2}, {"classifier__remat": True}], ids=str)
def test_batch_norms_that_do_not_train_keep_their_statistics(changes):
    """And normalise by them, so that they give in training what they give afterwards."""
    before, after, _ = one_step(with_stages(optimizer__freeze="^(stem|stage_0)", **changes))
    same = jax.tree.map(np.array_equal, before.batch_stats, after.batch_stats)
    frozen = {name for name in same if name.startswith(("stem", "stage_0"))}
    assert frozen and frozen != set(same)
    for name, leaves in same.items():
        assert set(jax.tree.leaves(leaves)) == {name in frozen}, name


def test_an_average_warms_up():
    config = tiny_config("classifier", ema_decay=0.9, ema_warmup=True)
    decays = [float(steps.ema_decay(config, step)) for step in (1, 2, 71, 72, 1000)]
    np.testing.assert_allclose(decays, [2 / 11, 3 / 12, 72 / 81, 73 / 82, 0.9], rtol=1e-6)
    config.schedule.warmup_learning_rate = 1e-3
    before, after, _ = one_step(config)
    expected = jax.tree.map(lambda a, b: 2 / 11 * a + 9 / 11 * b, before.params, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.average["params"], expected)


@pytest.mark.parametrize(("student", "teacher"), [("stages", "tokens"), ("tokens", "stages"), ("tokens", "tokens")])
def test_hidden_states_of_any_shapes_through_maps(student, teacher):
    """Other depths, widths, grids and class tokens; the maps learn, and are no part of the network that comes out."""
    shapes = {
        "stages": dict.fromkeys(tiny.VIM) | {"name": "efficient_vmamba_tiny", "dims": (8, 16), "depths": (1, 1)},
        "tokens": tiny.VIM | {"embed_dim": 24, "depth": 3},
    }
    config = tiny_config("student", sr__name="bicubic", schedule__warmup_learning_rate=1e-3)
    config.teacher.update(shapes[teacher])
    config.student.update(shapes[student] | ({"embed_dim": 16, "depth": 2} if student == "tokens" else {}))
    if student != teacher:
        with pytest.raises(ValueError, match="config.loss: .*hidden states can be distilled only.*hidden_map"):
            steps.check_objective(config, build_networks(config, "abcd"))
    config.loss.hidden_map = True
    steps.check_objective(config, build_networks(config, "abcd"))
    before, after, metrics = one_step(config)
    assert metrics["hidden"] > 0 and np.isfinite(metrics["loss"])
    maps = before.params[hidden_map.NAME], after.params[hidden_map.NAME]
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, *maps)))
    assert hidden_map.NAME not in steps.trained_variables(config, after)["params"]


def test_a_teacher_sees_what_its_student_reads_if_asked():
    """Student and teacher have the same weights here, so they agree on the same images, and on no others."""
    config = tiny_config("student", sr__name="bicubic", student__drop_path_rate=0.0, loss__teacher_view="low")
    same = one_step(config)[2]
    config.loss.teacher_view = "high"
    other = one_step(config)[2]
    assert max(same["hidden"], same["logits"]) < 1e-6 < 1e-4 < min(other["hidden"], other["logits"])


def test_layers_meet_at_the_same_relative_depth():
    assert hidden_map._partners(4, 4) == [0, 1, 2, 3]
    assert hidden_map._partners(2, 24) == [11, 23]
    assert hidden_map._partners(24, 4)[::6] == [0, 0, 1, 2] and hidden_map._partners(24, 4)[-1] == 3


def test_maps_are_those_of_the_image_whatever_its_size():
    model = create_model("vim_tiny", image_size=32, **{k: v for k, v in tiny.VIM.items() if k != "name"})
    tokens = 8 * 6 + 1
    hidden = jnp.arange(2 * tokens * 16, dtype=jnp.float32).reshape(2, 1, tokens, 16)
    maps = hidden_map.feature_maps(model, hidden, (64, 48))
    assert [x.shape for x in maps] == [(1, 8, 6, 16)] * 2
    np.testing.assert_array_equal(maps[1][0, 0], hidden[1, 0, :6])  # the class token stands in the middle
    np.testing.assert_array_equal(maps[1][0, 7], hidden[1, 0, -6:])


def test_a_network_that_cannot_read_its_images_is_named_not_the_loss():
    config = with_stages(dataset__high_resolution=16, dataset__low_resolution=4)
    config.classifier.update({"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "downsample": "conv"})
    with pytest.raises(ValueError, match=r"^config\.classifier: images: too small"):
        steps.check_objective(config, build_networks(config, "abcd"))
