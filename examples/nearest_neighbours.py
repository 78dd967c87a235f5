"""Finds the images in a folder that are most similar to a given one, by features of a trained network.

python examples/nearest_neighbours.py --checkpoint workdir/student --downsample IMAGE FOLDER
"""

import argparse
from pathlib import Path

import jax
import numpy as np

from vimd_jax import load_model
from vimd_jax.data.images import find_images


def main(arguments: list[str] | None = None) -> list[tuple[Path, float]]:
    """Prints and returns the nearest images with their cosine similarity, the nearest first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("folder", type=Path, help="folder to search, with its subfolders")
    parser.add_argument("--checkpoint", required=True, help="a workdir, or a converted or exported folder")
    parser.add_argument("--downsample", action="store_true", help="resize images of other sizes than a student reads")
    parser.add_argument("--neighbours", type=int, default=5)
    options = parser.parse_args(arguments)

    trained = load_model(options.checkpoint)

    @jax.jit
    def features(image):
        """The input of the head, (1, channels)."""
        return trained.model.apply(trained.variables, image, return_features=True)[1]["pre_logits"]

    paths = find_images([options.folder])
    images = [trained.prepare(path, options.downsample) for path in [options.image, *paths]]
    vectors = np.concatenate([features(image[None]) for image in images])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarities = vectors[1:] @ vectors[0]
    nearest = [(paths[i], float(similarities[i])) for i in np.argsort(-similarities)[: options.neighbours]]
    for path, similarity in nearest:
        print(f"{similarity:.3f}  {path}")
    return nearest


if __name__ == "__main__":
    main()
