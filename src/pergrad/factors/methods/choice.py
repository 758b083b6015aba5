"""Exact ways to take norms, and which of them costs the least.

Owns: `Method`, all that is said of one way, and `cheapest`, which every choice among them goes by.
Does not know: any method, what the sizes are that a cost is counted from.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pergrad.factors.constants import Constants


@dataclass(frozen=True, slots=True)
class Method:
    """One exact way to take norms. Its entry among the METHODS of a kind is all that it takes.

    The sizes that the first functions are handed are those of the kind, see there.
    """

    name: str  # as `explain` shows it
    available: Callable[[Any], bool]  # sizes -> whether it can be taken
    time: Callable[[Any, Constants], float]  # sizes -> in multiply-adds of a large product
    count: Callable[[Any, Constants], int]  # sizes -> its own multiply-adds, for one example
    norms: Callable[..., Any]  # takes them
    tells_sums: bool = False  # whether it tells the norms of sums over positions, too


def cheapest(methods: Iterable[Method], sizes: Any, by: Constants) -> Method:
    """The one that takes the least time of those available; of equals the first."""
    best, least = None, 0.0
    for method in methods:
        if method.available(sizes):
            time = method.time(sizes, by)
            if best is None or time < least:
                best, least = method, time
    assert best is not None
    return best
