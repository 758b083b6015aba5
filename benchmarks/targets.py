"""What a record says about the bounds that were set for it.

Owns: reading measured values out of a record, and whether a bound is kept.
Does not know: how they were measured, or how they are shown.
"""

import statistics
from dataclasses import dataclass
from typing import Any

from contestants import CONTESTANTS

Record = dict[str, Any]

WORDS = {
    "time": "time of pergrad, of a plain step",
    "memory": "peak memory of pergrad, of a plain step",
    "vmap slower": "`vmap(grad)` slower than pergrad, times",
    "opacus slower": "Opacus slower than pergrad, times",
    "memory of vmap": "memory beyond the plain step's, of what `vmap(grad)` needs beyond it",
    "first over again": "time at lengths not seen before, of the time at known ones",
}
AT_LEAST = ("vmap slower", "opacus slower")


@dataclass(frozen=True)
class Outcome:
    """One bound on one workload, and what was measured; None where it was not."""

    workload: str
    measure: str
    bound: float
    claim: bool
    value: float | None
    other_fails: bool = False  # the contestant to compare with cannot do it at all

    @property
    def holds(self) -> bool:
        if self.other_fails:
            return True
        if self.value is None:
            return False
        return self.value >= self.bound if self.measure in AT_LEAST else self.value <= self.bound


def _row(record: Record, name: str) -> Record | None:
    row = record["contestants"].get(name)
    return row if row is not None and "ratio" in row else None


def _extra_bytes(record: Record, name: str) -> float | None:
    row, plain = _row(record, name), _row(record, "plain")
    if row is None or plain is None:
        return None
    return statistics.median(row["peak_bytes"]) - statistics.median(plain["peak_bytes"])


def value(record: Record, measure: str) -> float | None:
    """What was measured, in the words of `WORDS`."""
    ours = _row(record, "pergrad")
    if ours is None:
        return None
    if measure == "time":
        return ours["ratio"]["median"]
    if measure == "memory":
        return ours["memory_ratio"]
    if measure == "first over again":
        return ours["first_over_again"]
    if measure in AT_LEAST:
        other = _row(record, measure.split()[0])
        return None if other is None else other["ratio"]["median"] / ours["ratio"]["median"]
    if measure == "memory of vmap":
        own, theirs = _extra_bytes(record, "pergrad"), _extra_bytes(record, "vmap")
        return None if own is None or theirs is None or theirs <= 0 else own / theirs
    raise KeyError(measure)


def _fails(record: Record, measure: str) -> bool:
    name = {"vmap slower": "vmap", "memory of vmap": "vmap", "opacus slower": "opacus"}.get(measure)
    row = record["contestants"].get(name) if name else None
    return row is not None and row["failure"] is not None


def outcomes(record: Record) -> list[Outcome]:
    """Every bound of a workload."""
    return [
        Outcome(
            record["workload"], measure, bound, claim,
            value(record, measure), _fails(record, measure),
        )
        for measure, bound, claim in record["targets"]
    ]  # fmt: skip


def faster(record: Record) -> list[str]:
    """Contestants that computed what was asked in less time than pergrad."""
    ours = _row(record, "pergrad")
    if ours is None:
        return []
    return [
        name
        for name, row in record["contestants"].items()
        if name != "pergrad"
        and CONTESTANTS[name].computes
        and CONTESTANTS[name].peer
        and "ratio" in row
        and row["ratio"]["median"] < ours["ratio"]["median"]
    ]
