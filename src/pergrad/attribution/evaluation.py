"""How well scores foretell what retraining does, as numbers.

Owns: `Evaluation`: the linear datamodelling score, its interval and ceiling, and how it prints.
Does not know: who trained the models, or where the scores come from.

For each query, Spearman's correlation over the subsets between the retrained models' outputs and
the sum of the scores of the subset's members; then the mean over queries.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

GROUPS = 10  # of subsets, one of which is left out at a time


@dataclass(frozen=True)
class Score:
    """The linear datamodelling score of one method, with a 95 % interval."""

    lds: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """What `pergrad.evaluate` has found.

    `scores` has a `Score` for every method and baseline; `ceiling` is what a perfect method would
    get, given the noise between seeds (None with one seed); `outputs` (subsets, queries) are the
    measurements of the retrained models, averaged over seeds, and `members` (subsets, N) says who
    was in which subset.
    """

    scores: Mapping[str, Score]
    ceiling: float | None
    outputs: np.ndarray
    members: np.ndarray
    settings: Mapping[str, Any]

    @property
    def best(self) -> str:
        """The method with the highest score."""
        return max(self.scores, key=lambda name: self.scores[name].lds)

    def __repr__(self) -> str:
        subsets, queries = self.outputs.shape
        lines = [
            f"{subsets} subsets with a share of {self.settings['share']:g} of the examples, "
            f"{self.settings['seeds']} models each, {queries} queries",
            f"{'':24} {'LDS':>6}  95 % interval",
        ]
        for name in sorted(self.scores, key=lambda name: -self.scores[name].lds):
            s = self.scores[name]
            lines.append(f"{name:24} {s.lds:6.3f}  {s.low:.3f} to {s.high:.3f}")
        if self.ceiling is not None:
            lines.append(f"{'ceiling':24} {self.ceiling:6.3f}")
        return "\n".join(lines)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the first axis, ties sharing their mean."""
    order = np.argsort(values, 0, kind="stable")
    found = np.empty(values.shape)
    np.put_along_axis(found, order, np.arange(len(values), dtype=float)[:, None], 0)
    for column in range(values.shape[1]):
        _, inverse, counts = np.unique(values[:, column], return_inverse=True, return_counts=True)
        if len(counts) < len(values):
            sums = np.bincount(inverse, found[:, column])
            found[:, column] = (sums / counts)[inverse]
    return found


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(Q,): Pearson's, column by column; 0 where a column is constant."""
    a, b = a - a.mean(0), b - b.mean(0)
    scale = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    return np.where(scale > 0, (a * b).sum(0) / np.where(scale > 0, scale, 1.0), 0.0)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(Q,): Spearman's, column by column."""
    return correlations(ranks(a), ranks(b))


def lds(members: np.ndarray, outputs: np.ndarray, scores: np.ndarray) -> Score:
    """The score of a method, with an interval for other queries and other subsets.

    The variance is that of a mean over queries, plus what leaving out a tenth of the subsets at a
    time says about them (a jackknife).
    """
    foretold = members.astype(float) @ scores.T.astype(float)  # (M, Q)
    each = spearman(foretold, outputs)
    M, Q = outputs.shape
    groups = np.array_split(np.arange(M), min(GROUPS, M))
    left = [spearman(np.delete(foretold, g, 0), np.delete(outputs, g, 0)).mean() for g in groups]
    count = len(groups)
    variance = (count - 1) * float(np.var(left)) + (float(np.var(each, ddof=1)) / Q if Q > 1 else 0)
    mean, half = float(each.mean()), 1.96 * variance**0.5
    return Score(mean, max(-1.0, mean - half), min(1.0, mean + half))


def ceiling(by_seed: np.ndarray) -> float | None:
    """The correlation of the mean over seeds (seeds, M, Q) with what endless seeds would give.

    From the agreement of two halves of the seeds, by the formula of Spearman and Brown.
    """
    seeds = len(by_seed)
    if seeds < 2:
        return None
    half = seeds // 2
    agree = spearman(by_seed[:half].mean(0), by_seed[half : 2 * half].mean(0)).clip(0)
    times = seeds / half
    return float(np.sqrt(times * agree / (1 + (times - 1) * agree)).mean())
