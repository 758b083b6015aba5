"""Measure the workloads, and write what was found to benchmarks/results.

    python benchmarks/run.py                                      # everything
    python benchmarks/run.py --only W2 W8-clip-gpt --contestants pergrad vmap
    python benchmarks/run.py --only W5 --profile                  # where pergrad's time goes
    python benchmarks/run.py --list

To add a model, register a `Workload` in `workloads/`; to add a contestant, write a module in
`contestants/` with a function for each task, and add a line to the list there.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch

import harness
import workloads
from contestants import CONTESTANTS, Contestant


def chosen_contestants(words: list[str] | None) -> list[Contestant]:
    """Those named; the plain step, the unit, is always among them."""
    return [c for n, c in CONTESTANTS.items() if words is None or n == "plain" or n in words]


def show(record: dict[str, Any]) -> None:
    print(f"{record['workload']}: {record['title']}  ({record['seconds']:.0f} s)")
    for name, row in record["contestants"].items():
        if row["failure"] is not None:
            print(f"  {name:<9}{row['failure'][:110]}")
            continue
        low, high = row["ratio"]["quartiles"]
        line = (
            f"  {name:<9}{row['milliseconds']['median']:9.1f} ms  {row['ratio']['median']:7.2f} of "
            f"a plain step ({low:.2f} to {high:.2f}, {row['ratio']['runs']} turns)  "
            f"memory {row['memory_ratio']:.2f}"
        )
        line += f"  error {row['error']:.0e}" if row["error"] is not None else ""
        line += f"  scaled from {row['part'][0]} of {row['part'][1]}" if row["part"] else ""
        if "first_over_again" in row:
            line += f"  first over again {row['first_over_again']:.3f}"
        print(line)
    print(flush=True)


def profile(workload: workloads.Workload) -> None:
    """torch's operators by their time, for pergrad."""
    step = workload.build(False)
    run = CONTESTANTS["pergrad"].function(workload.task)(step)
    run(step.batch)
    with torch.profiler.profile() as found:
        for _ in range(3):
            run(step.batch)
    print(workload.name)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD", help="W2, W2-gpt or W2-gpt-T128")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help=", ".join(CONTESTANTS))
    parser.add_argument("--seconds", type=float, default=15, help="of timing, for each workload")
    parser.add_argument("--rounds", type=int, default=20, help="at most")
    parser.add_argument("--batches", type=int, help="at most, of different lengths")
    parser.add_argument("--memory", type=int, default=7, help="processes for the peak memory")
    parser.add_argument("--patience", type=float, default=120, help="seconds for one repetition")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON")
    parser.add_argument("--tiny", action="store_true", help="the size that tests use")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    words = [w.rstrip(",") for part in args.only or () for w in part.split(",") if w] or None
    names = [n for part in args.contestants or () for n in part.split(",") if n] or None
    found = list(workloads.chosen(words))
    unknown = [w for w in words or () if not list(workloads.chosen([w]))]
    unknown += [n for n in names or () if n not in CONTESTANTS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    effort = harness.Effort(args.seconds, args.rounds, args.memory, args.batches, args.patience)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5 and not args.list:
        print(f"This machine is busy (load {load:.1f}): these timings are worth little.")
    for workload in found:
        if args.list:
            print(f"{workload.name:<22}{workload.title}")
        elif args.profile:
            profile(workload)
        else:
            competing = [c for c in chosen_contestants(names) if c.runs(workload)]
            record = harness.measure(workload, competing, effort, tiny=args.tiny)
            harness.save(workload.name, record, args.out)
            show(record)


if __name__ == "__main__":
    main()
