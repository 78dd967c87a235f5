"""The computation of one step: the objective of a stage, the update, and the sums of an evaluation.

Everything here is a pure function of arrays, traced once and run on every device (see parallel.py). A batch is that of
tasks/task.py.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from kernels import selective_scan
from vimd_jax.data.pipeline import blank_example
from vimd_jax.models.layers import BatchNorm
from vimd_jax.tasks.task import Batch, Output, unit
from vimd_jax.training import hidden_map
from vimd_jax.training.parallel import AXIS, over_devices
from vimd_jax.training.roles import Networks, zeros


class TrainState(flax.struct.PyTreeNode):
    """The state that training changes and that a checkpoint of a run holds, without the frozen networks."""

    step: jax.Array
    params: Any  # of the trained network
    batch_stats: Any  # of the trained network; {} if it has none
    opt_state: optax.OptState
    average: Any  # of params and batch_stats, an exponential moving one; {} when config.ema_decay is 0


def create_state(config: ConfigDict, variables: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        average=jax.tree.map(jnp.copy, variables) if config.ema_decay else {},
    )


def ema_decay(config: ConfigDict, step: Any) -> Any:
    """The decay of the moving average at a step, counted from 1."""
    return jnp.minimum(config.ema_decay, (1 + step) / (10 + step)) if config.ema_warmup else config.ema_decay


def average_is_young(config: ConfigDict, step: int) -> bool:
    """Whether the initial weights still are more than 1 % of a moving average without warm-up."""
    return config.ema_decay**step > 0.01 and not config.ema_warmup


def trained_variables(config: ConfigDict, state: TrainState, averaged: bool = True) -> Any:
    """Variables of the trained network to evaluate and save: the average where it is kept, unless `averaged` is off."""
    is_average = averaged and config.ema_decay
    variables = state.average if is_average else _variables(state.params, state.batch_stats)
    params = {name: leaf for name, leaf in variables["params"].items() if name != hidden_map.NAME}
    return {**variables, "params": params}


def _variables(params: Any, batch_stats: Any) -> Any:
    return {"params": params} | ({"batch_stats": batch_stats} if batch_stats else {})


# ---------------------------------------------------------------------------------------------------------------------
# The objective: (variables, frozen variables by role, batch, rngs) -> loss, (its terms, updated batch statistics)


def _objective(config: ConfigDict, networks: Networks) -> Callable:
    task = networks.task
    options = {"return_features": True} if task.reads_features else {}

    def objective(variables, frozen, batch, rngs):
        images = networks.images(frozen, batch)
        with nn.intercept_methods(_freezing(config.optimizer.freeze)):
            made, updated = networks.trained.apply(
                variables, images, train=True, rngs=rngs, mutable=["batch_stats"], **options
            )
        output = Output(*made) if task.reads_features else Output(made)
        if networks.teacher is not None:
            seen = unit(batch["high"]) if config.loss.teacher_view == "high" else images
            teacher = networks.teacher.apply(frozen[networks.stage.teacher], seen, return_features=True)
            output = output._replace(teacher=Output(*teacher))
        with blaming("config.loss"):
            if networks.teacher is not None and config.loss.hidden_map:
                output = hidden_map.apply(variables["params"], networks, output, seen.shape[1:3])
            loss, terms = task.loss(output, batch, config)
        return loss, (terms, updated.get("batch_stats", {}))

    return objective


def _freezing(pattern: str) -> Callable:
    """Has batch norms whose scale and bias do not train normalise by their running averages, which then stay too.

    Args:
      pattern: config.optimizer.freeze.
    """

    def call(method: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        norm = context.module
        if pattern and isinstance(norm, BatchNorm) and context.method_name == "__call__" and norm.train:
            paths = ["/".join((*norm.path, name)) for name in ("scale", "bias")]
            if all(re.search(pattern, path) for path in paths):
                return norm.clone(parent=None, name=None, train=False).apply(norm.variables, *args, **kwargs)
        return method(*args, **kwargs)

    return call


@contextlib.contextmanager
def blaming(field: str) -> Iterator[None]:
    """A context whose ValueErrors name the field that is at fault."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def check_scan(config: ConfigDict) -> None:
    """Raises ValueError if config.scan_implementation cannot run here."""
    if not (name := config.scan_implementation):
        return
    u, matrix = np.zeros((1, 8, 8), np.float32), np.zeros((8, 8), np.float32)
    try:
        jax.eval_shape(lambda: selective_scan(u, u, matrix, u, u, implementation=name))
    except ValueError as error:
        raise ValueError(f"config.scan_implementation: {str(error).removeprefix('implementation: ')}") from error


def check_objective(config: ConfigDict, networks: Networks) -> None:
    """Traces the objective without computing it, so that networks that do not fit together are found at the start.

    Raises:
      ValueError: names the network that cannot read its images, or the setting of the loss that does not fit.
    """
    networks.task.check(config, len(networks.outputs))
    variables = {}
    for role, model in {networks.stage.trained: networks.trained, **networks.frozen}.items():
        with blaming(f"config.{role}"):
            variables[role] = zeros(model)
    trained = variables.pop(networks.stage.trained)
    # Two images, because batch normalisation leaves nothing of a single one.
    batch = jax.tree.map(lambda x: np.stack([x, x]), blank_example(config.dataset, networks.task.target))

    def trace(key):
        mixed = _mixed(config, networks, key, batch)
        return _objective(config, networks)(
            hidden_map.add(config, networks, trained), variables, mixed, {"drop_path": key}
        )

    jax.eval_shape(jax.vmap(trace, axis_name=AXIS), jax.random.split(jax.random.key(0), 1))


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def _mixed(config: ConfigDict, networks: Networks, key: jax.Array, batch: Batch) -> Batch:
    """The batch as the task mixes its images, if it does."""
    mix = networks.task.mix
    return mix(key, batch, networks.views, len(networks.outputs), config, AXIS) if mix else batch


def make_train_step(
    config: ConfigDict, networks: Networks, optimizer: optax.GradientTransformation
) -> jax.stages.Wrapped:
    """One optimiser step over all devices: (state, frozen, batch) -> (state, metrics), both replicated."""
    objective = _objective(config, networks)

    def train_step(state, frozen, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        rngs = {"drop_path": jax.random.fold_in(key, 0)}
        batch = _mixed(config, networks, jax.random.fold_in(key, 1), batch)

        def gradients_of(batch_stats, batch, rngs):
            def loss_of(params):
                return objective(_variables(params, batch_stats), frozen, batch, rngs)

            (loss, (terms, batch_stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
            return batch_stats, (gradients, {"loss": loss, **terms})

        if config.accumulation_steps == 1:
            batch_stats, means = gradients_of(state.batch_stats, batch, rngs)
        else:
            batch_stats, means = _accumulate(gradients_of, config.accumulation_steps, state.batch_stats, batch, rngs)
        gradients, metrics = jax.lax.pmean(means, AXIS)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if config.ema_decay:
            share = 1 - ema_decay(config, state.step + 1)
            average = optax.incremental_update(_variables(params, batch_stats), average, share)
        metrics |= {"gradient_norm": optax.tree.norm(gradients), "parameter_norm": optax.tree.norm(params)}
        return TrainState(state.step + 1, params, batch_stats, opt_state, average), metrics

    return over_devices(train_step, donate_state=True)


def _accumulate(gradients_of: Callable, count: int, batch_stats: Any, batch: Batch, rngs: Any) -> tuple[Any, Any]:
    """Batch statistics after, and means over, `count` parts of a batch, computed one after the other."""
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)

    def one(carry, numbered_part):
        batch_stats, sums = carry
        number, part = numbered_part
        keys = {name: jax.random.fold_in(key, number) for name, key in rngs.items()}
        batch_stats, results = gradients_of(batch_stats, part, keys)
        return (batch_stats, jax.tree.map(jnp.add, sums, results)), None

    first = jax.tree.map(lambda x: x[0], parts)
    _, shapes = jax.eval_shape(gradients_of, batch_stats, first, rngs)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (batch_stats, sums), _ = jax.lax.scan(one, (batch_stats, sums), (jnp.arange(count), parts))
    return batch_stats, jax.tree.map(lambda x: x / count, sums)


def make_eval_step(
    config: ConfigDict, networks: Networks
) -> Callable[[Any, Batch], tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    """Evaluates one batch over all devices: (variables, batch) -> its sums, and what is kept of every image.

    Each image counts by its weight. The second result is replicated too: `Task.per_image`, "index" and "weight",
    (images,).
    """
    task, product = networks.task, networks.product

    def eval_step(variables, batch):
        output = task.answer(product, variables, unit(batch[networks.view]), config)
        images = task.per_image(output, batch) | {name: batch[name] for name in ("index", "weight")}
        return jax.lax.psum(task.sums(output, batch), AXIS), jax.lax.all_gather(images, AXIS, tiled=True)

    return over_devices(eval_step)
