"""The measurements of scripts/gpu_report.py, case by case, in the process that it starts.

    python scripts/gpu_cases.py --start N [--sections NAME ...] [--data DIR] [--rehearse]

Prints one line of JSON with the names of all cases, then one for each case from number N on, with its rows or its
error. The process exits at the first error, since nothing can run in it after a GPU fault.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import benchmark_model
import benchmark_scan
import golden
import jax
import jax.numpy as jnp
import numpy as np

from configs import quickstart, small
from kernels import selective_scan
from kernels.scan import pallas
from kernels.scan.api import IMPLEMENTATIONS
from kernels.scan.inputs import ScanInputs, ScanOptions, canonical
from kernels.scan.shapes import SHAPES, Shape
from vimd_jax.config import STAGES
from vimd_jax.train import train
from vimd_jax.training.metrics import read_metrics
from vimd_jax.training.workdirs import stages

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "triton", "jax-triton")
RECORDED = ("c01_scan_L65_grouped", "c01_scan_L65_constB", "c01_scan_L730_bigdt")
# The present plans, and changes to try one at a time. Each takes some 5 to 20 s to compile.
PLANS = {"forward": dict(registers=8, block=32, parts=1), "backward": dict(registers=8, block=64, parts=2)}
KNOBS = {
    ("forward", 64): dict(block=(64, 16), registers=(4,), WINDOW=(8, 4)),
    ("backward", 64): dict(block=(32,), WINDOW=(8, 4), ROWS=(4,)),
    ("forward", 1): dict(CHUNK=(36, 60)),
    ("backward", 1): dict(CHUNK=(36, 60)),
}
TINY = dict(depth=1, embed_dim=16)  # networks of a rehearsal


class Case(NamedTuple):
    """One measurement."""

    section: str
    name: str
    seconds: float  # the time limit
    rows: Callable[[], list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--sections", nargs="*")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if arguments.rehearse:  # compiles faster
        os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    first, *others = (rehearsal if arguments.rehearse else cases)(arguments.data)
    wanted = [case for case in others if not arguments.sections or case.section in arguments.sections]
    sys.exit(work([first, *wanted], arguments.start))


def work(cases: list[Case], start: int) -> int:
    """Runs the cases from number `start` on; returns the exit status."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what cases print is not an answer
        print(json.dumps([case[:3] for case in cases]), file=answers, flush=True)
        for case in cases[start:]:
            jax.clear_caches()  # a kernel of another plan has the same name
            try:
                answer = {"rows": case.rows()}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"}
            print(json.dumps(answer), file=answers, flush=True)
            if "error" in answer:
                return 1
    return 0


def cases(data: Path | None) -> list[Case]:
    """Lists the cases: the machine first, then the most important ones."""
    names, dtypes = ("pallas", "triton", "sequential", "associative"), ("float32", "bfloat16")
    shape, classifiers, step = "vim_tiny_stride8", ("Vim-tiny", "attention"), "student, training step"
    inference = itertools.product([("student", 1), ("student", 64), ("Vim-tiny stride 8", 64)], dtypes)
    return [
        make_case("device", 120, device),
        *(make_case("numerics", 150, numerics, problem, "pallas") for problem in ("Vim-tiny", "odd", RECORDED[0])),
        *(make_case("scan", 120, scan, shape, 64, "bfloat16", name) for name in names),
        *(make_case("networks", 180, network, step, 8, "float32", name) for name in ("pallas", "associative")),
        *(make_case("pixels", 90, pixels, name, 1248, 1) for name in classifiers),
        *(make_case("knobs", 60, knob, *key, change) for key in KNOBS for change in changes(*key)),
        *(make_case("distillation", 180, distillation, dtype, data=data) for dtype in dtypes[::-1]),
        *(make_case("scan", 120, scan, shape, 1, "bfloat16", name) for name in names),
        *(make_case("networks", 180, network, step, 16, dtype, "pallas") for dtype in dtypes),
        *(make_case("networks", 90, network, *sizes, dtype, "pallas") for sizes, dtype in inference),
        *(make_case("networks", 90, network, "student", batch, "float32", "associative") for batch in (1, 64)),
        *(make_case("pixels", 90, pixels, name, 1248, 8) for name in classifiers),
        *(make_case("pixels", 90, pixels, name, 224, 64) for name in classifiers),
        *(make_case("numerics", 90, numerics, problem, "pallas") for problem in RECORDED[1:]),
        *(make_case("numerics", 90, numerics, problem, name) for name in names[1:] for problem in ("Vim-tiny", "odd")),
        *(make_case("scan", 120, scan, shape, 64, "float32", name) for name in names),
    ]


def rehearsal(data: Path | None) -> list[Case]:
    """A case of each section in seconds, also on a CPU."""
    return [
        make_case("device", 60, device, rehearse=True),
        make_case("numerics", 60, numerics, "odd", "sequential"),
        make_case("scan", 60, scan, "vmamba_tiny_stage4", 1, "bfloat16", "native", rehearse=True),
        make_case("networks", 60, network, "Vim-tiny stride 8", 1, "bfloat16", "sequential", rehearse=True),
        make_case("pixels", 60, pixels, "Vim-tiny", 32, 1, rehearse=True),
        make_case("knobs", 60, knob, "forward", 1, dict(WINDOW=2, CHUNK=4), rehearse=True),
        make_case("distillation", 100, distillation, "bfloat16", data=data, rehearse=True),
    ]


def make_case(section: str, seconds: float, function: Callable, *arguments: Any, **others: Any) -> Case:
    """A case named after its positional arguments."""
    name = ", ".join(words(x) if isinstance(x, dict) else str(x) for x in arguments)
    return Case(section, name or "versions", seconds, functools.partial(function, *arguments, **others))


def changes(kernel: str, batch: int) -> list[dict]:
    """The changes to try on a kernel, no change first."""
    return [{}, *({name: value} for name, values in KNOBS[kernel, batch].items() for value in values)]


def words(change: dict) -> str:
    """Describes a change of a kernel."""
    return " ".join(f"{name}={value}" for name, value in change.items()) or "as it is"


# ---------------------------------------------------------------------------------------------------------- the machine


def device(rehearse: bool = False) -> list[dict]:
    """The hardware and all versions; an error if there is no GPU and this is no rehearsal."""
    if jax.default_backend() != "gpu" and not rehearse:
        raise SystemError(f"this needs a GPU, and JAX runs on {jax.default_backend()} here; --rehearse tries it out")
    first, driver = jax.devices()[0], Path("/proc/driver/nvidia/version")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=sys.path[0])
    row = {
        "device": first.device_kind,
        "devices": jax.device_count(),
        "memory GB": (first.memory_stats() or {}).get("bytes_limit", 0) / 1e9,
        "platform": first.client.platform_version.replace("\n", " "),
        "driver": driver.read_text().splitlines()[0] if driver.exists() else "unknown",
        "Python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            row[package] = version(package)
    return [row]


# ------------------------------------------------------------------------------------------------------------- the scan


def numerics(problem: str, implementation: str) -> list[dict]:
    """Largest errors of results and gradients, relative to the largest values, and whether two runs agree to the bit.

    Compares float32 with recorded results; or float32 and bfloat16 with "sequential" on the CPU, which computes in
    float32 from the same, rounded inputs.
    """
    cpu, inputs, flags, expected = jax.devices("cpu")[0], *problem_of(problem)
    if reason := IMPLEMENTATIONS.why_unavailable(implementation, canonical(ScanInputs(**inputs))):
        return [{"implementation": implementation, "not measured": reason}]

    def results(inputs: dict, cotangents: tuple, implementation: str) -> dict:
        call = functools.partial(selective_scan, **flags, return_last_state=True, implementation=implementation)
        (y, last_state), pullback = jax.vjp(lambda inputs: call(**inputs), inputs)
        return {"y": y, "last_state": last_state} | pullback(cotangents)[0]

    compiled = jax.jit(results, static_argnums=2)

    def on_cpu(inputs: dict, cotangents: tuple) -> dict:
        exact = jax.tree.map(lambda x: jax.device_put(np.asarray(x, np.float32), cpu), (inputs, cotangents))
        with jax.default_device(cpu):
            return compiled(*exact, "sequential")

    dy = expected.pop("dy") if expected else np.random.default_rng(1).normal(size=inputs["u"].shape).astype(np.float32)
    low_precision = [name for name in ("u", "delta", "z", "B", "C") if name in inputs]
    rounded = inputs | {name: jnp.asarray(inputs[name], jnp.bfloat16) for name in low_precision}
    d_last_state = np.full((len(dy), *inputs["A"].shape), 0.0 if expected else 0.1, np.float32)
    row = {"problem": problem, "implementation": implementation}
    for dtype, given in [("float32", inputs), ("bfloat16", rounded)][: 1 if expected else 2]:
        cotangents = jnp.asarray(dy, dtype), d_last_state
        actual, again = (compiled(given, cotangents, implementation) for _ in range(2))
        wanted = expected or on_cpu(given, cotangents)
        errors = {name: golden.relative_error(actual[name], wanted[name]) for name in wanted}
        worst = max(errors.keys() - {"y", "last_state"}, key=errors.get)
        row |= {f"{dtype}: {name}": errors[name] for name in ("y", "last_state")}
        row |= {f"{dtype}: gradients": errors[worst], f"{dtype}: worst": worst}
        same = [np.array_equal(actual[name], again[name]) for name in actual]
        row[f"{dtype}: same bits"] = "yes" if all(same) else "no"
    return [row]


def problem_of(name: str) -> tuple[dict, dict, dict]:
    """Inputs, flags, and the recorded results and gradients, if there are any."""
    if name in RECORDED:
        inputs, results, gradients = golden.scan_case(name)
        return inputs, {"delta_softplus": golden.meta(name)["constructor"]["delta_softplus"]}, results | gradients
    shape, batch = (SHAPES["vim_tiny_stride8"], 2) if name == "Vim-tiny" else (Shape(61, 3 * 40, 5, groups=3), 3)
    inputs, flags = benchmark_scan.make_inputs(shape, batch, jnp.float32), {"delta_softplus": True}
    if name == "odd":
        state = np.random.default_rng(0).normal(size=(batch, shape.channels, shape.state))
        inputs["initial_state"], flags["reverse"] = jnp.asarray(state, jnp.float32), True
    return inputs, flags, {}


def scan(shape: str, batch: int, dtype: str, implementation: str, rehearse: bool = False) -> list[dict]:
    """Runs scripts/benchmark_scan.py for each implementation alone."""
    sizes, kind = SHAPES[shape], jnp.dtype(dtype)
    inputs = benchmark_scan.make_inputs(sizes, batch, kind)
    if reason := IMPLEMENTATIONS.why_unavailable(implementation, canonical(ScanInputs(**inputs))):
        return [{"implementation": implementation, "not measured": reason}]
    rates = dict.fromkeys(("bytes", "exponentials"), 1e12)
    if not rehearse:
        rates["bytes"] = benchmark_scan.measure_bytes(sizes, batch, kind)
        rates["exponentials"] = benchmark_scan.measure_exponentials()
    row = {"shape": shape, "batch": batch, "dtype": dtype, "implementation": implementation}
    (measured,) = benchmark_scan.measure(sizes, batch, kind, [implementation], 1 if rehearse else 9, rates)
    for name in ("forward", "both"):
        row[f"{name}: ms"] = measured[name]["milliseconds"]
        row[f"{name}: of the floor"] = measured[name]["floor"]
        row[f"{name}: memory MB"] = measured[name]["memory"] / 1e6
    return [row | {"10⁹ bytes/s": rates["bytes"] / 1e9, "10⁹ exp/s": rates["exponentials"] / 1e9}]


def knob(kernel: str, batch: int, change: dict, rehearse: bool = False) -> list[dict]:
    """Milliseconds of a Pallas kernel with one change.

    They are the mean of many dependent calls in one program, without the latency of reaching the device.
    """
    shape, calls = (Shape(7, 4, 2), 2) if rehearse else (SHAPES["vim_tiny_stride8"], 30)
    inputs, function = benchmark_scan.make_inputs(shape, batch, jnp.bfloat16), knob_function(kernel, rehearse)

    @jax.jit
    def repeated(inputs: dict) -> jax.Array:
        def call(_, bias: jax.Array) -> jax.Array:
            results = jax.lax.optimization_barrier(function(inputs | {"delta_bias": bias}))
            return bias + 0 * sum(x.ravel()[0].astype(jnp.float32) for x in jax.tree.leaves(results))

        return jax.lax.fori_loop(0, calls, call, inputs["delta_bias"])

    with changed(kernel, change):
        milliseconds = 1e3 * benchmark_scan.best_time(repeated, inputs) / calls
    return [{"kernel": kernel, "batch": batch, "change": words(change), "ms": milliseconds}]


def knob_function(kernel: str, interpret: bool = False) -> Callable[[dict], Any]:
    """A kernel as a function of a scan's inputs; the backward kernel gets zeros as saved states, to compile less."""
    options = ScanOptions(True, False, interpret)

    def forward(inputs: dict) -> dict:
        return pallas.forward(pallas.pad(canonical(ScanInputs(**inputs)), options), options, save_states=False)

    def backward(inputs: dict) -> ScanInputs:
        padded = pallas.pad(canonical(ScanInputs(**inputs)), options)
        given = jax.eval_shape(lambda: pallas.forward(padded, options, save_states=True))
        states, y, last_state = (jnp.zeros(given[x].shape, given[x].dtype) for x in ("states", "y", "last_state"))
        return pallas.backward(padded, states, y + 1, last_state, options)

    return forward if kernel == "forward" else backward


@contextlib.contextmanager
def changed(kernel: str, change: dict) -> Iterator[None]:
    """A context in which a kernel's plan or the module's constants are changed."""
    plan = {name: change.get(name, value) for name, value in PLANS[kernel].items()}
    constants = {name: value for name, value in change.items() if name not in plan}
    plans = {f"{kernel}_plan": functools.partial(pallas.Plan.create, **plan)}
    with mock.patch.multiple(pallas, **plans, **constants):
        yield


# ------------------------------------------------------------------------------------------------------------- networks


def network(name: str, batch: int, dtype: str, implementation: str, rehearse: bool = False) -> list[dict]:
    """As scripts/benchmark_model.py: inference, or a training step by the paper's recipe."""
    repeats, options = (1, TINY) if rehearse else (9, {})
    row = benchmark_model.NETWORKS[name](implementation, batch, repeats, dtype=dtype, **options)
    return [{"network": name, "batch": batch, "dtype": dtype, "implementation": implementation} | figures(row)]


def pixels(name: str, size: int, batch: int, rehearse: bool = False) -> list[dict]:
    """Inference of Vim-tiny, or of an attention network of the same size, on large images."""
    model = benchmark_model.networks_of_size(size)[name]
    if rehearse:
        model = model.clone(depth=1)
    row = benchmark_model.inference(model, size, batch, 1 if rehearse else 9)
    return [{"network": name, "pixels": size, "batch": batch} | figures(row)]


def figures(row: dict) -> dict:
    seconds = row["seconds"]
    return {"ms": 1e3 * seconds, "images/s": row["images"] / seconds, "memory MB": row["memory"] / 1e6}


def distillation(dtype: str, data: Path | None, rehearse: bool = False) -> list[dict]:
    """Trains SR network, teacher and student for a few epochs: configs/small.py on photographs, or the quickstart."""
    config, rows = (small if data else quickstart).get_config(), []
    if data:
        config.directory = str(data.absolute())
    with tempfile.TemporaryDirectory() as folder:
        for stage, workdir in stages(config, Path(folder))[slice(1, 2) if rehearse else slice(None)]:
            workdir.mkdir(parents=True)  # the next stage finds its weights from here
            shorten(stage, dtype, rehearse)
            train(stage, workdir)
            lines = read_metrics(workdir)
            steps = [line["metrics"] for line in lines if line["split"] == "train"]
            row = {"stage": stage.stage, "dtype": dtype, "images": "photographs" if data else "synthetic"}
            row |= {"steps": lines[-1]["step"], "loss at first": steps[0]["loss"], "at last": steps[-1]["loss"]}
            row |= {name.replace("_", " "): steps[-1][name] for name in ("images_per_second", "input_wait")}
            score = "psnr" if stage.stage == "sr" else "top1"
            rows.append(row | {score: lines[-1]["metrics"].get(score)})
    return rows


def shorten(stage: Any, dtype: str, rehearse: bool = False) -> None:
    """Shortens a stage to a few epochs."""
    stage.batch_size, stage.log_every_steps, stage.schedule.warmup_epochs = 32, 10, 1
    stage.schedule.num_epochs = stage.eval_every_epochs = 2 if stage.stage == "sr" else 4
    stage.dataset.num_workers = 0 if rehearse else min(4, os.cpu_count())
    for role in STAGES[stage.stage]:
        if role != "sr":
            stage[role].dtype = dtype
    if rehearse:
        stage.batch_size, stage.log_every_steps = 2, 1
        stage.schedule.num_epochs, stage.schedule.warmup_epochs = 1, 0
        stage.dataset.synthetic_train_size, stage.dataset.synthetic_test_size = 8, 2
        stage.dataset.validation_fraction, stage.eval_batch_size = 0.5, 2
        stage.dataset.high_resolution, stage.dataset.low_resolution = 16, 4
        for role in STAGES[stage.stage]:
            stage[role].update({"channels": 4, "num_blocks": 1} if role == "sr" else TINY)


if __name__ == "__main__":
    main()
