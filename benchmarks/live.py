"""Compare the memory that two checkouts of pergrad have in use at most, to the byte.

    python benchmarks/live.py ../before .          # needs memray; some minutes
    python benchmarks/live.py ../before . --workloads W0 W4

Resident memory, which `against.py` compares, depends on where blocks happen to lie. Here memray
counts what one warm repetition allocates and has not freed yet; the model, the batch and what is
left of the repetitions before are not in it. A figure is the same in every run.

Owns: one process for each workload and checkout, and the table of their peaks.
Does not know: time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import contestants
import harness
import workloads


def peak_of(name: str) -> dict[str, int]:
    """What the pergrad of this process has in use at most, in one warm repetition."""
    import memray

    torch.set_num_threads(1)  # with more, what two threads have at a time is chance
    workload = workloads.REGISTRY[name]
    run = contestants.CONTESTANTS["pergrad"].function(workload.task)(step := workload.build(False))
    batch = step.batch if workload.batches is None else workload.batches(False)[0]
    run(batch)
    run(batch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "allocations"
        with memray.Tracker(path, trace_python_allocators=False):
            run(batch)
        reader = memray.FileReader(path)
        # Without Python's arenas, of which one of a MiB is due now and then; torch maps nothing.
        peak = sum(
            record.size for record in reader.get_high_watermark_allocation_records()
            if record.allocator != memray.AllocatorType.MMAP
        )  # fmt: skip
    return {"peak_bytes": peak, "allocations": reader.metadata.total_allocations}


def measured(name: str, checkout: Path) -> dict[str, int]:
    """The same of the pergrad of a checkout."""
    environment = dict(os.environ, PYTHONPATH=str(checkout / "src"))
    done = subprocess.run(
        [sys.executable, __file__, "--workload", name], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} with {checkout} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, nargs="?")
    parser.add_argument("new", type=Path, nargs="?")
    parser.add_argument("--workloads", nargs="+", metavar="WORKLOAD", help="W2, W2-gpt or W1-mlp")
    parser.add_argument("--most", type=float, default=1.02, help="ratios above are pointed out")
    parser.add_argument("--out", type=Path, help="a JSON file for the records")
    parser.add_argument("--workload", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.workload:
        print(json.dumps(peak_of(args.workload)))
        return
    if args.old is None or args.new is None:
        parser.error("name two checkouts of pergrad")
    records: list[dict[str, Any]] = []
    for workload in workloads.chosen(args.workloads):
        name = workload.name
        old, new = (measured(name, path.resolve()) for path in (args.old, args.new))
        before, after = (record["peak_bytes"] / 1e6 for record in (old, new))
        records.append(
            {"workload": name, "ratio": round(after / before, 4), "old": old, "new": new}
        )
        mark = "  LARGER" if after > args.most * before else ""
        print(
            f"{name:<20}  {before:9.2f} MB  {after:9.2f} MB  {after / before:.3f}{mark}", flush=True
        )
    if args.out is not None:
        record = {"environment": harness.environment(), "workloads": records}
        harness.save(args.out.stem, record, args.out.parent)


if __name__ == "__main__":
    main()
