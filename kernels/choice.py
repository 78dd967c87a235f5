"""Which implementation of an operation runs: the one that is named, or else the fastest that can.

An implementation is a module of the operation's package, imported when it is first considered. Its function
`why_unavailable(platform, inputs)` says in one line why it cannot run such inputs on "cpu", "gpu" or "tpu", or returns
None; a module without this function runs everything everywhere.
"""

import importlib
import logging
import threading
from types import ModuleType
from typing import Any, NamedTuple

import jax

_logged: set[str] = set()
_in_use: set[str] = set()
_lock = threading.Lock()


class Implementations(NamedTuple):
    """The implementations of one operation."""

    operation: str  # its name in messages
    package: str  # where the modules are
    names: tuple[str, ...]  # of the modules; the last runs everything everywhere
    fastest_first: dict[str, tuple[str, ...]]  # by platform; the last of each list runs everything there

    def pick(self, name: str | None, inputs: Any, platform: str | None = None) -> ModuleType:
        """The named module, or what `choose` says; a ValueError if the name is unknown or says why it cannot run."""
        platform = platform or current_platform()
        if name is None:
            name = self.choose(inputs, platform)
        elif name not in self.names:
            raise ValueError(f"implementation: unknown {name!r}, choose one of {', '.join(self.names)} or None")
        elif reason := self.why_unavailable(name, inputs, platform):
            raise ValueError(f"implementation: {name!r} cannot run here: {reason}")
        with _lock:
            _in_use.add(f"{self.operation}: {name} on {platform}")
        return importlib.import_module(f"{self.package}.{name}")

    def call(self, function: str, name: str | None, inputs: Any, *options: Any) -> Any:
        """What a function of the picked module makes of the inputs.

        On a host with an accelerator that shows only when it is compiled where the operation will run: with no name,
        the program has both its platform's fastest implementation and the CPU's, of which one is lowered.
        """

        def on(platform):
            return lambda inputs: getattr(self.pick(name, inputs, platform), function)(inputs, *options)

        platform = current_platform()
        if name is not None or platform == "cpu" or _given_platform():
            return on(platform)(inputs)
        return jax.lax.platform_dependent(inputs, cpu=on("cpu"), default=on(platform))

    def choose(self, inputs: Any, platform: str | None = None) -> str:
        """The fastest that can run these inputs here. Logs once why if that is not the platform's fastest."""
        platform, reasons = platform or current_platform(), []
        for name in self.candidates(platform):
            reason = self.why_unavailable(name, inputs, platform)
            if reason is None:
                break
            reasons.append(f"{name!r} cannot run: {reason}")
        if reasons:
            _warn_once(f"{self.operation} runs as {name!r}; {'; '.join(reasons)}")
        return name

    def candidates(self, platform: str | None = None) -> tuple[str, ...]:
        """What to try on a platform, the current one unless another is named, fastest first."""
        return self.fastest_first.get(platform or current_platform(), self.names[-1:])

    def why_unavailable(self, name: str, inputs: Any, platform: str | None = None) -> str | None:
        """One line that says why a named implementation cannot run these inputs here, None if it can."""
        module = importlib.import_module(f"{self.package}.{name}")
        ask = getattr(module, "why_unavailable", None)
        return ask(platform or current_platform(), inputs) if ask else None


def implementation_in_use() -> str:
    """What every operation that was traced so far in this process runs as: "selective scan: native on cpu".

    Processes that train together have to agree on it, or their parameters drift apart: compare it over all of them,
    and stop where it differs (one of them may have failed to compile the C++).
    """
    with _lock:
        return ", ".join(sorted(_in_use))


def current_platform() -> str:
    """Where what is being traced will run: on the mesh's devices, else the default device, else JAX's backend."""
    return _given_platform() or jax.default_backend()


def _given_platform() -> str | None:
    mesh_device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if platform := getattr(mesh_device, "platform", None):  # JAX 0.10.0 has no such attribute
        return platform
    device = jax.config.jax_default_device
    if isinstance(device, str):
        device = jax.devices(device)[0]
    return device.platform if device else None


def _warn_once(message: str) -> None:
    with _lock:  # threads that come first together log once together
        if message not in _logged:
            logging.getLogger(__name__).warning(message)
        _logged.add(message)
