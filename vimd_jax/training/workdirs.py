"""The folder of a run: which config it belongs to, and which folder each stage of a config gets."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vimd_jax.config import CHANGEABLE, STAGES, default_config
from vimd_jax.data.images import DatasetError


def stages(config: ConfigDict, workdir: Path) -> list[tuple[ConfigDict, Path]]:
    """The stages of a config with their folders: one, or for a config with `order` and `stages` several in a row.

    "{workdir}" in the `init` of a network stands for the folder of its stage, so that one stage can name another's.
    """
    if "order" in config:
        return [pair for name in config.order for pair in stages(config.stages[name], workdir / name)]
    config = config.copy_and_resolve_references()
    for role in STAGES[config.stage]:
        config[role].init = config[role].init.replace("{workdir}", str(workdir))
    return [(config, workdir)]


@contextlib.contextmanager
def naming_the_stage(config: ConfigDict, count: int) -> Iterator[None]:
    """Errors of one of several stages say in which one they are."""
    try:
        yield
    except (ValueError, OSError, DatasetError) as error:
        raise ValueError(f"stage {config.stage}: {error}" if count > 1 else str(error)) from error


def check(workdir: Path, config: ConfigDict, class_names: tuple[str, ...]) -> None:
    """Raises ValueError, which lists the differences, if the folder belongs to a run with other settings or classes."""
    if not is_workdir(workdir):
        return
    now, then = _flat(_as_json(config)), _flat(_as_json(read_config(workdir)))
    changed = [key for key in sorted(now.keys() | then.keys()) if now.get(key) != then.get(key)]
    differences = [
        f"config.{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in changed if key not in CHANGEABLE
    ]
    if differences:
        raise ValueError(f"{workdir} belongs to another run: {'; '.join(differences)}. Choose another --workdir.")
    if tuple((workdir / "classes.txt").read_text().splitlines()) != class_names:
        raise ValueError(f"{workdir} was trained on other classes (classes.txt). Choose another --workdir.")


def claim(workdir: Path, config: ConfigDict, class_names: tuple[str, ...]) -> None:
    """Writes config.json and classes.txt into the folder, unless they are there."""
    if is_workdir(workdir) or jax.process_index() != 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "classes.txt").write_text("".join(f"{name}\n" for name in class_names))
    (workdir / "config.json").write_text(json.dumps(_as_json(config), indent=2) + "\n")


def is_workdir(path: Path) -> bool:
    """Whether the folder is that of a run."""
    return (path / "config.json").is_file()


def read_config(workdir: Path) -> ConfigDict:
    """The settings of the run in a workdir; fields that did not exist when it began have their defaults.

    Raises:
      FileNotFoundError: the folder holds no run.
      ValueError: config.json is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{workdir} is not a workdir of vimd_jax.train: it holds no config.json.")
    stored = json.loads(path.read_text())
    config = default_config(stored.get("stage"))
    with config.unlocked():
        config.update(stored)
    return config


def _as_json(config: ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json())


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
