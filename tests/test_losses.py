"""The loss terms against recorded values and gradients, alone and in the student's objective."""

import golden
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vimd_jax import losses
from vimd_jax.models.srvm import SRVM
from weight_convert import convert_state_dict


def test_recorded_terms():
    io = golden.tensors("c05_loss_functions")
    logits, teacher_logits, labels = io["logits_student"], io["logits_teacher"], io["target"]
    student, teacher = io["features_student"], io["features_teacher"]
    terms = {
        "loss_ce_plain": losses.label_smoothing_cross_entropy(logits, labels, 0.0),
        "loss_ce_smooth": losses.label_smoothing_cross_entropy(logits, labels, 0.1),
        "loss_distill_kl_T4": losses.logits_distillation(logits, teacher_logits, 4.0),
        "loss_hsmse_as_coded": losses.hidden_state_distillation(student, teacher, "last"),
        "mse_sum_all_layers": losses.hidden_state_distillation(student, teacher, "all"),
    }
    for name, value in terms.items():
        assert float(value) == pytest.approx(io[name].item(), rel=1e-5), name
    objective = terms["loss_ce_smooth"] + 5 * terms["loss_hsmse_as_coded"]
    assert float(objective) == pytest.approx(io["objective_as_coded"].item(), rel=1e-5)
    objective += terms["loss_distill_kl_T4"]
    assert float(objective) == pytest.approx(io["objective_with_kl_commented_out_line"].item(), rel=1e-5)
    for layers in [(0,), (3, 17), (23, 0, 5)]:
        value = losses.hidden_state_distillation(student, teacher, layers)
        assert float(value) == pytest.approx(io["mse_per_layer"][list(layers)].sum(), rel=1e-5)


def test_recorded_gradients():
    io = golden.tensors("c05_loss_functions")
    gradients = {
        "grad_ce_smooth_logits": jax.grad(losses.label_smoothing_cross_entropy)(
            io["logits_student"], io["target"], 0.1
        ),
        "grad_kl_logits_student": jax.grad(losses.logits_distillation)(io["logits_student"], io["logits_teacher"], 4.0),
        "grad_hsmse_features_student": jax.grad(losses.hidden_state_distillation)(
            io["features_student"], io["features_teacher"], "last"
        ),
    }
    for name, gradient in gradients.items():
        assert golden.relative_error(gradient, io[name]) < 1e-5, name


def test_recorded_student_objective():
    """SR network, student and teacher together, as the released code trains: every term and every gradient."""
    case = "c05_student_objective"
    io, constructors = golden.tensors(case), golden.meta(case)["constructor"]
    student = SRVM(
        sr=golden_models.srresnet(constructors["sr"]), classifier=golden_models.vim(constructors["student"], remat=True)
    )
    weights = {"sr": golden.tensors(case, "sr_weights"), "classifier": golden.tensors(case, "weights")}
    variables = convert_state_dict(weights, student)
    teacher = golden_models.vim(constructors["teacher"])
    teacher_variables = convert_state_dict(golden.tensors(case, "teacher_weights"), teacher)
    low, high = golden_models.nhwc(io["lr"]), golden_models.nhwc(io["hr"])

    @jax.jit
    def gradient(variables):
        teacher_logits, teacher_features = teacher.apply(teacher_variables, high, return_features=True)

        def objective(variables):
            logits, features = student.apply(variables, low, train=True, return_features=True)
            states = features["hidden_states"], teacher_features["hidden_states"]
            terms = {
                "loss_ce": losses.label_smoothing_cross_entropy(logits, io["target"], 0.1),
                "loss_hsmse_as_coded": losses.hidden_state_distillation(*states, "last"),
                "loss_kl": losses.logits_distillation(logits, teacher_logits, 4.0),
            }
            outputs = {
                "logits_student": logits,
                "logits_teacher": teacher_logits,
                "sr_output": jnp.moveaxis(features["super_resolved"], -1, 1),
                "feature_student_00": states[0][0],
                "feature_student_23": states[0][23],
                "feature_teacher_00": states[1][0],
                "feature_teacher_23": states[1][23],
                "mse_per_layer": jnp.mean(jnp.square(states[0] - states[1]), axis=(1, 2, 3)),
            }
            return terms["loss_ce"] + 5 * terms["loss_hsmse_as_coded"], terms | outputs

        return jax.value_and_grad(objective, has_aux=True)(variables)

    (loss, outputs), gradients = gradient(variables)
    assert float(loss) == pytest.approx(io["objective_as_coded"].item(), rel=1e-5)
    for name, value in outputs.items():
        assert golden.relative_error(jnp.reshape(value, io[name].shape), io[name]) < 1e-4, name
    named = {name.removeprefix("grad/"): x for name, x in io.items() if name.startswith("grad/")}
    expected = convert_state_dict(named, student.classifier)["params"]
    errors = jax.tree.map(golden.relative_error, gradients["params"]["classifier"], expected)
    assert max(jax.tree.leaves(errors)) < 1e-3


def test_soft_labels():
    """With the soft labels of integers it is the label-smoothed loss; otherwise the sum over the classes."""
    logits = jax.random.normal(jax.random.key(0), (6, 5))
    labels, others = jnp.array([0, 4, 2, 2, 1, 3]), jnp.array([3, 1, 2, 0, 1, 4])
    for smoothing in (0.0, 0.1):
        one, other = (losses.smoothed_targets(x, 5, smoothing) for x in (labels, others))
        np.testing.assert_allclose(one.sum(axis=1), 1, rtol=1e-6)
        expected = [losses.label_smoothing_cross_entropy(logits, x, smoothing) for x in (labels, others)]
        assert losses.soft_target_cross_entropy(logits, one) == pytest.approx(float(expected[0]), rel=1e-6)
        mixed = losses.soft_target_cross_entropy(logits, 0.3 * one + 0.7 * other)
        assert mixed == pytest.approx(float(0.3 * expected[0] + 0.7 * expected[1]), rel=1e-6)


def test_binary_cross_entropy():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 3, (4, 7)), rng.uniform(0, 1, (4, 7))
    probability = 1 / (1 + np.exp(-logits))

    def expected(targets):
        return -(targets * np.log(probability) + (1 - targets) * np.log(1 - probability)).mean()

    assert losses.binary_cross_entropy(logits, targets) == pytest.approx(expected(targets), rel=1e-5)
    for threshold in (0.0, 0.4):
        loss = losses.binary_cross_entropy(logits, targets, threshold)
        assert loss == pytest.approx(expected((targets > threshold).astype(float)), rel=1e-5)
    certain = losses.binary_cross_entropy(jnp.array([[200.0, -200.0]]), jnp.array([[1.0, 0.0]]))
    assert certain == 0 and losses.binary_cross_entropy(jnp.array([[200.0]]), jnp.array([[0.0]])) == 200


def test_normalized_states_have_unit_length():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 3, 4, 5, 6)).astype(np.float32)
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (student, teacher)]
    expected = np.square(unit[0] - unit[1]).mean(axis=(1, 2, 3)).sum()
    value = losses.hidden_state_distillation(student, teacher, "all", normalize=True)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert float(losses.hidden_state_distillation(student, 7 * student, "all", normalize=True)) < 1e-10


def test_states_of_zeros_have_finite_gradients():
    zeros, ones = jnp.zeros((2, 1, 3, 4)), jnp.ones((2, 1, 3, 4))
    gradient = jax.grad(losses.hidden_state_distillation)(zeros, ones, "all", normalize=True)
    assert np.all(np.isfinite(gradient))


def test_large_bfloat16_logits_stay_finite():
    logits = jnp.array([[3e4, -3e4, 0.0]], jnp.bfloat16)
    for value in (
        losses.label_smoothing_cross_entropy(logits, jnp.array([1]), 0.1),
        losses.logits_distillation(logits, -logits, 1.0),
    ):
        assert value.dtype == jnp.float32 and np.isfinite(value)


@pytest.mark.parametrize("layers", ["first", (), (0, 24), (-1,)])
def test_unknown_layers_are_named(layers):
    with pytest.raises(ValueError, match="^layers: .*0 to 23"):
        losses.hidden_state_distillation(jnp.zeros((24, 1, 2, 3)), jnp.zeros((24, 1, 2, 3)), layers)


def test_states_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"^teacher_hidden: .*\(12, 1, 2, 3\).*\(24, 1, 2, 3\)"):
        losses.hidden_state_distillation(jnp.zeros((24, 1, 2, 3)), jnp.zeros((12, 1, 2, 3)))


@pytest.mark.parametrize("normalize", [False, True])
def test_states_of_stages_are_summed_stage_by_stage(normalize):
    rng = np.random.default_rng(0)
    shapes = [(2, 8, 6, 4), (2, 4, 3, 8), (2, 2, 2, 16)]
    student, teacher = (tuple(rng.normal(size=s).astype(np.float32) for s in shapes) for _ in range(2))
    alone = [losses.hidden_state_distillation(s[None], t[None], "all", normalize) for s, t in zip(student, teacher)]
    assert len({float(value) for value in alone}) == 3
    for layers, stages in {"all": (0, 1, 2), "last": (2,), (0,): (0,), (2, 0): (0, 2)}.items():
        value = losses.hidden_state_distillation(student, teacher, layers, normalize)
        assert value.shape == ()
        assert float(value) == pytest.approx(sum(float(alone[i]) for i in stages), rel=1e-5)
    with pytest.raises(ValueError, match="^layers: .*0 to 2"):
        losses.hidden_state_distillation(student, teacher, (3,))


def test_equal_stages_are_as_good_as_a_stack():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 3, 2, 5, 4)).astype(np.float32)
    stacked = losses.hidden_state_distillation(student, teacher, "all")
    assert float(losses.hidden_state_distillation(tuple(student), list(teacher), "all")) == pytest.approx(
        float(stacked)
    )


def test_stages_of_other_shapes_are_refused():
    maps = jnp.zeros((1, 4, 4, 8)), jnp.zeros((1, 2, 2, 16))
    for other in ((maps[0],), (maps[0], jnp.zeros((1, 2, 2, 8))), jnp.zeros((2, 1, 16, 8))):
        with pytest.raises(ValueError, match="^teacher_hidden: shape .* differs from the student's .*, logits between"):
            losses.hidden_state_distillation(maps, other)
        with pytest.raises(ValueError, match="^teacher_hidden: "):
            losses.hidden_state_distillation(other, maps)
