"""The numbers of a report: shares, quantiles, histograms, and the scales they are drawn on.

Owns: every number that the page states, computed with numpy from the columns of the scores.
Does not know: pyarrow, drawing, HTML.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOP_SHARE = 0.01  # "the top 1 %"
SMALL = 0.01  # a norm below this fraction of the root mean square is called small
DECADES = 16  # a log axis shows so many powers of ten below the largest value
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Summary:
    """What the scores say as a whole.

    All shares of the squared norm are over the examples whose norm is finite.
    """

    examples: int  # rows
    scored: int  # with a finite loss and norm
    failed: int  # raised
    non_finite: int  # no error, but the loss or the norm is NaN or infinite
    zero: int  # norm exactly 0
    small: int  # 0 < norm < SMALL * rms_norm
    small_share: float  # of the total squared norm, carried by those of `zero` and `small`
    top: int  # the number of examples in the top 1 %, rounded up
    top_share: float  # of the total squared norm, carried by them; NaN if all norms are 0
    rms_norm: float  # root of the mean squared norm
    median_norm: float
    max_norm: float
    median_loss: float
    mean_loss: float
    rank_correlation: float  # Spearman's, of loss and norm; NaN if one of them is constant


def summary(losses: Floats, norms: Floats, failed: NDArray[np.bool_]) -> Summary:
    """The summary of a data set's scores; NaN stands for a value that is missing.

    Args:
        losses: (N,).
        norms: (N,), gradient norms (not squared).
        failed: (N,), True where the example raised.
    """
    finite = np.isfinite(losses) & np.isfinite(norms) & ~failed
    known = norms[np.isfinite(norms) & ~failed]
    shares = squared_shares(known)
    rms = _rms(known)
    small = known < SMALL * rms
    top = math.ceil(TOP_SHARE * len(known))
    return Summary(
        examples=len(norms),
        scored=int(finite.sum()),
        failed=int(failed.sum()),
        non_finite=int((~finite & ~failed).sum()),
        zero=int((known == 0).sum()),
        small=int((small & (known > 0)).sum()),
        small_share=float(shares[small].sum()),
        top=top,
        top_share=float(np.sort(shares)[::-1][:top].sum()) if len(known) else math.nan,
        rms_norm=rms,
        median_norm=_median(known),
        max_norm=float(known.max()) if len(known) else math.nan,
        median_loss=_median(losses[np.isfinite(losses)]),
        mean_loss=_mean(losses[np.isfinite(losses)]),
        rank_correlation=rank_correlation(losses[finite], norms[finite]),
    )


def squared_shares(norms: Floats) -> Floats:
    """(N,) of finite norms -> each one's share of the total squared norm; NaN if all are 0."""
    largest = norms.max(initial=0.0)
    if largest == 0:
        return np.full(len(norms), math.nan)
    squares = (norms / largest) ** 2  # of 1 at most: squares of 1e200 would overflow
    return squares / squares.sum()


def rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; NaN if one is constant."""
    if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return math.nan
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def concentration(norms: Floats, points: int = 200) -> tuple[Floats, Floats]:
    """The curve "the top x of the examples carry y of the total squared norm".

    Args:
        norms: (N,), finite.
        points: at most so many points, spaced by ratio.

    Returns:
        x, y: fractions; x rises from 1 / N to 1. Empty if all norms are 0.
    """
    shares = squared_shares(norms)
    if not len(norms) or np.isnan(shares[0]):
        return np.empty(0), np.empty(0)
    carried = np.minimum(np.cumsum(np.sort(shares)[::-1]), 1.0)
    at = np.unique(np.geomspace(1, len(norms), points).round().astype(np.int64))
    return at / len(norms), carried[at - 1]


@dataclass(frozen=True)
class Scale:
    """Where values are drawn along an axis.

    "linear": as they are. "log": powers of ten, and a strip of its own, left of the smallest, for
    zeros and what is under `floor`. "symlog": sign(v) log10(1 + |v| / width), for values of both
    signs that span powers of ten.
    """

    kind: Literal["linear", "log", "symlog"]
    low: float  # position at which the axis starts
    high: float
    floor: float = 0.0  # log: the smallest value with a place of its own
    strip: float | None = None  # log: the position of what is under it; None if there is none
    strip_label: str = "0"
    width: float = 1.0  # symlog

    @classmethod
    def of(cls, values: Floats) -> "Scale":
        """The scale that suits finite values, of any sign and range."""
        if not len(values):
            return cls("linear", 0.0, 1.0)
        low, high = float(values.min()), float(values.max())
        if low >= 0 and high > 0:
            positive = values[values > 0]
            floor = max(float(positive.min()), high / 10**DECADES)
            # not by the smallest one: equally likely values have one near 0, and no use for decades
            typical = float(np.quantile(positive, 0.05, method="lower"))
            if high / max(typical, floor) > 50:
                under = values < floor
                start, end = math.log10(floor), math.log10(high)
                pad = 0.03 * (end - start)
                strip = start - 4 * pad if under.any() else None
                return cls(
                    "log", (start if strip is None else strip) - pad, end + pad, floor, strip,
                    "0" if not values[under].any() else f"< {number(floor)}",
                )  # fmt: skip
        sizes = np.abs(values[values != 0])
        if len(sizes) and low < 0:
            typical = max(_median(sizes), sizes.max() / 10**DECADES)
            if sizes.max() / typical > 100 or not math.isfinite(high - low):
                scale = cls("symlog", 0.0, 1.0, width=float(typical) / 10)
                start, end = scale.place(np.array([low, high]))
                pad = 0.03 * (end - start)
                return cls("symlog", start - pad, end + pad, width=scale.width)
        pad = 0.03 * (high - low) or 0.1 * abs(high) or 0.5
        return cls("linear", low - pad, high + pad)

    def place(self, values: Floats) -> Floats:
        """(N,) values -> (N,) positions."""
        if self.kind == "log":
            with np.errstate(divide="ignore"):
                places = np.log10(values)
            return places if self.strip is None else np.where(
                values < self.floor, self.strip, places
            )  # fmt: skip
        if self.kind == "symlog":
            return np.sign(values) * np.log1p(np.abs(values) / self.width) / math.log(10)
        return values

    def value(self, position: float) -> float:
        """The value at a position; the inverse of `place`, but for the strip."""
        position = float(position)  # a Python float overflows to infinity, numpy's warns
        if self.kind == "log":
            return 10.0**position
        if self.kind == "symlog":
            return math.copysign((10.0 ** abs(position) - 1) * self.width, position)
        return position

    def ticks(self, most: int = 7) -> list[tuple[float, str]]:
        """Up to about `most` positions with what to write there."""
        if self.kind == "linear":
            step = _nice((self.high - self.low) / most)
            first = math.ceil(self.low / step)
            last = math.floor(self.high / step)
            return [(k * step, number(k * step)) for k in range(first, last + 1)]
        if self.kind == "log":
            start = math.log10(self.floor)
            found = [(math.log10(v), number(v)) for v in _decades(start, self.high, most)]
            if self.strip is not None:
                found.insert(0, (self.strip, self.strip_label))
            return found
        reach = max(abs(self.low), abs(self.high))
        top = math.log10(min(self.value(reach), sys.float_info.max))
        sizes = [v for v in _decades(math.log10(self.width), top, most // 2 + 1) if v > self.width]
        values = [-v for v in reversed(sizes)] + [0.0] + sizes
        places = self.place(np.array(values))
        return [
            (float(p), number(v))
            for p, v in zip(places, values, strict=True)
            if self.low <= p <= self.high
        ]


@dataclass(frozen=True)
class Histogram:
    """Counts between positions on a scale, and what the edges are as values."""

    left: Floats
    right: Floats
    count: Ints
    label: list[str]  # "0.1 to 0.2"


def histogram(values: Floats, scale: Scale, bins: int | None = None) -> Histogram:
    """How many of the finite values lie where: equal widths on the scale, zeros apart on a log.

    Without `bins` there are as many as the square root of the count, 8 at least and 48 at most.
    """
    places = scale.place(values)
    bins = bins or min(48, max(8, math.isqrt(len(values))))
    start = scale.low
    on_strip = np.zeros(len(values), dtype=bool)
    if scale.strip is not None:
        on_strip = values < scale.floor
        start = math.log10(scale.floor)
    elif len(values):
        start = float(places.min())
    end = float(places.max()) if len(values) else scale.high
    if not end > start:  # all values are the same, or on the strip
        half = 0.02 * (scale.high - scale.low)
        start, end, bins = start - half, start + half, 1
    edges = np.linspace(start, end, bins + 1)
    inside = np.clip(places[~on_strip], start, end)  # rounding of a log may leave the last bin
    count, _ = np.histogram(inside, edges)
    left, right = edges[:-1], edges[1:]
    label = [f"{number(scale.value(a))} to {number(scale.value(b))}" for a, b in
             zip(left, right, strict=True)]  # fmt: skip
    if len(values) and bins == 1:
        label = [number(float(values[~on_strip][0]))] if (~on_strip).any() else label
    if scale.strip is not None:
        half = 0.018 * (scale.high - scale.low)
        left = np.insert(left, 0, scale.strip - half)
        right = np.insert(right, 0, scale.strip + half)
        count = np.insert(count, 0, on_strip.sum())
        label.insert(0, "exactly 0" if scale.strip_label == "0" else scale.strip_label)
    return Histogram(left, right, count.astype(np.int64), label)


@dataclass(frozen=True)
class Density:
    """Counts on a grid of two scales; only the cells that hold an example."""

    left: Floats
    right: Floats
    bottom: Floats
    top: Floats
    count: Ints


def density(
    x: Floats, y: Floats, x_scale: Scale, y_scale: Scale, cells: tuple[int, int] = (110, 70)
) -> Density:
    """How many of the points (x[b], y[b]) lie in each cell of a grid, as wide as the plot."""
    x_edges = np.linspace(x_scale.low, x_scale.high, cells[0] + 1)
    y_edges = np.linspace(y_scale.low, y_scale.high, cells[1] + 1)
    count, _, _ = np.histogram2d(x_scale.place(x), y_scale.place(y), (x_edges, y_edges))
    i, j = np.nonzero(count)
    return Density(
        x_edges[i], x_edges[i + 1], y_edges[j], y_edges[j + 1], count[i, j].astype(np.int64)
    )


@dataclass(frozen=True)
class Group:
    """The norms of one group of parameters over the data set."""

    name: str
    quantiles: tuple[float, ...]  # at QUANTILES
    share: float  # of the total squared norm of all groups
    zero: float  # fraction of the examples whose norm in this group is exactly 0


def groups(columns: Iterator[tuple[str, Floats]]) -> list[Group]:
    """One row per column (name, norms (N,)); NaN and infinities are left out."""
    rows = []
    for name, norms in columns:
        norms = norms[np.isfinite(norms)]
        quantiles = np.quantile(norms, QUANTILES) if len(norms) else np.full(5, math.nan)
        zero = float((norms == 0).mean()) if len(norms) else math.nan
        rows.append((name, tuple(map(float, quantiles)), _rms(norms), zero))
    shares = squared_shares(np.nan_to_num(np.array([rms for _, _, rms, _ in rows])))
    return [
        Group(name, quantiles, float(share), zero)
        for (name, quantiles, _, zero), share in zip(rows, shares, strict=True)
    ]


def largest(values: Floats, count: int) -> Ints:
    """The positions of the `count` largest values, largest first; ties by position, NaN never."""
    known = np.flatnonzero(~np.isnan(values))
    if count < len(known):
        # all that are as large as the last one to be taken, so that ties go by position
        bound = np.partition(values[known], -count)[-count] if count else math.inf
        known = known[values[known] >= bound]
    return known[np.argsort(-values[known], kind="stable")][:count]


def number(value: float | None) -> str:
    """A number as a person reads it: three significant digits, powers of ten where they help.

    >>> [number(v) for v in (0.0, 0.1234, 12345.6, 1e-7, 0.00052, -2.5, float("nan"))]
    ['0', '0.123', '12,300', '10⁻⁷', '5.2×10⁻⁴', '-2.5', 'NaN']
    """
    if value is None or math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    digits, power = f"{value:.2e}".split("e")
    exponent = int(power)
    if -4 < exponent < 6:
        return _plain(float(f"{value:.3g}"), max(0, 2 - exponent))
    digits = digits.rstrip("0").rstrip(".")
    raised = f"10{str(exponent).translate(_SUPERSCRIPT)}"
    return raised if digits == "1" else f"-{raised}" if digits == "-1" else f"{digits}×{raised}"


def percent(fraction: float) -> str:
    """A fraction as a percentage that never rounds something to nothing, or less to all.

    >>> [percent(v) for v in (0.0, 0.00001, 0.0123, 0.5, 0.9999, 1.0)]
    ['0 %', 'under 0.1 %', '1.2 %', '50 %', 'over 99.9 %', '100 %']
    """
    if math.isnan(fraction):
        return "–"
    if 0 < fraction < 0.001:
        return "under 0.1 %"
    if 0.999 < fraction < 1 - 1e-9:
        return "over 99.9 %"
    shown = (
        f"{100 * fraction:.1f}" if fraction < 0.1 or fraction > 0.99 else f"{100 * fraction:.0f}"
    )
    return f"{shown.removesuffix('.0')} %"


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _plain(value: float, decimals: int) -> str:
    """Without an exponent, and without zeros that say nothing."""
    shown = f"{value:,.{decimals}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def _nice(step: float) -> float:
    """The next step of the form 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= step * (1 - 1e-9))


def _decades(start: float, end: float, most: int) -> list[float]:
    """Round values between 10**start and 10**end: 1, 2, 5 in few decades, else every n-th power."""
    first, last = math.ceil(start - 1e-9), math.floor(end + 1e-9)
    if last - first + 1 <= most // 3 + 1:
        found = [k * 10.0**e for e in range(first - 1, last + 1) for k in (1, 2, 5)]
        return [v for v in found if start - 1e-9 <= math.log10(v) <= end + 1e-9]
    step = math.ceil((last - first + 1) / most)
    return [10.0**e for e in range(first, last + 1) if e % step == 0]


def _ranks(values: Floats) -> Floats:
    """Mean ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return ((np.cumsum(counts) - (counts - 1) / 2)[inverse]).astype(np.float64)


def _rms(values: Floats) -> float:
    """Root mean square, without overflow; NaN of nothing."""
    if not len(values):
        return math.nan
    largest = float(np.abs(values).max())
    return largest * float(np.sqrt(((values / largest) ** 2).mean())) if largest else 0.0


def _median(values: Floats) -> float:
    """The median; NaN of nothing."""
    largest = float(np.abs(values).max(initial=0.0)) or 1.0  # two of 1e308 would overflow
    return largest * float(np.median(values / largest)) if len(values) else math.nan


def _mean(values: Floats) -> float:
    """The mean; NaN of nothing."""
    largest = float(np.abs(values).max(initial=0.0)) or 1.0
    return largest * float((values / largest).mean()) if len(values) else math.nan
