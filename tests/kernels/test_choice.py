"""The choice among the implementations of an operation."""

import concurrent.futures
import logging
import os
import sys
import threading
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import kernels
from kernels import choice, selective_scan
from kernels.choice import Implementations, current_platform
from kernels.scan import triton
from kernels.scan.api import IMPLEMENTATIONS

FASTEST_FIRST = dict.fromkeys(("cpu", "gpu"), ("quick", "simple"))
PICKY = Implementations("picky", "test", "operation", ("quick", "simple"), FASTEST_FIRST)


@pytest.fixture(autouse=True)
def operation(monkeypatch):
    """A package whose quick implementation runs even numbers only."""
    modules = {name: types.ModuleType(name) for name in ("operation", "operation.quick", "operation.simple")}
    modules["operation.quick"].why_unavailable = lambda platform, x: f"{x} is odd on {platform}" if x % 2 else None
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def abstract_mesh(platform: str):
    device = AbstractDevice(device_kind="some device", num_cores=None, platform=platform)
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def test_the_fastest_that_can_run_the_inputs():
    with jax.default_device("cpu"):
        assert [PICKY.choose(x) for x in (0, 1)] == ["quick", "simple"]
        assert PICKY.pick(None, 1).__name__ == "operation.simple"
    with abstract_mesh("tpu"):  # where nothing is listed, the last of all
        assert PICKY.choose(0) == "simple"


def test_one_that_cannot_be_imported_is_passed_over(monkeypatch):
    monkeypatch.setitem(sys.modules, "operation.quick", None)
    assert PICKY.choose(0, "cpu") == "simple"
    with pytest.raises(ValueError, match="implementation: 'quick' cannot run here: it cannot be imported: "):
        PICKY.pick("quick", 0)


def test_without_pallas_a_gpu_takes_triton_where_it_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels.scan.pallas", None)
    assert IMPLEMENTATIONS.choose(None, "gpu") == "associative"
    monkeypatch.setattr(triton, "why_unavailable", lambda platform, inputs: None)
    assert IMPLEMENTATIONS.choose(None, "gpu") == "triton"


def test_the_reason_is_logged_once(caplog):
    with caplog.at_level(logging.WARNING), concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert set(pool.map(PICKY.choose, [3] * 8)) == {"simple"}
    message = f"test runs as 'simple'; 'quick' cannot run: 3 is odd on {current_platform()}"
    assert [record.message for record in caplog.records] == [message]


def test_a_named_implementation_runs_or_says_why_not():
    assert PICKY.pick("quick", 2).__name__ == "operation.quick"
    with pytest.raises(ValueError, match="implementation: 'quick' cannot run here: 5 is odd on"):
        PICKY.pick("quick", 5)
    with pytest.raises(ValueError, match="implementation: unknown 'slow', choose one of quick, simple or None"):
        PICKY.pick("slow", 2)


def test_the_platform_is_the_meshs_or_the_default_devices():
    assert current_platform() == jax.default_backend()
    for device in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(device):
            assert current_platform() == "cpu"
            with abstract_mesh("gpu"):
                assert current_platform() == "gpu"
    seen = []
    jax.pmap(lambda x: seen.append(current_platform()) or x, devices=jax.devices("cpu")[:1])(jax.numpy.ones(1))
    assert set(seen) == {"cpu"}


def scan_of(u):
    """A small scan of u; the implementation is chosen."""
    return selective_scan(u, u, -jnp.ones((4, 2)), jnp.ones((4, 2)), jnp.ones((4, 2)), delta_softplus=True)


def test_beside_an_accelerator_the_device_decides_for_which_it_is_lowered(monkeypatch):
    u = jax.random.normal(jax.random.key(0), (1, 5, 4))
    expected = jax.jit(jax.value_and_grad(lambda u: scan_of(u).sum()))(u)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # what runs below is still placed on a CPU
    placed = jax.jit(jax.value_and_grad(lambda u: scan_of(u).sum()))(u)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), placed, expected)
    text = jax.jit(scan_of).trace(u).lower(lowering_platforms=("cpu",)).as_text()
    assert "triton" not in text


def test_what_is_in_use_can_be_compared_between_processes(monkeypatch):
    monkeypatch.setattr(choice, "_in_use", set())
    with jax.default_device("cpu"):
        PICKY.pick(None, 1)
        PICKY.pick("quick", 2)
    assert choice.implementation_in_use() == "test: quick on cpu, test: simple on cpu"


def in_use(function, *arguments) -> str:
    """The implementation that is picked while a function runs or is traced; "" if it is neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "_in_use", set())
        function(*arguments)
        return choice.implementation_in_use().removeprefix("selective scan: ").removesuffix(" on cpu")


def test_an_environment_names_the_implementation():
    u = jnp.ones((1, 5, 4))
    with kernels.use(scan="associative"):
        assert in_use(scan_of, u) == "associative"
        with kernels.use(scan="sequential"):
            assert in_use(scan_of, u) == "sequential"
            with kernels.use(scan=None):
                assert in_use(scan_of, u) == in_use_outside(u)
        assert in_use(scan_of, u) == "associative"
        named = in_use(lambda: selective_scan(u, u, *[-jnp.ones((4, 2))] * 3, implementation="sequential"))
        assert named == "sequential"
        with pytest.raises(RuntimeError), kernels.use(scan="sequential"):
            raise RuntimeError
        assert in_use(scan_of, u) == "associative"


def in_use_outside(u) -> str:
    """The implementation that a thread of its own, outside every environment, takes."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(in_use, scan_of, u).result()


def test_an_environment_is_its_threads_own():
    u, together = jnp.ones((1, 5, 4)), threading.Barrier(2)

    def chosen(name):
        with kernels.use(scan=name):
            together.wait(60)  # both are inside at the same time
            jaxpr = str(jax.make_jaxpr(scan_of)(u))
            together.wait(60)
        return jaxpr

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(chosen, ["sequential", "associative"]))) == 2


def test_a_compiled_function_has_a_program_for_each_environment():
    u = jnp.ones((1, 5, 4))
    compiled = jax.jit(jax.value_and_grad(lambda u: scan_of(u).sum()))
    traced = []
    for name in ("sequential", "associative", "sequential", "associative"):
        with kernels.use(scan=name):
            traced.append(in_use(compiled, u))
    assert traced == ["sequential", "associative", "", ""]


@pytest.mark.parametrize(
    ("implementations", "message"),
    [
        ({"scan": "cuda"}, "scan: unknown 'cuda', choose one of native, pallas, triton, sequential"),
        ({"pooling": "native"}, "kernels.use: unknown operation 'pooling', choose one of scan"),
    ],
)
def test_unknown_names_in_an_environment(implementations, message):
    with pytest.raises(ValueError, match=f"^{message}"), kernels.use(**implementations):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_is_told_that_it_would_wait_for_ever():
    u = jnp.ones((1, 5, 4))
    jax.make_jaxpr(scan_of)(u)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX and Python warn of forks
        child = os.fork()
    if child == 0:
        try:
            jax.make_jaxpr(lambda u: scan_of(u))(u)
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    message = os.read(reader, 1000).decode()
    os.close(reader)
    assert message.startswith(f"This process was forked from process {os.getpid()}, which had used JAX")
