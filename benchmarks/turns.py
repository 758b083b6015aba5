"""One timed turn of a call, in the process that asks for it."""

import statistics
import time
from collections.abc import Callable

BRIEF_SECONDS = 0.1  # shorter calls are repeated within a turn


def turn(call: Callable[[], object]) -> float:
    """Seconds of one repetition: the median, after one that is not counted, where it is brief."""
    times: list[float] = []
    while not times or (sum(times) < BRIEF_SECONDS and len(times) < 20):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)
