"""Imports go one way, kernels <- models <- checkpoints <- weight_convert <- programs; and importing is quick."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What the modules of a package may import of ours. Longer prefixes go before shorter ones.
ALLOWED = {
    "kernels": ["kernels"],
    "weight_convert": [
        "weight_convert",
        "vimd_jax.models",
        "vimd_jax.checkpoints",
        "vimd_jax.arguments",
        "vimd_jax.errors",
        "vimd_jax.files",
    ],
    "vimd_jax.models": ["kernels", "vimd_jax.models"],
    "vimd_jax.losses": [],
    "vimd_jax.drawing": [],
    "vimd_jax.data": ["vimd_jax.arguments", "vimd_jax.data", "vimd_jax.errors", "vimd_jax.files", "vimd_jax.log"],
    "vimd_jax.checkpoints": [
        "vimd_jax.models",
        "vimd_jax.checkpoints",
        "vimd_jax.data.images",
        "vimd_jax.data.preparation",
        "vimd_jax.errors",
        "vimd_jax.files",
    ],
    "vimd_jax.settings": [],
    "vimd_jax.tasks": [
        "vimd_jax.models",
        "vimd_jax.drawing",
        "vimd_jax.errors",
        "vimd_jax.losses",
        "vimd_jax.settings",
        "vimd_jax.tasks",
        "vimd_jax.data.classes",
        "vimd_jax.data.geometry",
        "vimd_jax.data.sources",
    ],
    "vimd_jax.config": ["kernels", "vimd_jax.models", "vimd_jax.settings", "vimd_jax.tasks"],
    "vimd_jax.training": ["kernels", "vimd_jax", "weight_convert.hub"],
}
PROGRAMS = ("vimd_jax.train", "vimd_jax.evaluate", "vimd_jax.predict", "vimd_jax.export")


def modules() -> dict[str, Path]:
    files = [path for package in ("kernels", "vimd_jax", "weight_convert") for path in (ROOT / package).rglob("*.py")]
    names = {path: path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imported_by(path: Path) -> set[str]:
    """Our modules that a file imports, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        else:
            continue
        found |= {name for name in names if name.split(".")[0] in ("kernels", "vimd_jax", "weight_convert")}
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package):
    of_package = {name: path for name, path in modules().items() if f"{name}.".startswith(f"{package}.")}
    assert of_package
    for name, path in of_package.items():
        for other in imported_by(path):
            allowed = any(f"{other}.".startswith(f"{prefix}.") for prefix in ALLOWED[package])
            assert allowed, f"{name} imports {other}"
            assert not any(f"{other}.".startswith(f"{program}.") for program in PROGRAMS), f"{name} imports {other}"


def test_no_module_imports_itself_through_others():
    """Imports inside of functions count: a circle that runs through one is a circle all the same."""
    known = modules()

    def module(name: str) -> str:
        return name if name in known else name.rpartition(".")[0]  # of an object in a module

    graph = {name: {module(other) for other in imported_by(path)} - {name} for name, path in known.items()}
    assert set().union(*graph.values()) <= set(known)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_only_training_and_programs_know_a_config():
    for name, path in modules().items():
        knows = any(f"{other}.".startswith("vimd_jax.config.") for other in imported_by(path))
        assert not knows or name in PROGRAMS or name.startswith("vimd_jax.training"), name


def test_only_programs_know_the_experiments():
    users = {name for name, path in modules().items() if any("vimd_jax.configs" in x for x in imported_by(path))}
    assert users == {"vimd_jax.command", "vimd_jax.search"}


def test_using_a_network_needs_no_training_libraries():
    code = "import sys, vimd_jax, vimd_jax.predict; from vimd_jax import load_model; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    packages = {name.split(".")[0] for name in loaded.split()}
    unwanted = ("grain", "orbax", "tensorstore", "tensorboardX", "matplotlib", "optax", "ml_collections")
    assert not packages & {*unwanted, "torch", "tensorflow"}
    assert "jax" in packages


def test_training_starts_without_matplotlib():
    """Which a user's settings, such as the MPLBACKEND of a notebook, can keep from being imported."""
    code = "import sys, vimd_jax.train; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
