"""Measures whether explanations are faithful: whether removing the marked tenth of an image costs more confidence than
removing a random tenth.

    python scripts/deletion_test.py WORKDIR [--images 200] [--grid 8] [--draws 5] [--seed 0]

For images spread over the test split of the run's dataset, the class predicted by the best network is explained
(vimd_jax/explain.py). The tenth of the cells with the most evidence is then removed and, for comparison, the same
number of random cells, several times. Cells are removed in two ways, to show that the result does not depend on the
filling: by the image's mean colour, which the explanation itself uses, and by a strong blur, which it does not use.
Prints the mean loss of confidence (probability of the class, in percentage points) and the paired difference with its
95 % interval (Student's t over the images).
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from scipy import stats

from vimd_jax import explain
from vimd_jax.data.sources import load_source
from vimd_jax.load import load_model
from vimd_jax.training.workdirs import read_config


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures whether explanations are faithful.")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--grid", type=int, default=8, help="cells in each direction")
    parser.add_argument("--draws", type=int, default=5, help="random tenths per image")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config, classifier = read_config(arguments.workdir), load_model(arguments.workdir)
    source = load_source(config.dataset, "test", seed=config.seed)
    indices = np.unique(np.linspace(0, len(source) - 1, arguments.images).round().astype(int))
    rng, grid = np.random.default_rng(arguments.seed), (arguments.grid, arguments.grid)
    losses = {fill: [] for fill in FILLS}
    for index in indices:
        image = classifier.prepare(source.read(int(index)).image, downsample=True)
        whole = classifier.probabilities(image[None])[0]
        label = int(np.argmax(whole))
        marked = explain.strongest(explain.evidence(classifier.probabilities, image, label, grid))
        removed = [marked, *(rng.permutation(marked.ravel()).reshape(grid) for _ in range(arguments.draws))]
        for fill, remove in FILLS.items():
            left = classifier.probabilities(np.stack([remove(image, cells) for cells in removed]))[:, label]
            drops = 100 * (whole[label] - left)
            losses[fill].append((drops[0], drops[1:].mean()))
    cells = arguments.grid**2
    print(f"{len(indices)} test images of {arguments.workdir.name}, {int(marked.sum())} of {cells} cells removed")
    print(f"{'removed by':<14}{'marked':>10}{'random':>10}{'difference':>12}  95 % interval")
    for fill, pairs in losses.items():
        by_mark, at_random = np.transpose(pairs)
        difference = by_mark - at_random
        low, high = stats.t.interval(0.95, len(difference) - 1, difference.mean(), stats.sem(difference))
        means = f"{by_mark.mean():>10.1f}{at_random.mean():>10.1f}{difference.mean():>12.1f}"
        print(f"{fill:<14}{means}  {low:.1f} to {high:.1f}")


def blurred(image: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """The image with these cells replaced by a copy that is blurred over an eighth of its side."""
    pixels = Image.fromarray((255 * image).round().astype(np.uint8))
    smooth = np.asarray(pixels.filter(ImageFilter.GaussianBlur(image.shape[0] / 8)), np.float32) / 255
    return np.where(explain.covered(cells, image.shape[:2])[..., None], smooth, image).astype(np.float32)


FILLS = {"mean colour": explain.without, "blur": blurred}

if __name__ == "__main__":
    main()
