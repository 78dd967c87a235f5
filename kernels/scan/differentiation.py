"""The gradient of implementations that compute their own, and how their two passes run on several devices.

Sequences are independent, and so are channels, but XLA cannot see that in a custom call or in a loop over sequences
and would gather every array on every device. With the rules below, each device computes the sequences and channels that
it holds; only gradients that are sums over others (of A, D and delta_bias over sequences, of B and C over the
channels that share them) are added up over devices.

A layout names the axes of an array, a letter each: b(atch), c(hannels), g(roups of channels), and "." for an axis that
is never split over devices. Trees of arrays have trees of layouts.
"""

import contextvars
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.scan.inputs import ScanInputs, ScanOptions

STORED = "selective_scan"  # names what the backward pass needs of the forward pass, for policies of `jax.checkpoint`
LONG, STATES = "b.c", "bc."  # of u, delta, z and y; of the initial and the last state


def differentiable(forward: Callable, backward: Callable, saved: str) -> Callable:
    """Makes a `scan(inputs, options)`, differentiable in reverse mode, of the two passes of an implementation.

    Args:
      forward: (inputs, options, save) -> (y, last state, an array for `backward` or None unless `save`).
      backward: (inputs, saved array, gradient of y, gradient of the last state, options) -> gradients of the inputs.
      saved: layout of the saved array.
    """

    def run(inputs: ScanInputs, options: ScanOptions, save: bool) -> tuple:
        results = LONG, STATES, saved if save else None
        return on_devices(forward, (_layout(inputs),), results, _group_size(inputs), (options, save))(inputs)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def scan_in_reverse_mode(inputs: ScanInputs, options: ScanOptions) -> tuple[jax.Array, jax.Array]:
        return run(inputs, options, False)[:2]

    def run_and_save(inputs: ScanInputs, options: ScanOptions):
        y, last_state, array = (checkpoint_name(x, STORED) for x in run(inputs, options, True))
        return (y, last_state), (inputs, array)

    def gradients(options: ScanOptions, residuals, cotangents):
        layout, size = _layout(residuals[0]), _group_size(residuals[0])
        results = layout._replace(order=None)
        call = on_devices(backward, (layout, saved, LONG, STATES), results, size, (options,))
        return (call(*residuals, *cotangents),)

    scan_in_reverse_mode.defvjp(run_and_save, gradients)

    def scan(inputs: ScanInputs, options: ScanOptions) -> tuple[jax.Array, jax.Array]:
        """See `kernels.scan.api` for the contract."""
        order = inputs.order  # integers have no tangents
        return refuse_forward_mode(lambda x: scan_in_reverse_mode(x._replace(order=order), options))(
            inputs._replace(order=None)
        )

    return scan


def refuse_forward_mode(function: Callable) -> Callable:
    """Makes function(inputs), which has a gradient only, name in forward mode the implementations that have more."""

    def refusing(inputs):
        try:
            return function(_refuse_forward_mode(inputs))
        except TypeError as error:  # of JAX, where tangents are mapped, as in `jax.jacfwd`
            if "forward-mode" in str(error):
                _refuse()
            raise

    return refusing


def _layout(inputs: ScanInputs) -> ScanInputs:
    group = "g" if inputs.groups > 1 else "."
    B, C = ("c." if x.ndim == 2 else f"b.{group}." for x in (inputs.B, inputs.C))
    # All groups may read the same u and z.
    u, z = (LONG if x is None or x.shape[2] == inputs.channels else "b.." for x in (inputs.u, inputs.z))
    layout = ScanInputs(u, LONG, "c.", B, C, "c", z, "c", initial_state=STATES, order=f"{group}.")
    return ScanInputs(*(None if x is None else axes for x, axes in zip(inputs, layout)))


def _group_size(inputs: ScanInputs) -> int | None:
    """Channels in each of several groups; None if there is one group."""
    return inputs.channels // inputs.groups if inputs.groups > 1 else None


def on_devices(function: Callable, arguments: Any, results: Any, group_size: int | None, options: tuple) -> Callable:
    """Makes function(*arrays, *options) run split over devices wherever the arrays, of the given layouts, are split."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes or not mesh.empty and mesh.size == 1:  # in `jax.shard_map` the arrays are parts already
        call = lambda *arrays: function(*arrays, *options)  # noqa: E731
    else:
        call = _partitioned(function, arguments, results, group_size, options)

    def refusing_derivatives(*arrays):
        leaves, tree = jax.tree.flatten(arrays)
        return call(*tree.unflatten(_constants.bind(*leaves)))

    return refusing_derivatives


@functools.cache
def _partitioned(function: Callable, arguments: Any, results: Any, group_size: int | None, options: tuple) -> Callable:
    def alone(*arrays):
        return function(*arrays, *options)

    def partition(mesh: Mesh, shapes, _):
        long = next((x for x, layout in zip(shapes[0], arguments[0]) if layout == LONG), shapes[0][0])
        split = _mesh_axes(mesh, long, group_size)

        def sharding(layout):
            return NamedSharding(mesh, PartitionSpec(*map(split.get, layout)))

        def total(x, layout):  # a result that lacks an axis is a sum over it
            lacking = [axis for axis in "bc" if axis not in layout.replace("g", "c")]
            return jax.lax.psum(x, [name for axis in lacking for name in split[axis]])

        def part(*arrays):
            return jax.tree.map(total, alone(*arrays), results)

        return mesh, part, jax.tree.map(sharding, results), jax.tree.map(sharding, arguments)

    partitioned = custom_partitioning(alone)
    sizes = {} if group_size is None else dict(k=group_size)
    partitioned.def_partition(partition, sharding_rule=_rule(arguments, results, group_size), **sizes)
    mapped = custom_vmap(partitioned)

    @mapped.def_vmap
    def _(axis_size: int, in_batched, *arrays):  # `custom_partitioning` has no rule for this
        in_axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
        outputs = jax.vmap(alone, in_axes, axis_size=axis_size)(*arrays)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return mapped


def _mesh_axes(mesh: Mesh, long, group_size: int | None) -> dict[str, tuple[str, ...]]:
    """Maps the letters of a layout to axes of the mesh: as `long`, (batch, length, channels), is split.

    What would be split into parts of different sizes is not split.
    """

    def whole(axis: int, count: int) -> tuple[str, ...]:
        names = long.sharding.spec[axis] or ()
        names = names if isinstance(names, tuple) else (names,)
        return () if count % math.prod(mesh.shape[name] for name in names) else names

    channels = whole(2, long.shape[2] // (group_size or 1))
    return dict(b=whole(0, long.shape[0]), c=channels, g=channels)


def split(x: jax.Array, groups: int) -> jax.Array:
    """(batch, positions, groups * channels) or (…, groups, channels) -> (groups * batch, positions, channels)."""
    parts = x.reshape(*x.shape[:2], groups, -1)
    return jnp.moveaxis(parts, 2, 0).reshape(-1, x.shape[1], parts.shape[3])


def join(x: jax.Array, groups: int) -> jax.Array:
    """(groups * batch, positions, channels) -> (batch, positions, groups * channels)."""
    parts = x.reshape(groups, -1, *x.shape[1:])
    return jnp.moveaxis(parts, 0, 2).reshape(*parts.shape[1:3], -1)


def sum_groups(x: jax.Array, groups: int) -> jax.Array:
    """(groups * batch, positions, channels) -> (batch, positions, channels): the gradient of what all groups read."""
    return functools.reduce(jnp.add, x.reshape(groups, -1, *x.shape[1:]))  # one loop; XLA takes far longer for a sum


def _rule(arguments: Any, results: Any, group_size: int | None) -> str:
    """Writes in the notation of einsum which axes are split alike: "b x0 c, c x1 -> b x2 c"."""
    names, others = dict(b="b", c="c" if group_size is None else "(g k)", g="g"), itertools.count()

    def write(layouts) -> str:
        axes = ([names.get(axis) or f"x{next(others)}" for axis in layout] for layout in jax.tree.leaves(layouts))
        return ", ".join(map(" ".join, axes))

    return f"{write(arguments)} -> {write(results)}"


def _refuse(*_, **__):
    raise TypeError(
        "this implementation is differentiable once, in reverse mode: for forward mode and second derivatives use "
        'kernels.use(scan="associative")'
    )


@jax.custom_jvp
def _refuse_forward_mode(inputs):
    return inputs


@_refuse_forward_mode.defjvp
def _(primals, tangents):
    leaves, tree = jax.tree.flatten(tangents)
    token = _in_rule.set(True)
    try:
        return primals[0], tree.unflatten(_tangents.bind(*leaves))[0]
    finally:
        _in_rule.reset(token)


# Reverse mode also starts with tangents, but only transposes what is computed from them. This identity can be
# transposed and cannot be computed. JAX itself refuses with an error that does not say what to do.
_tangents = Primitive("tangents_of_selective_scan")
_tangents.multiple_results = True
_tangents.def_abstract_eval(lambda *tangents: tangents)
_tangents.def_impl(_refuse)
mlir.register_lowering(_tangents, _refuse)
ad.primitive_jvps[_tangents] = _refuse
ad.primitive_transposes[_tangents] = lambda cotangents, *tangents: [
    cotangent if ad.is_undefined_primal(tangent) else None for cotangent, tangent in zip(cotangents, tangents)
]

# A gradient of a mapped function maps the tangents as it makes them; they are mapped later in forward mode alone, as by
# `jax.jacfwd` of a loop.
_in_rule: contextvars.ContextVar[bool] = contextvars.ContextVar("_in_rule", default=False)


def _map_tangents(tangents, axes):
    return (_tangents.bind(*tangents), axes) if _in_rule.get() else _refuse()


batching.primitive_batchers[_tangents] = _map_tangents

# An identity without derivatives, not a `custom_jvp`, whose rule JAX drops where it linearizes a loop.
_constants = Primitive("differentiable_once")
_constants.multiple_results = True
_constants.def_abstract_eval(lambda *arrays: arrays)
_constants.def_impl(lambda *arrays: arrays)
mlir.register_lowering(_constants, lambda _, *arrays: arrays)
ad.primitive_jvps[_constants] = _refuse
batching.primitive_batchers[_constants] = lambda arrays, axes: (_constants.bind(*arrays), axes)
