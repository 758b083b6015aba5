"""Claim: the cost of norms grows linearly in the examples, and in the positions once they are many.

    python benchmarks/scaling.py        # a minute; then benchmarks/plots.py draws it

Positions T: a Gram costs T², so it is used only while it is cheaper than forming the gradients,
which costs T. Attention itself costs T², with and without pergrad; so one model here has none.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
from contestants import CONTESTANTS
from workloads import Step
from workloads.gpt import gpt
from workloads.mlp import mlp

EXAMPLES = [8, 16, 32, 64, 128, 256, 512, 1024]
POSITIONS = [16, 32, 64, 128, 256, 512, 1024, 2048]


def positionwise(examples: int, length: int) -> Step:
    """A perceptron at every position, the loss averaged over them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))

    def loss(call: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (call(x) - y).square().mean((1, 2))

    x, y = torch.randn(2, examples, length, 256)
    return Step(model, (x, y), loss)


def small_gpt(examples: int, length: int) -> Step:
    return gpt(examples, length, width=256, layers=2, heads=4)


SERIES: list[tuple[str, str, list[int], Callable[[int], Step]]] = [
    ("perceptron of W1", "examples B", EXAMPLES, mlp),
    ("GPT, 2 layers, width 256, T=16", "examples B", EXAMPLES, lambda B: small_gpt(B, 16)),
    ("perceptron at each position, B=4", "positions T", POSITIONS, lambda T: positionwise(4, T)),
    ("GPT, 2 layers, width 256, B=2", "positions T", POSITIONS, lambda T: small_gpt(2, T)),
]


def milliseconds(step: Step, seconds: float) -> dict[str, float]:
    """Medians of interleaved repetitions in this process, after a warm-up."""
    runs = {name: CONTESTANTS[name].function("norms")(step) for name in ("plain", "pergrad")}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(step.batch)
    begun = time.perf_counter()
    while len(taken["plain"]) < 3 or (
        time.perf_counter() - begun < seconds and len(taken["plain"]) < 50
    ):
        for name, run in runs.items():
            start = time.perf_counter()
            run(step.batch)
            taken[name].append(time.perf_counter() - start)
    return {name: round(1e3 * statistics.median(found), 3) for name, found in taken.items()}


def exponent(values: list[int], found: list[float]) -> float:
    """The slope of a straight line through the upper half, on logarithmic axes."""
    half = len(values) // 2
    xs, ys = ([math.log(x) for x in each[half:]] for each in (values, found))
    return round(statistics.linear_regression(xs, ys).slope, 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="for each point, about")
    parser.add_argument("--largest", type=int, default=2048, help="examples or positions")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON")
    args = parser.parse_args()
    started, series = harness.environment(), []
    for title, axis, values, build in SERIES:
        values = [v for v in values if v <= args.largest]
        found: dict[str, list[float]] = {"plain": [], "pergrad": []}
        for value in values:
            for name, taken in milliseconds(build(value), args.seconds).items():
                found[name].append(taken)
        one: dict[str, Any] = {"title": title, "axis": axis, "values": values}
        one["milliseconds"] = found
        one["exponents"] = {name: exponent(values, taken) for name, taken in found.items()}
        series.append(one)
        print(f"{title}: exponents over the upper half {one['exponents']}", flush=True)
    path = harness.save("scaling", {"environment": started, "series": series}, args.out)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
