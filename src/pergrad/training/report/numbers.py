"""The numbers of a run's report: what is drawn over the steps, and what is said of them.

Owns: every number that the page states, from the rows of the run.
Does not know: drawing, HTML.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median_high
from typing import TYPE_CHECKING, Any

import numpy as np

from pergrad.scans.report.numbers import Floats
from pergrad.training.noise_of_ranks import add_noise
from pergrad.training.noise_scale import NoiseScale

if TYPE_CHECKING:
    from pergrad.training.run import Run

MOST_POINTS = 600  # of a line; with more steps, each point is a mean over some
MOST_MARKS = 2_000  # outliers drawn, the largest ones
MOST_LAYERS = 120
WINDOW = 100  # steps that a noise scale is of
BAND = ("p1", "p10", "p50", "p90", "p99", "max")


@dataclass(frozen=True)
class Curves:
    """What is drawn over the steps; all (n,), NaN for what is missing."""

    step: Floats
    band: dict[str, Floats]  # quantiles of the examples' scores
    loss: Floats
    grad_norm: Floats
    batch: Floats  # examples of a whole step, as of most of the latest WINDOW
    noise: Floats
    low: Floats
    high: Floats
    zero: Floats
    clipped: Floats
    layers: dict[str, Floats]  # medians of the examples' norms

    def thinned(self, most: int = MOST_POINTS) -> "Curves":
        """At most so many points, each the mean of some steps that follow one another."""
        n = len(self.step)
        if n <= most:
            return self
        edges = np.linspace(0, n, most + 1).astype(np.int64)
        at = list(pairwise(edges))

        def mean(values: Floats) -> Floats:
            return np.array([_mean(values[a:b]) for a, b in at])

        def largest(values: Floats) -> Floats:
            return np.array([_max(values[a:b]) for a, b in at])

        single = {n: getattr(self, n) for n in SINGLE}
        return Curves(
            band={q: (largest if q == "max" else mean)(v) for q, v in self.band.items()},
            layers={g: mean(v) for g, v in self.layers.items()},
            **{name: mean(values) for name, values in single.items()},
        )


SINGLE = ("step", "loss", "grad_norm", "batch", "noise", "low", "high", "zero", "clipped")


@dataclass(frozen=True)
class Found:
    """What the page says of a run as a whole."""

    steps: int
    first: int
    last: int
    examples: int  # rows of examples
    keys: int  # different ones
    outliers: int  # rows
    batch: float  # examples of a step, as of most of the latest WINDOW
    noise: float  # of the latest WINDOW steps
    low: float
    high: float
    zero: float  # share of gradients of exactly zero, of the latest WINDOW steps
    clipped: float  # share over the threshold, of the latest WINDOW steps
    spikes: list[dict[str, Any]]
    notes: list[tuple[int, str]]  # first step, why it could not be read


def curves(by_step: Sequence[tuple[int, list[dict[str, Any]]]]) -> Curves:
    """Each step's numbers over all its ranks."""
    rows: dict[str, list[float]] = {name: [] for name in SINGLE}
    band: dict[str, list[float]] = {q: [] for q in BAND}
    layers = dict.fromkeys(
        name
        for _, several in by_step
        for row in several
        for name in row
        if name.startswith("norm:")
    )
    by_layer: dict[str, list[float]] = {name: [] for name in layers}
    noise = NoiseScale(WINDOW)
    sizes: deque[float] = deque(maxlen=WINDOW)
    for step, several in by_step:
        before = noise.steps, noise.trace
        add_noise(noise, several)
        known = noise.steps >= 2 and (noise.steps, noise.trace) != before
        rows["step"].append(float(step))
        rows["noise"].append(noise.value if known else math.nan)
        rows["low"].append(noise.low if known else math.nan)
        rows["high"].append(noise.high if known else math.nan)
        if not math.isnan(size := _batch(several)):
            sizes.append(size)  # the short last batch of an epoch is not the batch size
        rows["batch"].append(median_high(sizes) if sizes else math.nan)
        rows["loss"].append(_weighted(several, "loss", "weight_sum"))
        for name in ("zero", "clipped"):
            rows[name].append(_weighted(several, name, "examples"))
        sharded = any(row["sharded"] for row in several)
        norms = np.array([_float(row["grad_norm"]) for row in several])
        rows["grad_norm"].append(float(np.sqrt((norms**2).sum()) if sharded else norms.mean()))
        for q in BAND:
            values = np.array([_float(row[q]) for row in several])
            band[q].append(_max(values) if q == "max" else _mean(values))
        for name in layers:
            by_layer[name].append(_weighted(several, name, "examples"))
    return Curves(
        band={q: np.array(values) for q, values in band.items()},
        layers={n.removeprefix("norm:"): np.array(v) for n, v in by_layer.items()},
        **{name: np.array(values) for name, values in rows.items()},
    )


def found(run: "Run", drawn: Curves, by_step: Sequence[tuple[int, list[dict[str, Any]]]]) -> Found:
    """What there is to say."""
    table = run.examples().select(["key", "outlier"])
    latest = slice(-WINDOW, None)
    notes: dict[str, int] = {}
    for step, several in by_step:
        for row in several:
            if row["note"] is not None:
                notes.setdefault(row["note"], step)

    def last(values: Floats) -> float:
        known = values[np.isfinite(values)]
        return float(known[-1]) if len(known) else math.nan

    noise = NoiseScale(WINDOW)
    for _, several in by_step:
        add_noise(noise, several)
    return Found(
        steps=len(drawn.step),
        first=int(drawn.step[0]) if len(drawn.step) else 0,
        last=int(drawn.step[-1]) if len(drawn.step) else 0,
        examples=len(table),
        keys=len(table["key"].unique().drop_null()),
        outliers=sum(bool(v) for v in table["outlier"].to_pylist()),
        batch=last(drawn.batch),
        noise=noise.value if noise.steps >= 2 else math.nan,
        low=noise.low,
        high=noise.high,
        zero=_mean(drawn.zero[latest]),
        clipped=_mean(drawn.clipped[latest]),
        spikes=run.spikes(),
        notes=[(step, note) for note, step in notes.items()],
    )


def marks(run: "Run") -> list[dict[str, Any]]:
    """The outliers that have a place in the plot: step, score, key, loss; the largest ones."""
    import pyarrow.compute as pc

    table = run.examples()
    rows = table.filter(pc.fill_null(table["outlier"], False)).to_pylist()
    rows = [r for r in rows if r["score"] is not None and 0 < r["score"] < math.inf]
    return sorted(rows, key=lambda r: -(r["ratio"] or 0.0))[:MOST_MARKS]


def _batch(several: list[dict[str, Any]]) -> float:
    """Examples of a step; for ranks that are missing, as many as the others have."""
    count = sum(row["examples"] for row in several) * several[0]["ranks"] / len(several)
    return float(count) or math.nan


def _weighted(several: list[dict[str, Any]], name: str, by: str) -> float:
    pairs = [(_float(row.get(name)), _float(row[by])) for row in several]
    known = [(v, w) for v, w in pairs if math.isfinite(v) and math.isfinite(w)]
    total = sum(w for _, w in known)
    return sum(v * w for v, w in known) / total if total else math.nan


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _reduced(reduce: Callable[[Floats], Any], values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(reduce(known)) if len(known) else math.nan


def _mean(values: Floats) -> float:
    return _reduced(np.mean, values)


def _max(values: Floats) -> float:
    return _reduced(np.max, values)
