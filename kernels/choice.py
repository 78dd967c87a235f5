"""The choice among an operation's implementations: the one named by the call, else by `use`, else the fastest.

An implementation is a module of the operation's package, imported when it is first considered. Its function
`why_unavailable(platform, inputs)` returns one line that explains why it cannot run these inputs on "cpu", "gpu" or
"tpu", or None if it can; a module without this function runs everything everywhere.
"""

import contextlib
import importlib
import logging
import os
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax

OPERATIONS: dict[str, "Implementations"] = {}  # every operation by the name that `use` takes

_chosen = jax.make_user_context(())  # (operation, implementation) pairs; part of the key of JAX's caches
_process: int | None = None  # that traced the first operation
_logged: set[str] = set()
_in_use: set[str] = set()
_lock = threading.Lock()


class Implementations(NamedTuple):
    """The implementations of one operation."""

    operation: str  # its key in OPERATIONS
    title: str  # its name in messages
    package: str  # that contains the modules
    names: tuple[str, ...]  # of the modules; the last runs everything everywhere
    fastest_first: dict[str, tuple[str, ...]]  # by platform; the last of each list runs everything there

    def check(self, name: str | None, argument: str = "implementation") -> None:
        """Raises a ValueError for an argument that is neither None nor one of the implementations."""
        if name is not None and name not in self.names:
            raise ValueError(f"{argument}: unknown {name!r}, choose one of {', '.join(self.names)} or None")

    def pick(self, name: str | None, inputs: Any, platform: str | None = None) -> ModuleType:
        """Returns the named module, or without a name the one that `choose` returns.

        Raises a ValueError if the name is unknown, or if that implementation cannot run these inputs here.
        """
        platform = platform or current_platform()
        self.check(name)
        if name is None:
            name = self.choose(inputs, platform)
        elif reason := self.why_unavailable(name, inputs, platform):
            raise ValueError(f"implementation: {name!r} cannot run here: {reason}")
        with _lock:
            _in_use.add(f"{self.title}: {name} on {platform}")
        return importlib.import_module(f"{self.package}.{name}")

    def call(self, function: str, name: str | None, inputs: Any, *options: Any) -> Any:
        """Calls a function of the implementation that is named here, else by `use`, else of the fastest.

        On a host with an accelerator, only compilation decides on which of the two platforms the operation runs. With
        no name, the program therefore contains the fastest implementation for each, and JAX lowers one of them.
        """
        _refuse_forks()
        if name is None:
            name = dict(_chosen.value).get(self.operation)

        def on(platform):
            return lambda inputs: getattr(self.pick(name, inputs, platform), function)(inputs, *options)

        platform = current_platform()
        if name is not None or platform == "cpu" or _given_platform():
            return on(platform)(inputs)
        return jax.lax.platform_dependent(inputs, cpu=on("cpu"), default=on(platform))

    def choose(self, inputs: Any, platform: str | None = None) -> str:
        """Returns the name of the fastest that can run these inputs, and logs once why a faster one cannot."""
        platform, reasons = platform or current_platform(), []
        for name in self.candidates(platform):
            reason = self.why_unavailable(name, inputs, platform)
            if reason is None:
                break
            reasons.append(f"{name!r} cannot run: {reason}")
        if reasons:
            _warn_once(f"{self.title} runs as {name!r}; {'; '.join(reasons)}")
        return name

    def candidates(self, platform: str | None = None) -> tuple[str, ...]:
        """Returns the implementations to try on a platform (the current one by default), fastest first."""
        return self.fastest_first.get(platform or current_platform(), self.names[-1:])

    def why_unavailable(self, name: str, inputs: Any, platform: str | None = None) -> str | None:
        """Returns one line that explains why an implementation cannot run these inputs, None if it can."""
        try:
            module = importlib.import_module(f"{self.package}.{name}")
        except ImportError as error:  # such as a part of JAX that is gone
            return f"it cannot be imported: {error}"
        ask = getattr(module, "why_unavailable", None)
        return ask(platform or current_platform(), inputs) if ask else None


@contextlib.contextmanager
def use(**implementations: str | None) -> Iterator[None]:
    """Names the implementation of operations for everything that is traced within it: `with use(scan="sequential"):`.

    It holds in the current thread, and within another `use` for the operations it names; None stands for the fastest.
    A function under `jax.jit` is compiled once for each choice. An `implementation` given to an operation directly
    comes first.

    Naming a scan that is not C++, for export, forward mode or second derivatives, asks for programs without C++: the
    other operations then take none either, unless they are named.

    Raises:
      ValueError: an operation or its implementation is unknown.
    """
    for operation, name in implementations.items():
        if operation not in OPERATIONS:
            raise ValueError(f"kernels.use: unknown operation {operation!r}, choose one of {', '.join(OPERATIONS)}")
        OPERATIONS[operation].check(name, argument=operation)
    chosen = dict(_chosen.value) | implementations
    if implementations.get("scan") not in (None, "native"):
        chosen = {name: operation.names[-1] for name, operation in OPERATIONS.items()} | chosen
    with _chosen(tuple(sorted(chosen.items()))):
        yield


def implementation_in_use() -> str:
    """Lists the implementation of every operation traced so far in this process: "selective scan: native on cpu".

    Processes that train together must agree on it, or their parameters drift apart: compare it across all of them and
    stop where it differs (one of them may have failed to compile the C++).
    """
    with _lock:
        return ", ".join(sorted(_in_use))


def current_platform() -> str:
    """Returns the platform of the current mesh's devices, else of the default device, else of JAX's backend."""
    return _given_platform() or jax.default_backend()


def _refuse_forks() -> None:
    """Raises a RuntimeError in a fork of the process that traced the first operation: compiling there never ends."""
    global _process
    _process = _process or os.getpid()
    if os.getpid() != _process:
        raise RuntimeError(
            f"This process was forked from process {_process}, which had used JAX, and JAX cannot compile in a fork: "
            "start it with spawn, or use JAX after the fork only (gunicorn: without --preload)."
        )


def _given_platform() -> str | None:
    mesh_device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if platform := getattr(mesh_device, "platform", None):  # JAX 0.10.0 has no such attribute
        return platform
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    return device.platform if device else None


def _warn_once(message: str) -> None:
    with _lock:  # so that threads that get here together log it once
        if message not in _logged:
            logging.getLogger(__name__).warning(message)
        _logged.add(message)
