"""What one watched step says: quantiles, outliers against the running median, spikes.

Owns: the numbers of a step's row, the scale on which examples are compared, and what counts as an
outlier or a spike.
Does not know: models, passes, files.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, log, nan
from statistics import median, median_high
from typing import Any

import torch
from torch import Tensor

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
WINDOW = 50  # watched steps
BEFORE_SPIKES = 5  # steps before the first one that may be called a spike
DEVIATIONS = 6.0  # robust standard deviations
TIMES = 3.0  # and so many times the running median: quiet runs have tiny deviations
LOSS_TIMES = 1.5
FEW = 0.5  # of the usual number of examples: a mean of fewer is larger by chance
TOP = 0.01
_MAD = 1.4826  # of a normal distribution: standard deviation / median absolute deviation


@dataclass(slots=True)
class Piece:
    """One micro-batch: tensors (B,) in float64 on the CPU."""

    loss: Tensor  # each example's own mean loss; NaN where it cannot be had
    tokens: Tensor
    weight: Tensor  # of the gradient of that loss in the step
    norm: Tensor  # of that gradient
    keys: list[str] | None
    groups: dict[str, Tensor] = field(default_factory=dict)
    total: float = nan  # the loss of the micro-batch, times its weight
    preview: Callable[[int], Any] | None = None  # what a person sees of a row


class Baseline:
    """Running medians of the latest steps."""

    def __init__(self) -> None:
        self._medians: deque[float] = deque(maxlen=WINDOW)  # of log scores
        self._spreads: deque[float] = deque(maxlen=WINDOW)
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._grad_norms: deque[float] = deque(maxlen=WINDOW)
        self._sizes: deque[int] = deque(maxlen=WINDOW)

    def ratios(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(B,), each score by the running median; and (B,), whether it is an outlier.

        This step is part of the median, but one of many.
        """
        logs = scores[(scores > 0) & scores.isfinite()].log()
        if len(logs):
            middle = float(logs.median())
            self._medians.append(middle)
            self._spreads.append(_MAD * float((logs - middle).abs().median()))
        if not self._medians:
            return torch.full_like(scores, nan), torch.zeros_like(scores, dtype=torch.bool)
        middle, spread = median(self._medians), median(self._spreads)
        ratio = scores / torch.tensor(middle, dtype=scores.dtype).exp()
        bound = max(log(TIMES), DEVIATIONS * spread)
        # what is not a number stands out more than any number
        return ratio, (ratio.log() > bound) | ~scores.isfinite()

    def spike(self, loss: float, grad_norm: float, examples: int) -> str | None:
        """Why this step is a spike, in words, or None.

        The short last batch of an epoch is not judged: noise that others average out stands out.
        """
        reasons = []
        self._sizes.append(examples)
        if examples < FEW * median_high(self._sizes):
            return None
        for name, value, latest, times in (
            ("loss", loss, self._losses, LOSS_TIMES),
            ("gradient norm", grad_norm, self._grad_norms, TIMES),
        ):
            enough = len(latest) >= BEFORE_SPIKES
            if enough and value == value and _stands_out(value, latest, times):
                reasons.append(f"{name} {value:.4g}, {median(latest):.4g} before")
            if isfinite(value):
                latest.append(value)
        return "; ".join(reasons) or None


def _stands_out(value: float, latest: Sequence[float], times: float) -> bool:
    middle = median(latest)
    spread = _MAD * median(abs(v - middle) for v in latest)
    return value > max(middle + DEVIATIONS * spread, middle * times)


def joined(pieces: Sequence[Piece]) -> Piece:
    """The micro-batches of a step as one."""
    if len(pieces) == 1:
        return pieces[0]
    keyed = all(p.keys is not None for p in pieces)

    def together(name: str) -> Tensor:
        return torch.cat([getattr(p, name) for p in pieces])

    return Piece(
        together("loss"),
        together("tokens"),
        together("weight"),
        together("norm"),
        [k for p in pieces for k in p.keys or ()] if keyed else None,
        {g: torch.cat([p.groups[g] for p in pieces]) for g in pieces[0].groups},
        sum(p.total for p in pieces),
        partial(_preview, pieces) if all(p.preview is not None for p in pieces) else None,
    )


def _preview(pieces: Sequence[Piece], row: int) -> Any:
    for piece in pieces:
        if row < len(piece.norm):
            assert piece.preview is not None
            return piece.preview(row)
        row -= len(piece.norm)
    raise IndexError(row)


def scores_of(whole: Piece, reference: float) -> Tensor:
    """(B,): norms made comparable across lengths: |grad of sum / sqrt(n)|, n in units of R.

    The norm of the gradient of a text's mean loss falls with its length n, that of the sum grows;
    under sum / sqrt(n) it hardly depends on it.
    """
    return whole.norm * (whole.tokens / reference).sqrt()


def step_numbers(
    whole: Piece, scores: Tensor, grad_norm: float, clip: float | None
) -> dict[str, float | None]:
    """The numbers of a step's row, from its examples."""
    weighted = (whole.weight * whole.norm).abs()
    squares = weighted.square()
    known = scores[scores.isfinite()]
    if len(known):
        at = torch.tensor(QUANTILES, dtype=known.dtype)
        quantiles = torch.quantile(known, at).tolist()
    else:
        quantiles = [nan] * len(QUANTILES)
    count = len(scores)
    top = max(1, round(TOP * count)) if count else 0
    total, share = float(squares.sum()), float(whole.weight.sum())
    largest = float(squares.sort(descending=True).values[:top].sum())
    aligned = float(weighted.sum())
    loss = whole.total / share if share else nan
    return {
        "loss": loss,
        "grad_norm": grad_norm,
        "weight_sum": share,
        "sq_weight_sum": float(whole.weight.square().sum()),
        "sq_norm_sum": total,
        **{f"p{round(100 * q)}": v for q, v in zip(QUANTILES, quantiles, strict=True)},
        "max": float(known.max()) if len(known) else nan,
        "zero": float((whole.norm == 0).double().mean()) if count else nan,
        "clipped": None if clip is None else float((whole.norm > clip).double().mean()),
        "top_share": largest / total if total else nan,
        "cosine": grad_norm / aligned if aligned else nan,
        **{f"norm:{g}": float(v.median()) if len(v) else nan for g, v in whole.groups.items()},
    }


def to_blame(whole: Piece, most: int = 3) -> list[tuple[int, float]]:
    """The examples that added most to the step's gradient: (row, share of the squared norms)."""
    squares = (whole.weight * whole.norm).square()
    squares = torch.where(squares.isfinite(), squares, torch.inf)
    total = float(squares.sum())
    order = squares.argsort(descending=True, stable=True)[:most].tolist()
    share = [float(squares[i]) / total if isfinite(total) and total else nan for i in order]
    return list(zip(order, share, strict=True))
