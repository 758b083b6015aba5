"""Compare two checkouts of pergrad, workload by workload, in turns.

    python benchmarks/against.py ../before .                     # about half an hour
    python benchmarks/against.py ../before . --minutes 12
    python benchmarks/against.py ../before . --workloads W0 W1 --seconds 60

OLD and NEW are folders that have `src/pergrad`; the workloads are those of this checkout. Both
have a process each, which work in turns, in a random order; a ratio is that of two turns that
followed one another. Because the same code differs by some percent from one process to the next,
several pairs of processes are measured. Peaks are those of the same processes. Besides the time on
the clock, processor time is compared: on a busy machine it says more.

Owns: turns of two checkouts, their ratios, and the table of them.
Does not know: other contestants, or what is claimed of them.
"""

import argparse
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import harness
import workloads
from processes import FailedError, Process

TURN_SECONDS = 0.3
PATIENCE = 120.0  # seconds for one answer


@dataclass
class Measured:
    """What was found of one workload, of all pairs of processes."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"old": [], "new": []})
    peaks: dict[str, list[int]] = field(default_factory=lambda: {"old": [], "new": []})
    ratios: list[float] = field(default_factory=list)
    processor_ratios: list[float] = field(default_factory=list)
    difference: float = 0.0

    def record(self, workload: workloads.Workload) -> dict[str, Any]:
        middle = {name: statistics.median(peaks) for name, peaks in self.peaks.items()}
        return {
            "workload": workload.name,
            "title": workload.title,
            "ratio": harness.Spread.of(self.ratios).record(4),
            "processor_ratio": harness.Spread.of(self.processor_ratios).record(4),
            "memory_ratio": round(middle["new"] / middle["old"], 4),
            "milliseconds": {
                name: harness.Spread.of(found).record(3, 1e3)
                for name, found in self.seconds.items()
            },
            "peak_bytes": self.peaks,
            "difference": self.difference,
        }


def pair(
    workload: workloads.Workload,
    sources: dict[str, Path],
    seconds: float,
    found: Measured,
    order: random.Random,
    *,
    tiny: bool,
) -> None:
    """One process of each checkout, in turns for so many seconds."""
    begun = time.monotonic()
    processes = {
        name: Process(workload.name, "pergrad", tiny=tiny, source=source)
        for name, source in sources.items()
    }
    try:
        imports = {}
        for name, process in processes.items():
            ready = process.answer(PATIENCE)
            _check_package(ready["package"], sources[name])
            imports[name] = ready["imports"]
        once, peaks = _first(processes, found)
        turns = _turns(workload, once, tiny=tiny)
        for n, command in enumerate(turns):
            if n and time.monotonic() - begun > seconds:
                break
            taken: dict[str, tuple[float, float]] = {}
            for name in order.sample(list(processes), len(processes)):
                answer = processes[name].ask(seconds=PATIENCE, **command)
                times = answer["all"] if "all" in answer else [answer["first"]]
                processor = answer["processor"]
                used = statistics.median(processor if isinstance(processor, list) else [processor])
                taken[name] = statistics.median(times), used
                peaks[name] = max(peaks[name], answer["peak"])
            for name, (clock, _) in taken.items():
                found.seconds[name].append(clock)
            found.ratios.append(taken["new"][0] / taken["old"][0])
            found.processor_ratios.append(taken["new"][1] / max(taken["old"][1], 1e-9))
        for name, peak in peaks.items():
            found.peaks[name].append(peak - imports[name])
    finally:
        for process in processes.values():
            process.close()


def _check_package(package: str | None, source: Path) -> None:
    if package is None or source not in Path(package).resolve().parents:
        raise SystemExit(f"A process meant for {source} imported pergrad from {package}.")


def _first(processes: dict[str, Process], found: Measured) -> tuple[float, dict[str, int]]:
    """Warm both, and compare what they compute: seconds of a repetition, and peaks."""
    once, peaks, results = 0.0, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, process in processes.items():
            path = Path(folder) / name
            process.ask("first", seconds=PATIENCE, save=str(path))
            answer = process.ask("first", seconds=PATIENCE)
            once, peaks[name] = max(once, answer["seconds"]), answer["peak"]
            results[name] = torch.load(path)
    for key, old in results["old"].items():
        size = float(old.double().norm()) or 1.0
        off = float((results["new"][key].double() - old.double()).norm()) / size
        found.difference = max(found.difference, off)
    return once, peaks


def _turns(workload: workloads.Workload, once: float, *, tiny: bool) -> list[dict[str, Any]]:
    """The commands of the turns: batches of different lengths, or the same one again and again."""
    if workload.batches is not None:
        return [{"do": "batch", "index": k} for k in range(len(workload.batches(tiny)))]
    repeats = max(1, min(10, int(TURN_SECONDS / max(once, 1e-4))))
    return [{"do": "turn", "repeats": repeats, "warm": int(once < 1)}] * 1000


def compare(
    workload: workloads.Workload,
    sources: dict[str, Path],
    seconds: float,
    pairs: int,
    *,
    tiny: bool = False,
) -> dict[str, Any]:
    """Ratios new / old of time, processor time and peak memory, and how far results differ."""
    found, order = Measured(), random.Random(0)
    for _ in range(pairs):
        pair(workload, sources, seconds / pairs, found, order, tiny=tiny)
    return found.record(workload)


def row(record: dict[str, Any], most: float) -> str:
    """One line of the table."""
    if "failure" in record:
        return f"{record['workload']:<20}  {record['failure'][:100]}"
    low, high = record["ratio"]["quartiles"]
    clock, used, memory = (
        record["ratio"]["median"], record["processor_ratio"]["median"], record["memory_ratio"]
    )  # fmt: skip
    line = (
        f"{record['workload']:<20}  {record['milliseconds']['new']['median']:8.1f} ms  "
        f"time {clock:.3f} ({low:.3f} to {high:.3f}, {record['ratio']['runs']} turns)  "
        f"processor {used:.3f}  memory {memory:.3f}  differs by {record['difference']:.0e}"
    )
    above = [name for name, value in (("slower", clock), ("larger", memory)) if value > most]
    return line + "".join(f"  {word.upper()}" for word in above)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--workloads", nargs="+", metavar="WORKLOAD", help="W2, W2-gpt or W1-mlp")
    parser.add_argument("--seconds", type=float, default=60, help="for each workload, about")
    parser.add_argument("--minutes", type=float, help="for all of them, in the place of --seconds")
    parser.add_argument("--pairs", type=int, default=3, help="processes of each, one after another")
    parser.add_argument("--most", type=float, default=1.02, help="ratios above are pointed out")
    parser.add_argument("--out", type=Path, help="a JSON file for the records")
    parser.add_argument("--tiny", action="store_true", help="the size that tests use")
    args = parser.parse_args()
    chosen = list(workloads.chosen(args.workloads))
    unknown = [w for w in args.workloads or () if not list(workloads.chosen([w]))]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    sources = {name: (getattr(args, name) / "src").resolve() for name in ("old", "new")}
    for source in sources.values():
        if not (source / "pergrad" / "__init__.py").exists():
            parser.error(f"there is no {source / 'pergrad'}: name a checkout of pergrad")
    seconds = args.seconds if args.minutes is None else 60 * args.minutes / len(chosen)
    records = []
    for workload in chosen:
        try:
            record = compare(workload, sources, seconds, args.pairs, tiny=args.tiny)
        except FailedError as error:
            record = {"workload": workload.name, "failure": str(error)}
        records.append(record)
        print(row(record, args.most), flush=True)
        if args.out is not None:
            harness.save(
                args.out.stem,
                {"environment": harness.environment(), "checkouts": {
                    name: str(source.parent) for name, source in sources.items()
                }, "workloads": records},
                args.out.parent,
            )  # fmt: skip


if __name__ == "__main__":
    main()
