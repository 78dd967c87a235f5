"""95 % confidence intervals of scores over test images, and of differences between two networks on the same images."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
_DRAWS, _SEED = 2000, 0

Shares = dict[str, np.ndarray]  # name of a sum -> each image's share of it, (images,)
Scores = Callable[[dict[str, np.ndarray]], dict[str, float]]  # sums -> scores, as `Task.scores`


class Interval(NamedTuple):
    """The ends of an interval and the method that it was found by."""

    low: float
    high: float
    method: str


def interval(name: str, shares: Shares, scores: Scores) -> Interval:
    """The interval of a score over images.

    A share of images that succeed: Wilson's score interval (E. B. Wilson, JASA 1927). Any other score: the percentiles
    of the score over resampled images (Efron's bootstrap).

    Args:
      name: of the score.
      shares: of every image, in all sums but "count".
      scores: of the task.
    """
    if is_share(name, shares):
        hits = shares[name]
        found = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(LEVEL, method="wilson")
        return Interval(100 * found.low, 100 * found.high, "Wilson")
    return _percentiles(resampled(name, shares, scores), "bootstrap")


def paired_interval(name: str, first: Shares, second: Shares, scores: Scores) -> Interval:
    """The interval of second minus first, measured on the same images in the same order.

    A share of images: the adjusted Wald interval for paired proportions (Bonett and Price, "Adjusted Wald Confidence
    Interval for a Difference of Binomial Proportions Based on Paired Data", JEBS 2012): with w images that only the
    second has right and l that only the first has, p = (w + 1) / (n + 2), q = (l + 1) / (n + 2),

        p - q ± z sqrt((p + q - (p - q)²) / (n + 2)).

    Any other score: the percentiles of the difference, both scores being of the same resampled images.
    """
    if is_share(name, first) and is_share(name, second):
        wins, losses = wins_and_losses(first[name], second[name])
        n = len(first[name]) + 2
        p, q = (wins + 1) / n, (losses + 1) / n
        reach = stats.norm.ppf((1 + LEVEL) / 2) * np.sqrt((p + q - (p - q) ** 2) / n)
        return Interval(100 * max(p - q - reach, -1), 100 * min(p - q + reach, 1), "Bonett-Price, paired")
    differences = resampled(name, second, scores) - resampled(name, first, scores)
    return _percentiles(differences, "bootstrap, paired")


def wins_and_losses(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """The number of images where only the second of two results (images,) is 1, and where only the first is."""
    return int(np.sum(second > first)), int(np.sum(first > second))


def is_share(name: str, shares: Shares) -> bool:
    """Whether a score is a percentage of images, each of which succeeds or not."""
    return name in shares and bool(np.isin(shares[name], (0, 1)).all())


def resampled(name: str, shares: Shares, scores: Scores) -> np.ndarray:
    """A score of as many images drawn with replacement, (draws,); the same ones for every network."""
    rng, count = np.random.default_rng(_SEED), len(next(iter(shares.values())))
    results = []
    for _ in range(_DRAWS):
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        results.append(scores({"count": np.float64(count)} | {key: times @ x for key, x in shares.items()})[name])
    return np.array(results)


def _percentiles(values: np.ndarray, method: str) -> Interval:
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(low), float(high), method)
