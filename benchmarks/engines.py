"""Claim: with one worker of Ray a block takes no longer than with the local engine, plus 2 ms.

What a scan on Ray costs beyond the scoring itself: starting workers, once, and handing out blocks
and taking in rows, for each block. Measured on two perceptrons, one so small that hardly anything
but the engine is left; the rows of all engines are compared first, bit by bit. With two workers the
time per block says what there is to gain, if two processors are free.

    python benchmarks/engines.py
    python benchmarks/engines.py --rounds 1 --blocks 40      # a quick look
"""

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import harness
import pergrad
from pergrad.scans.runners.local import Local
from pergrad.scans.runners.ray import OnRay
from pergrad.scans.scorer import prepared
from pergrad.scans.work import Settings, Work

MORE_MS = 2.0
SIZES = {"small": (32, 64, 256), "larger": (256, 1024, 1024)}  # inputs, width, batch size
ENGINES = {"local": Local(), "1 worker": OnRay(1), "2 workers": OnRay(2)}


class Tensors:
    """A data set in memory that hands out many items at once."""

    def __init__(self, count: int, inputs: int) -> None:
        self.x, self.y = torch.randn(count, inputs), torch.randint(10, (count,))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.x[indices], self.y[indices]


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def as_it_is(batch: Any) -> Any:
    return batch


def work(inputs: int, width: int, batch_size: int, blocks: int) -> Work:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )
    data = Tensors(blocks * batch_size, inputs)
    return Work(pergrad.Job(model, data, losses, collate=as_it_is), Settings(batch_size))


def run(engine: Any, task: Work, keep: Callable[[pa.Table], None]) -> tuple[float, float]:
    """Seconds until the first rows, and from there for each further block."""
    size, arrived = task.settings.batch_size, []

    def write(rows: pa.Table) -> None:
        arrived.append(time.perf_counter())
        keep(rows)

    blocks = [range(lo, lo + size) for lo in range(0, len(task.job), size)]
    start = time.perf_counter()
    with prepared(task.job.model, "eval"):
        engine.run(task, blocks, write, lambda size: None)
    return arrived[0] - start, (arrived[-1] - arrived[0]) / (len(blocks) - 1)


def compare(task: Work, rounds: int) -> dict[str, Any]:
    """All engines in turn, after they have been found to give the same rows."""
    tables = {}
    for name, engine in ENGINES.items():
        found: list[pa.Table] = []
        run(engine, task, found.append)
        tables[name] = pa.concat_tables(found).sort_by("index")
    assert all(table.equals(tables["local"]) for table in tables.values())
    start: dict[str, list[float]] = {name: [] for name in ENGINES}
    block: dict[str, list[float]] = {name: [] for name in ENGINES}
    for _ in range(rounds):
        for name, engine in ENGINES.items():
            first, each = run(engine, task, lambda rows: None)
            start[name].append(first)
            block[name].append(each * 1000)
    return {
        name: {
            "start_seconds": harness.Spread.of(start[name]).record(2),
            "block_ms": harness.Spread.of(block[name]).record(2),
        }
        for name in ENGINES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=200)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"claims": {"more_ms": MORE_MS}, "environment": harness.environment()}
    clock = time.perf_counter()
    ray.init("local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    record["ray_start_seconds"] = round(time.perf_counter() - clock, 1)
    for name, (inputs, width, batch_size) in SIZES.items():
        record[name] = compare(work(inputs, width, batch_size, args.blocks), args.rounds)
        for engine, found in record[name].items():
            print(f"{name:7s} {engine:10s} {found}", flush=True)
    ray.shutdown()
    print(f"saved {harness.save('engines', record, args.out)}")


if __name__ == "__main__":
    main()
