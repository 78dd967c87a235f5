"""The folder of a run: which settings and data it belongs to, and which folder each stage of a config gets."""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vimd_jax.checkpoints.description import read_description
from vimd_jax.checkpoints.format import folder_of
from vimd_jax.config import STAGES, default_config, settings
from vimd_jax.data.sources import Source, Splits
from vimd_jax.errors import DatasetError
from vimd_jax.files import read_regular, replace_file
from vimd_jax.training import lock, parallel
from weight_convert.hub import is_name, published

log = logging.getLogger(__name__)

HERE = "{workdir}"  # in the `init` of a network: the folder of the stage, so that one stage can name another's

_LENGTH = "config.schedule.num_epochs"
_MOST_BYTES = 2**28  # of a file in the folder


def stages(
    config: ConfigDict, workdir: Path, given: Callable[[str], bool] = lambda field: False
) -> list[tuple[ConfigDict, Path]]:
    """The stages of a config with their folders: one, or for a config with `order` and `stages` several in a row.

    Args:
      config: of one stage or several.
      workdir: the folder of all.
      given: whether the command line sets a field, see `_as_published`.
    """
    if "order" in config:
        return [pair for name in config.order for pair in stages(config.stages[name], workdir / name, given)]
    config = config.copy_and_resolve_references()
    for role in STAGES[config.stage]:
        init = config[role].init
        if init and not init.startswith(HERE) and not is_name(init):
            config[role].init = str(Path(init).expanduser().absolute())
    if config.continue_from:
        config.continue_from = str(Path(config.continue_from).expanduser().absolute())
    _as_published(config, given)
    return [(config, workdir.expanduser().absolute())]


def _as_published(config: ConfigDict, given: Callable[[str], bool]) -> None:
    """Where networks start from `pretrained` weights, sets how these saw images, unless the user has said it.

    A frozen network that a run has trained sees them as it did there.
    """
    stage, default = STAGES[config.stage], settings(config.stage)["dataset.eval_crop"].default
    for role in stage:
        section, changed = config[role], []
        entry = published(section.init, section.name)
        options = entry.options if entry else {}
        if role != stage.trained and (folder_of(Path(section.init)) / "network.json").is_file():
            options = read_description(folder_of(Path(section.init)))["options"]
        if options.get("input_normalization") and section.input_normalization is None:
            section.input_normalization = True
            changed.append(f"config.{role}.input_normalization is True")
        keeps_crop = role != stage.trained or stage.task.maps or given("dataset.eval_crop")
        if entry and not keeps_crop and config.dataset.eval_crop == default != entry.crop:
            config.dataset.eval_crop = entry.crop
            changed.append(f"config.dataset.eval_crop is {entry.crop:g}")
        if changed:
            log.info("%s, as for %s; set it to differ.", " and ".join(changed), entry.file if entry else section.init)


def init_source(config: ConfigDict, role: str, workdir: Path) -> str:
    """Where the weights of a network come from, a path or a name; empty: from scratch."""
    return config[role].init.replace(HERE, str(workdir.absolute()))


@contextlib.contextmanager
def naming_the_stage(config: ConfigDict, count: int) -> Iterator[None]:
    """A context whose errors name the stage, where there are several."""
    try:
        yield
    except (ValueError, OSError, DatasetError) as error:
        raise ValueError(f"stage {config.stage}: {error}" if count > 1 else str(error)) from error


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other processes from training in the same folder.

    Raises:
      ValueError: another process is already training there.
    """
    if not parallel.is_first():
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with lock.hold(workdir):
        yield


def check(workdir: Path, config: ConfigDict, data: Splits) -> None:
    """Raises ValueError if the folder cannot be used, or belongs to a run with other settings, classes or images."""
    if any(character in str(workdir.resolve()) for character in "[]\\"):
        raise ValueError(f"--workdir: checkpoints in {workdir} could not be read again; use no [, ] or \\ in the path.")
    if not is_begun(workdir):
        return
    for name in ("config.json", "data.json"):
        if not (workdir / name).is_file():
            raise ValueError(
                f"{workdir} holds checkpoints, but its {name} is gone, so what they are of is not known: put it back, "
                "or choose another --workdir."
            )
    now, then = flat(_as_json(config)), flat(_as_json(read_config(workdir)))
    keys = sorted(now.keys() | then.keys())
    fixed = [key for key in keys if not (key.endswith(".init") or _is_changeable(config.stage, key))]
    differences = [
        f"config.{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in fixed if now.get(key) != then.get(key)
    ]
    if differences:
        longer = f" To train on, add --config.continue_from={workdir}." if _LENGTH in "".join(differences) else ""
        raise ValueError(
            f"{workdir} belongs to another run: {'; '.join(differences)}. Choose another --workdir.{longer}"
        )
    start = f"{STAGES[config.stage].trained}.init"
    if now[start] != then[start]:
        log.info("%s began with config.%s=%s, which is not read again.", workdir, start, then[start])
    known, found = _read_data(workdir), fingerprint(data)
    for split in found:
        if known.get(split) != found[split]:
            change = _change(known.get(split, {}), found[split])
            raise ValueError(
                f"{workdir} was trained on other images: of the {split} images, {change}. Restore the data, or choose "
                "another --workdir."
            )


def check_frozen(workdir: Path, config: ConfigDict, known: dict[str, str], found: dict[str, str]) -> None:
    """Raises ValueError if a frozen network has other weights than when the run began, wherever they lie now.

    Args:
      workdir: of the run.
      config: of the stage.
      known: checksums by role from a checkpoint; {} in one of an earlier version.
      found: the same of the networks that are there now.
    """
    for role in known.keys() & found.keys():
        if known[role] != found[role]:
            raise ValueError(
                f"config.{role}.init: {config[role].init} holds another network than the one that {workdir} was "
                f"trained with (checksum {found[role][:16]}, was {known[role][:16]}): put that back, or choose another "
                "--workdir."
            )


def check_continue_from(config: ConfigDict, names: Sequence[str]) -> None:
    """Raises ValueError if config.continue_from names no run with a checkpoint, or one of other classes."""
    if not config.continue_from:
        return
    workdir = Path(config.continue_from).expanduser()
    if not is_begun(workdir):
        raise ValueError(f"config.continue_from: {workdir} is no workdir with a checkpoint.")
    known = [name for name in _read_data(workdir).get("train", {}) if name]
    if names and known != list(names):
        change = _change(dict.fromkeys(known, []), dict.fromkeys(names, []))
        raise ValueError(f"config.continue_from: {workdir} was trained on other classes: {change}.")


def identity(config: ConfigDict, data: Splits) -> str:
    """A short text that is the same for processes with the same settings and data."""
    fixed = {k: v for k, v in flat(_as_json(config)).items() if not _is_changeable(config.stage, k)}
    fixed = {k: v for k, v in fixed.items() if not k.endswith(".init")}
    text = json.dumps([fixed, fingerprint(data)], sort_keys=True)
    return f"settings and data {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _is_changeable(stage: str, field: str) -> bool:
    setting = settings(stage).get(field)
    return setting is not None and setting.changeable


def fingerprint(data: Splits) -> dict[str, dict[str, list[Any]]]:
    """Split → class → number of images and a hash of their names, which a run must find again when it continues.

    Images without a class of their own are counted under the name "".
    """
    return {split: _fingerprint(source) for split, source in data._asdict().items()}


def _fingerprint(source: Source) -> dict[str, list[Any]]:
    keys: dict[str, list[str]] = {name: [] for name in source.class_names}
    if source.labels is None:
        keys |= {"": [source.key(i) for i in range(len(source))]}
    else:
        for i, label in enumerate(source.labels):
            keys[source.class_names[label]].append(source.key(i))
    return {name: [len(of), hashlib.sha256("\n".join(of).encode()).hexdigest()[:16]] for name, of in keys.items()}


def _change(known: dict[str, list[Any]], found: dict[str, list[Any]]) -> str:
    """The first difference between two fingerprints of a split, in words."""
    if list(known) != list(found):
        other = sorted(set(known) ^ set(found))
        return f"class {other[0]!r} is new or gone" if other else "the classes have another order"
    name = next(name for name in known if known[name] != found[name])
    counts = known[name][0], found[name][0]
    number = f"has {counts[1]} where it had {counts[0]}" if counts[0] != counts[1] else "has files of other names"
    return f"class {name!r} {number}"


def claim(workdir: Path, config: ConfigDict, data: Splits) -> None:
    """Writes config.json, classes.txt and data.json into the folder, in place of a run without a checkpoint."""
    if is_begun(workdir) or not parallel.is_first():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    set_aside(workdir / "best")
    (workdir / "metrics.jsonl").unlink(missing_ok=True)
    replace_file(workdir / "classes.txt", "".join(f"{name}\n" for name in data.train.class_names).encode())
    replace_file(workdir / "data.json", json.dumps(fingerprint(data)).encode())
    replace_file(workdir / "config.json", json.dumps(_as_json(config), indent=2).encode())


def set_aside(folder: Path) -> None:
    """Renames a folder that another one is to replace, since it may be all that is left of a run."""
    if not folder.exists():
        return
    aside = folder.with_name(f"{folder.name}-before")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    log.info("%s is of before and is now %s.", folder, aside)


def is_begun(workdir: Path) -> bool:
    """Whether the folder is that of a run that has saved a checkpoint; until then another run may claim it."""
    return any(path.name.isdigit() for path in workdir.glob("checkpoints/*"))


def read_config(workdir: Path) -> ConfigDict:
    """The settings of the run in a workdir; fields that did not exist when it began have their defaults.

    Raises:
      FileNotFoundError: the folder holds no run.
      ValueError: config.json is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{workdir} is not a workdir of vimd_jax.train: it holds no config.json.")
    stored = _read_json(path)
    try:
        config = default_config(stored.get("stage"))
        with config.unlocked():
            config.update(stored)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # of ml_collections
        raise ValueError(f"{path} is damaged ({error}): choose another --workdir.") from error
    return config


def _read_data(workdir: Path) -> dict[str, dict[str, list[Any]]]:
    """The `fingerprint` of the data when the run began; raises ValueError if data.json is damaged."""
    path = workdir / "data.json"
    content = _read_json(path)
    for classes in content.values():
        if not isinstance(classes, dict) or not all(isinstance(x, list) and len(x) == 2 for x in classes.values()):
            raise ValueError(f"{path} is damaged (it does not count images): choose another --workdir.")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or gone ({error}): choose another --workdir.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it is no table of settings): choose another --workdir.")
    return content


def _as_json(config: ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json())


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, under dotted names."""
    fields: dict[str, Any] = {}
    for key, value in tree.items():
        fields |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return fields
