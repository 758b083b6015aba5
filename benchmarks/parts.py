"""Claim: 3,000 parts of scores are open in a second, and cost at most 5 ms each to write.

    python benchmarks/parts.py

Parts are this many only after days: one holds what was scored in ten seconds, or 65,536 examples.
Here each holds a batch of 16. What writing costs is the time of that scan less that of the same
scan into one part, in turns in one process, divided by the parts: with all that is forced to the
disk, so it depends on that. Beside it is how long the disk takes to force one small file.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import harness
import pergrad
from pergrad.scans import writer

CLAIMS = {"open_seconds": 1.0, "writing_milliseconds": 5.0}
BATCH = 16


def job(count: int) -> pergrad.Job:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    return pergrad.Job(model, list(torch.randn(count, 8)), lambda model, x: model(x).squeeze(1))


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def scanned(task: pergrad.Job, folder: Path, rows: int) -> float:
    """Seconds of a scan into parts of so many rows."""
    shutil.rmtree(folder, ignore_errors=True)
    usual, writer.ROWS_PER_PART = writer.ROWS_PER_PART, rows
    try:
        return seconds(lambda: pergrad.scan(task, folder, batch_size=BATCH, progress=False))
    finally:
        writer.ROWS_PER_PART = usual


def force(folder: Path) -> None:
    """A small file, forced to the disk."""
    with open(folder / "forced", "wb") as file:
        file.write(bytes(3000))
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; by default the system's")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON")
    args = parser.parse_args()
    started = harness.environment()
    task = job(args.parts * BATCH)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        many, one = Path(name) / "many", Path(name) / "one"
        scanned(task, one, len(task) + 1)
        turns = [
            (scanned(task, one, len(task) + 1), scanned(task, many, BATCH))
            for _ in range(args.rounds)
        ]
        found = len(list((many / "parts").iterdir()))
        assert found == args.parts
        table = pergrad.open_scores(many).table()
        assert table.equals(pergrad.open_scores(one).table())
        opening = [
            seconds(lambda: pergrad.open_scores(many).table()) for _ in range(5 * args.rounds)
        ]
        forcing = [seconds(lambda: force(Path(name))) for _ in range(50)]
    record = {
        "claims": CLAIMS,
        "environment": started,
        "parts": found,
        "examples": len(task),
        "one_part_seconds": harness.Spread.of([alone for alone, _ in turns]).record(2),
        "writing_milliseconds": harness.Spread.of(
            [1e3 * (parts - alone) / found for alone, parts in turns]
        ).record(2),
        "open_seconds": harness.Spread.of(opening).record(3),
        "forcing_milliseconds": harness.Spread.of([1e3 * s for s in forcing]).record(2),
    }
    for name in ("writing_milliseconds", "open_seconds", "forcing_milliseconds"):
        print(f"{name}: {record[name]}")
    print(f"saved {harness.save('parts', record, args.out)}")


if __name__ == "__main__":
    main()
