"""How the examples' gradients stand to given ones: who is with a reference, and who against it.

Owns: both rankings, by inner product and by cosine, and which examples of them the page lists.
Does not know: the page, previews, how the columns came about.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pergrad.scans.report.numbers import Floats, Histogram, Ints, largest, number

SIMILAR = 12  # of each reference, at each end
REFERENCES = 200  # as many columns of references as the page has room for


@dataclass(frozen=True)
class Ranking:
    """The examples at both ends by one number."""

    similar: Ints  # rows, most similar first
    conflicting: Ints  # rows, most opposed first
    values: dict[int, float]  # of these rows

    @classmethod
    def of(cls, values: Floats) -> "Ranking":
        """By values, NaN for those that count nowhere."""
        below = np.flatnonzero(values < 0)
        similar = largest(np.where(values > 0, values, math.nan), SIMILAR)
        conflicting = below[largest(-values[below], SIMILAR)]
        return cls(
            similar, conflicting, {int(i): rounded(values[i]) for i in (*similar, *conflicting)}
        )

    def in_page(self, place: Mapping[int, int]) -> dict[str, Any]:
        """Both ends as [place in the page's list, value]."""
        ends = {"similar": self.similar, "conflicting": self.conflicting}
        return {
            end: [[place[int(i)], self.values[int(i)]] for i in rows] for end, rows in ends.items()
        }


@dataclass(frozen=True)
class Reference:
    """How the examples' gradients stand to one given gradient."""

    name: str
    bars: Histogram
    cosines: Ranking
    dots: Ranking | None  # by inner product, if the scores have them
    duplicates: int  # cosine at least 0.99
    opposed: float  # fraction of the examples with a cosine below 0
    median: float

    @property
    def listed(self) -> Iterator[Ints]:
        """The rows that the page shows."""
        for ranking in (self.cosines, self.dots):
            if ranking is not None:
                yield from (ranking.similar, ranking.conflicting)

    def in_page(self, place: Mapping[int, int]) -> dict[str, Any]:
        """For the page's script."""
        return {
            "name": self.name,
            **self.cosines.in_page(place),
            "dots": None if self.dots is None else self.dots.in_page(place),
            "bars": {"count": self.bars.count.tolist(), "label": self.bars.label},
        }


def compare(table: pa.Table) -> Iterator[Reference]:
    """The columns cosine:{reference}. A cosine with a zero gradient is 0 and says nothing."""
    silent = floats(table["norm"]) == 0
    names = [name for name in table.schema.names if name.startswith("cosine:")]
    for column in names[:REFERENCES]:
        name = column.removeprefix("cosine:")
        values = _known(table, column, silent)
        known = np.clip(values[~np.isnan(values)], -1, 1)  # rounding may reach 1.0000001
        count, edges = np.histogram(known, 40, (-1, 1))
        label = [f"cosine {number(a)} to {number(b)}" for a, b in
                 zip(edges[:-1].round(2), edges[1:].round(2), strict=True)]  # fmt: skip
        products = f"dot:{name}" in table.schema.names
        yield Reference(
            name=name,
            bars=Histogram(edges[:-1], edges[1:], count.astype(np.int64), label),
            cosines=Ranking.of(values),
            dots=Ranking.of(_known(table, f"dot:{name}", silent)) if products else None,
            duplicates=int((known >= 0.99).sum()),
            opposed=float((known < 0).mean()) if len(known) else math.nan,
            median=float(np.median(known)) if len(known) else math.nan,
        )


def _known(table: pa.Table, column: str, silent: Any) -> Floats:
    values = floats(table[column])
    values[silent | ~np.isfinite(values)] = math.nan
    return values


def floats(column: pa.ChunkedArray) -> Floats:
    """A column as float64, NaN for null."""
    return column.cast(pa.float64()).to_numpy().astype(np.float64)


def rounded(value: float) -> float:
    """Six digits."""
    return float(f"{value:.6g}")
