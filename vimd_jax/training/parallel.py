"""Data parallelism: the one place that knows how a step runs on several devices and hosts.

Each device holds a copy of the state and a slice of the batch. Arrays carry a leading axis of local devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import jax_utils
from jax.experimental import multihost_utils

AXIS = "devices"  # the name under which steps average and sum over all devices of all hosts


def replicate(tree: Any) -> Any:
    """A copy for every local device, placed as pmap places its results: so the second step is not compiled anew."""
    return jax_utils.replicate(tree, axis_name=AXIS)


def over_devices(step: Callable, *, donate_state: bool = False) -> Callable:
    """Compiles `step` to run on every device at once; inside it, `AXIS` names the devices."""
    return jax.pmap(step, axis_name=AXIS, donate_argnums=(0,) if donate_state else ())


def shard(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Splits this host's batch (n, ...) into (local devices, n / local devices, ...)."""
    return jax.tree.map(lambda x: x.reshape(jax.local_device_count(), -1, *x.shape[1:]), batch)


def fetch(tree: Any) -> Any:
    """One copy of a replicated tree, as NumPy arrays."""
    return jax.device_get(jax.tree.map(lambda x: x.addressable_data(0)[0], tree))


def check_batch_size(field: str, batch_size: int) -> None:
    """Raises ValueError unless the devices can share a batch of this size equally."""
    if batch_size < 1 or batch_size % jax.device_count():
        raise ValueError(
            f"config.{field} is {batch_size}: choose a multiple of the number of devices, {jax.device_count()}."
        )


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any host."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag)))) if jax.process_count() > 1 else flag
