"""Publishing a trained network on the Hugging Face Hub, from where `load_model("hf://owner/name")` reads it."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax

from vimd_jax.checkpoints.description import read_description
from vimd_jax.checkpoints.format import folder_of, read_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.models import describe
from vimd_jax.models.network import square
from weight_convert.hub import push

_CARD = """---
library_name: vimd_jax
pipeline_tag: {task}
tags:
- {architecture}
---

# {title}

{sentence}

```python
from vimd_jax import load_model

network = load_model("hf://{title}")
{use}
```

| | |
|---|---|
| architecture | `{architecture}` |
| parameters | {parameters:,} |
| images | {images} |
| classes | {classes} |

## Origin

```json
{provenance}
```

## Classes

```json
{names}
```
"""


def publish(checkpoint: Path, repository: str, exported: Sequence[Path] = (), private: bool = False) -> str:
    """Uploads a checkpoint, files that were exported from it, and a model card; returns the address of the page.

    Args:
      checkpoint: workdir of a run, or converted checkpoint.
      repository: owner/name; made if it is not there.
      exported: further files, which keep their names.
      private: whether a repository that is made is for its owner alone.

    Raises:
      FileNotFoundError, ValueError: the checkpoint cannot be read, or the Hub cannot be reached or refuses.
    """
    folder = folder_of(checkpoint)
    card = model_card(read_model(folder), repository).encode()
    own = (folder / "network.json", folder / read_description(folder)["variables"])
    return push(repository, {"README.md": card} | {path.name: path for path in (*own, *exported)}, private)


def model_card(trained: TrainedModel, repository: str) -> str:
    """The README.md of a repository, from what the checkpoint says. Names and values from it stand in JSON only."""
    if trained.model.dense:
        task, sentence = "image-segmentation", "It gives every pixel of an image a class."
        use = f"# label maps: vimd-predict --checkpoint hf://{repository} --output maps IMAGE"
    elif trained.class_names:
        task, sentence = "image-classification", "It gives an image a class."
        use = 'probabilities = network.predict("image.jpg"' + (", downsample=True)" if trained.low_resolution else ")")
    else:
        task, sentence = "image-to-image", "It restores images of low resolution."
        use = "restored = network.model.apply(network.variables, images)  # (B, H, W, 3) in [0, 1]"
    values = {name: x for name, x in trained.provenance.items() if isinstance(x, str | int | float)}
    return _CARD.format(
        task=task,
        sentence=sentence,
        use=use,
        title=repository,
        architecture=describe(trained.model)["architecture"],
        parameters=sum(leaf.size for leaf in jax.tree.leaves(trained.variables["params"])),
        images=_images(trained),
        classes=len(trained.class_names) or "none",
        provenance=json.dumps(values),
        names=json.dumps(trained.class_names),
    )


def _images(trained: TrainedModel) -> str:
    """The images that a network reads, in words."""
    if not trained.image_size:
        return "of any size"
    size, crop = _size(trained.image_size), f", of which the central {trained.crop:.3g} is kept" * (trained.crop < 1)
    low = f", reduced to {_size(trained.low_resolution)}" if trained.low_resolution else ""
    return f"{size} pixels (height × width){crop}{low}"


def _size(side: int | tuple[int, int]) -> str:
    return "×".join(map(str, square(side)))
