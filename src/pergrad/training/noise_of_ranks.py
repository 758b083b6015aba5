"""The noise scale from rows of steps, of one rank or several.

Owns: what the ranks' sums give together, and which rows say nothing.
Does not know: torch, so that a run can be read without it; how a row comes about.
"""

from collections.abc import Sequence
from math import isfinite, nan, sqrt
from typing import Any

from pergrad.training.noise_scale import NoiseScale


def sums_of_ranks(rows: Sequence[dict[str, float]]) -> tuple[float, float, float]:
    """(sum of squared norms, gradient's norm, sum of squared weights) of a step of several ranks.

    Each rank's weights are for its own mean, and the gradient trained on is the mean over ranks; of
    ranks that are missing, the others speak. Weights are brought to sum 1.
    """
    ranks = max(1, int(rows[0]["ranks"]))
    present = len(rows)
    weight = sum(r["weight_sum"] for r in rows) / present
    if not weight:
        return nan, nan, nan
    scale = 1 / (weight**2 * ranks * present)
    if any(r["sharded"] for r in rows):
        grad = sqrt(sum(r["grad_norm"] ** 2 for r in rows)) if present == ranks else nan
    else:
        grad = rows[0]["grad_norm"]
    return (
        sum(r["sq_norm_sum"] for r in rows) * scale,
        grad / abs(weight),
        sum(r["sq_weight_sum"] for r in rows) * scale,
    )


def add_noise(noise: NoiseScale, rows: list[dict[str, Any]]) -> None:
    """A step of all ranks that were watched, unless a number is missing."""
    if any(r["note"] is not None or r["weight_sum"] is None for r in rows):
        return
    norms = [r["grad_norm"] for r in rows]
    averaged = all(abs(n - norms[0]) <= 1e-5 * abs(norms[0]) for n in norms)
    together = averaged or any(r["sharded"] for r in rows)
    # ranks whose gradients differ have not been averaged: each has a step of its own
    for several in [rows] if together else [[{**r, "ranks": 1}] for r in rows]:
        sums = sums_of_ranks(several)
        if all(isfinite(v) for v in sums) and sums[2] < 1 - 1e-12:
            noise.add_sums(*sums)
