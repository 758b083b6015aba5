"""Target: a million examples past 16 queries, killed ten times: right, in memory that stays.

A perceptron 256-512-512-10, every pair kept. The process is killed without warning at ten examples
on the way, and started again each time. Its scores equal those of an undisturbed run, and of a
sample those of a backward pass per example. Its memory is that of the model, the queries and the
scores that wait for a file: it does not grow after the first fifth of the examples.

    python benchmarks/million.py                            # inner products, three minutes
    python benchmarks/million.py --method ekfac             # twenty
    python benchmarks/million.py --examples 20000 --kills 3
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harness
import pergrad

QUERIES, FITTED, BATCH, SAMPLE = 16, 2000, 1000, 50
SAME = 2e-5  # of the largest score: float32, with other batches after a kill
GROWTH = 0.05  # of the memory, from a fifth of the examples on
SHARES = (0.01, 0.2, 0.5)  # of the examples, at which memory is looked at


def peak() -> int:
    """Bytes, the most that there were in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Examples:
    """Inputs and labels made from their numbers, so that a million of them take no memory."""

    def __init__(self, rows: range, deaths: Path = Path(), at: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(1)
        self.one = torch.randn(1009, 256, generator=generator)
        self.other = torch.randn(1013, 256, generator=generator)
        self.rows, self.deaths, self.at = rows, deaths, at
        self.peaks: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([i])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        for share in SHARES:
            if len(indices) > 1 and indices[0] >= share * len(self.rows):
                self.peaks.setdefault(f"{share:.0%}", peak())
        for i in self.at:
            if i in range(indices[0], indices[-1] + 1) and not (self.deaths / str(i)).exists():
                (self.deaths / str(i)).touch()  # once, and nobody who dies remembers
                os.kill(os.getpid(), signal.SIGKILL)
        numbers = torch.tensor([self.rows[i] for i in indices])
        return self.one[numbers % 1009] + self.other[numbers % 1013], numbers % 10


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def job(data: Any) -> pergrad.Job:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    return pergrad.Job(
        model, data, losses, collate=lambda batch: batch, outputs=lambda m, batch: m(batch[0])
    )


def fitted(method: str, folder: Path) -> dict[str, Any]:
    """What `influence` is told of a curvature."""
    if method == "dots":
        return {}
    task = job(Examples(range(FITTED)))
    return {"curvature": pergrad.curvature(task, folder / "fit", progress=False), "refine": 0}


def scored(method: str, count: int, folder: Path, at: tuple[int, ...]) -> None:
    """In a process of its own: score what is missing."""
    torch.set_num_threads(1)
    (folder / "deaths").mkdir(parents=True, exist_ok=True)
    options = fitted(method, folder)
    task = job(Examples(range(count), folder / "deaths", at))
    before = peak()
    pergrad.influence(task, asked(), folder / "found", **options, batch_size=BATCH, progress=False)
    print(json.dumps({"memory": {"before": before, **task.data.peaks, "100%": peak()}}))


def asked() -> Examples:
    """The queries."""
    return Examples(range(5_000_000, 5_000_000 + 7919 * QUERIES, 7919))


def through(method: str, count: int, folder: Path, at: tuple[int, ...] = ()) -> dict[str, Any]:
    """Start it again until it is done."""
    words = [sys.executable, __file__, "--part", str(folder), "--examples", str(count)]
    words += ["--method", method]
    start, killed = time.perf_counter(), 0
    while True:
        done = subprocess.run(
            [*words, "--at", *map(str, at)], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode == 0:
            break
        if done.returncode != -signal.SIGKILL:
            sys.exit(f"it stopped with {done.returncode}")
        killed += 1
    seconds = round(time.perf_counter() - start, 1)
    return {"seconds": seconds, "killed": killed, **json.loads(done.stdout)}


def by_the_loop(method: str, folder: Path, count: int) -> tuple[Tensor, list[int]]:
    """(Q, sample): scores from a backward pass for each example, and of whom."""
    chosen = [int(i) for i in torch.linspace(0, count - 1, SAMPLE)]
    every, model = Examples(range(count)), job(Examples(range(count))).model
    params = dict(model.named_parameters())

    def rows(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {n: [] for n in params}
        for each in items:
            loss = losses(model, each).sum()
            for n, g in zip(found, torch.autograd.grad(loss, list(params.values())), strict=True):
                found[n].append(g)
        return {n: torch.stack(each) for n, each in found.items()}

    queries = asked()
    K, G = rows([queries[q] for q in range(QUERIES)]), rows([every[i] for i in chosen])
    options = fitted(method, folder)
    if options:
        K = {n: t / FITTED for n, t in options["curvature"].solve_rows(K).items()}
    return sum(K[n].double().flatten(1) @ G[n].double().flatten(1).mT for n in G), chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--method", choices=["dots", "ekfac"], default="dots")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--at", type=int, nargs="*", default=[], help=argparse.SUPPRESS)
    given = parser.parse_args()
    count = given.examples
    if given.part:
        scored(given.method, count, given.part, tuple(given.at))
        return
    at = tuple(count * (2 * k + 1) // (2 * given.kills) + 17 * k for k in range(given.kills))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        killed = through(given.method, count, folder / "killed", at)
        whole = through(given.method, count, folder / "whole")
        found, want = (
            pergrad.Influence(folder / each / "found").scores for each in ("killed", "whole")
        )
        assert found.shape == (QUERIES, count)
        loop, chosen = by_the_loop(given.method, folder / "killed", count)
        scale = float(want.abs().max())
        off = float((found - want).abs().max()) / scale
        off_loop = float((found[:, chosen].double() - loop).abs().max()) / scale
    record = {
        "environment": {**harness.environment(), "threads": 1},
        "method": given.method, "examples": count, "queries": QUERIES, "batch": BATCH,
        "killed": killed, "whole": whole,
        "off_undisturbed": off, "off_loop": off_loop, "compared_with_the_loop": len(chosen),
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    assert killed["killed"] == given.kills, killed
    assert off <= SAME, off
    assert off_loop <= SAME, off_loop
    growth = whole["memory"]["100%"] / whole["memory"]["20%"] - 1
    print(f"memory: {growth:+.1%} from a fifth of the examples on")
    print(f"saved {harness.save('million', record, given.out)}")
    assert growth <= GROWTH, growth


if __name__ == "__main__":
    main()
