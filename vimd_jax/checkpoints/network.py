"""The one format of a network on disk, which says what it holds. A run's best/, a conversion and an export write it.

    DIR/network.json                    architecture, options, class names, view, provenance, checksum
    DIR/variables-<checksum>.safetensors

network.json is replaced in one step and names its variables, so whoever reads finds the old network or the new one.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save

from vimd_jax.data.images import DatasetError, find_images, read_image
from vimd_jax.data.transforms import eval_view, low_resolution_view
from vimd_jax.models import create_model, describe
from vimd_jax.models.network import square, variable_shapes

FORMAT = "vimd_jax network 1"


class CheckpointError(ValueError):
    """A file that cannot be read; the one-line message names it and says what to do."""


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A network with all that is needed to use it.

    Attributes:
      model: the Flax module.
      variables: as `model.init` returns them, NumPy arrays.
      class_names: in the order of the logits; empty for a super-resolution network.
      low_resolution: side in pixels of the images that it restores first; 0 if it reads images as they are.
      crop: share of the short side of an image that it was evaluated on.
      provenance: where it comes from, JSON values.
    """

    model: nn.Module
    variables: dict[str, Any]
    class_names: tuple[str, ...] = ()
    low_resolution: int = 0
    crop: float = 1.0
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def image_size(self) -> int | tuple[int, int] | None:
        """Side, or (height, width), in pixels of the images that are classified; None for an SR network."""
        return getattr(getattr(self.model, "classifier", self.model), "image_size", None)

    def predict(
        self,
        images: jax.Array | np.ndarray | str | Path | Sequence[str | Path],
        *,
        downsample: bool = False,
        batch_size: int = 32,
    ) -> np.ndarray:
        """Class probabilities.

        Args:
          images: (batch, height, width, 3) in [0, 1], as the network reads them; or a file, a folder, or several of
            these, whose images are then in the order of `find_images`.
          downsample: also take files of another size than a student reads, by resizing and cropping them.
          batch_size: images at a time.

        Returns:
          (images, classes) float32.

        Raises:
          ValueError, FileNotFoundError, DatasetError: no classifier, no image, or one that cannot be read.
        """
        if not self.class_names:
            raise ValueError("This is a super-resolution network, which has no classes: load a classifier.")
        if isinstance(images, str | Path) or (isinstance(images, Sequence) and not hasattr(images, "shape")):
            paths = find_images([Path(p) for p in ([images] if isinstance(images, str | Path) else images)])
            images = np.array([self.prepare(path, downsample) for path in paths])
        if len(images) == 0:
            raise ValueError("There are no images to label.")
        size = min(batch_size, len(images))
        return np.concatenate([self.probabilities(images[i : i + size], size) for i in range(0, len(images), size)])

    def prepare(self, path: Path, downsample: bool = False) -> np.ndarray:
        """The image of a file as the network reads it, (height, width, 3) float32 in [0, 1].

        Raises:
          DatasetError: the file cannot be read, or has another size than a student reads and `downsample` is off.
        """
        image, low = read_image(path), self.low_resolution
        if not low or image.size != (low, low):
            if low and not downsample:
                raise DatasetError(
                    f"{path}: {image.width}x{image.height} pixels, but this network reads {low}x{low}; "
                    "add --downsample (downsample=True) to resize and crop it"
                )
            height, width = square(self.image_size)
            if height != width:
                raise DatasetError(f"{path}: this network reads {width}x{height} pixels, but files are cut to squares")
            image = eval_view(image, height, self.crop)
            image = low_resolution_view(image, low) if low else image
        return np.asarray(image, np.float32) / 255

    def probabilities(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        """Class probabilities of at most `batch_size` arrays; fewer are padded, so that one size is compiled."""
        padded = np.pad(images, [(0, batch_size - len(images)), (0, 0), (0, 0), (0, 0)])
        result = np.asarray(self._classify(padded))[: len(images)]
        if not np.all(np.isfinite(result)):
            raise ValueError("The outputs of the network are not finite: its weights are ruined, or the images are.")
        return result

    @functools.cached_property
    def _classify(self) -> Callable[[np.ndarray], jax.Array]:
        classify = jax.jit(lambda variables, images: jax.nn.softmax(self.model.apply(variables, images)))
        return functools.partial(classify, jax.device_put(self.variables))


def save_model(folder: Path, trained: TrainedModel) -> str:
    """Writes a network into a folder, in place of the one that is there; returns the checksum of its variables.

    A failure leaves the folder as it was.

    Raises:
      CheckpointError: a value is not finite.
      OSError: the folder cannot be written.
    """
    leaves = {path: np.ascontiguousarray(leaf) for path, leaf in flatten_dict(trained.variables, sep="/").items()}
    check_finite(leaves, f"the network for {folder}")
    checksum = checksum_of(trained.variables)
    content = {
        "format": FORMAT,
        **describe(trained.model),
        "class_names": list(trained.class_names),
        "view": {"low_resolution": trained.low_resolution, "crop": trained.crop},
        "provenance": trained.provenance,
        "variables": f"variables-{checksum[:16]}.safetensors",
        "checksum": checksum,
    }
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    variables, description = folder / content["variables"], folder / "network.json"
    try:
        replace_file(variables, save(leaves))
        replace_file(description, (json.dumps(content, indent=2) + "\n").encode())
    except BaseException:
        if not (description.exists() and variables.name in description.read_text()):
            variables.unlink(missing_ok=True)
            if is_new:
                folder.rmdir()
        raise
    for old in folder.glob("*variables-*"):  # the last network's, and what a killed process left
        if old.name != content["variables"]:
            old.unlink()
    return checksum


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file in one step, so that whoever reads finds the old content or the new."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def load_model(
    path: str | Path,
    architecture: str | None = None,
    *,
    options: dict[str, Any] | None = None,
    class_names: Iterable[str] | None = None,
    key: str | None = None,
) -> TrainedModel:
    """A network to use: from the workdir of a run, a converted or exported folder, or a PyTorch file.

    Args:
      path: the folder, or a `.pth` or `.safetensors` file.
      architecture: what a PyTorch file holds, one of `list_models()`. A folder knows it.
      options: of that architecture, where they differ from its own.
      class_names: for a file or folder that names none.
      key: the entry of a PyTorch file, e.g. "model_ema".

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: what is there cannot be read (`CheckpointError`), or does not fit what is asked for.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such workdir, converted checkpoint or PyTorch file")
    if path.is_file():
        if not architecture:
            raise ValueError(f"{path} does not say which network it holds: name its architecture (--model)")
        from weight_convert import load_torch_model  # only who hands over a PyTorch file needs the reader

        trained = load_torch_model(path, architecture, options or {}, key)
    else:
        if architecture or options:
            raise ValueError(f"{path} knows its network: leave out the architecture (--model) and the options")
        trained = _read(path / "best" if (path / "best").is_dir() else path)
    if class_names is None:
        return trained
    names, expected = tuple(class_names), len(trained.class_names)
    if len(names) != expected:
        raise ValueError(f"{len(names)} class names were given, but {path} has {expected} classes")
    return dataclasses.replace(trained, class_names=names)


def _read(folder: Path) -> TrainedModel:
    content = read_description(folder)
    try:
        model = create_model(content["architecture"], **content["options"])
        names, provenance = tuple(content["class_names"]), content["provenance"]
        low_resolution, crop = content["view"]["low_resolution"], content["view"]["crop"]
        checksum = content["checksum"]
        leaves = load_file(folder / content["variables"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/network.json is incomplete ({error}): write the checkpoint anew") from error
    except Exception as error:  # an option that is not valid, a file that is not there or damaged
        raise CheckpointError(f"{folder} is damaged ({' '.join(str(error).split())}): write it anew") from error
    variables = unflatten_dict(leaves, sep="/")
    if checksum_of(variables) != checksum:
        raise CheckpointError(f"{folder}/{content['variables']} is damaged, its checksum differs: write it anew")
    shapes = {path: leaf.shape for path, leaf in variable_shapes(model).items()}
    if shapes != {path: leaf.shape for path, leaf in leaves.items()}:
        raise CheckpointError(f"{folder}: network.json describes another network than its variables are of")
    classes = getattr(getattr(model, "classifier", model), "num_classes", 0)
    if len(names) != classes:
        raise CheckpointError(f"{folder}: network.json names {len(names)} classes, but the network has {classes}")
    return TrainedModel(model, variables, names, low_resolution, crop, provenance)


def read_description(folder: Path) -> dict[str, Any]:
    """The content of network.json.

    Raises:
      FileNotFoundError: the folder holds no network.
      CheckpointError: network.json is damaged, or was written by another version.
    """
    path = folder / "network.json"
    if not path.exists():
        old = (folder / "provenance.json").exists() or any(p.name.isdigit() for p in folder.iterdir())
        advice = "it is of an earlier version, train or convert again" if old else "train or convert one first"
        raise FileNotFoundError(f"{folder} holds no network (no network.json): {advice}")
    try:
        content = json.loads(path.read_text())
        found = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: write the checkpoint anew") from error
    if found != FORMAT:
        raise CheckpointError(f"{path} has the format {found!r}, but this version reads {FORMAT!r}")
    return content


def check_finite(leaves: dict[str, np.ndarray], what: str) -> None:
    """Raises CheckpointError unless all numbers are finite: nothing that is ruined is saved."""
    for path, leaf in leaves.items():
        if not np.all(np.isfinite(leaf)):
            raise CheckpointError(f"{path} of {what} is not finite everywhere, so nothing was saved.")


def checksum_of(variables: dict[str, Any]) -> str:
    """SHA-256 over path, shape, dtype and bytes of every leaf, in the order of the paths."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(variables, sep="/").items()):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{path} {leaf.shape} {leaf.dtype}\n".encode())
        digest.update(leaf)
    return digest.hexdigest()
