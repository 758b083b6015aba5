"""What it costs to read norms in the backward pass of a training step, in turns.

    python benchmarks/training.py                             # four models; about six minutes
    python benchmarks/training.py --workloads W1 --seconds 20
    python benchmarks/training.py --workloads W4 --add        # to the record that is there

A step is zero_grad, forward, the mean of the losses, backward, AdamW. Each way of training has a
process of its own; in each round all have a turn, in a random order, and a ratio is that of two
turns of one round. Before that, weights after some steps have to be those of the plain way to the
bit, and the norms those of a pass of their own.

Owns: the ways, their turns and the record.
Does not know: models (`workloads`), how a table is written (`tables`).
"""

import argparse
import hashlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import child
import harness
import workloads
from processes import Process

WORKLOADS = ("W1", "W0-gpt", "W6", "W4")
TURN_SECONDS = 0.5
PATIENCE = 120.0  # seconds for one answer
CHECKED = 3  # steps
EVERY = 10  # of the watched way
TOLERANCE = 1e-5

# way -> what it is, for the table. The first is what the others are divided by.
WAYS = {
    "plain": "the step alone",
    "reading": "`pergrad.reading` in every step",
    "watch": f"`pergrad.Watch(every={EVERY})`",
    "own pass": "`pergrad.norms`, then the plain backward",
}
# workload -> way -> what was asked for
BOUNDS = {
    "W1-mlp": {"reading": 1.10, "watch": 1.02},
    "W0-gpt": {"reading": 1.10, "watch": 1.02},
    "W6-encoder": {"reading": 1.10, "watch": 1.02},
    "W4-resnet": {"reading": 1.30, "watch": 1.02},
}


class Worker:
    """One way of training, in its process."""

    def __init__(self, workload: str, way: str, *, tiny: bool = False) -> None:
        import pergrad

        self.pergrad, self.way = pergrad, way
        self._folder = tempfile.TemporaryDirectory()
        self.backward: Callable[[Tensor], Any] = {
            "plain": self._plain, "reading": self._reading, "watch": self._watched,
            "own pass": self._own_pass,
        }[way]  # fmt: skip
        self.norms: Tensor | None = None
        if not tiny:  # code that is read for the first time counts as an import
            self._build(workload, "small", tiny=True)
            self._once()
        self.imports = child.peak_bytes()
        self._build(workload, "run", tiny=tiny)

    def _build(self, workload: str, name: str, *, tiny: bool) -> None:
        self.step = workloads.REGISTRY[workload].build(tiny)
        self.optimizer = torch.optim.AdamW(self.step.model.parameters(), lr=1e-4)
        out = Path(self._folder.name) / name
        self._watch = self.pergrad.Watch(out, every=EVERY) if self.way == "watch" else None

    def ready(self) -> child.Answer:
        return {"imports": self.imports, "examples": len(self.step)}

    def _plain(self, losses: Tensor) -> None:
        losses.mean().backward()

    def _reading(self, losses: Tensor) -> None:
        loss = losses.mean()
        with self.pergrad.reading(loss, self.step.model, len(losses)) as read:
            loss.backward()
        self.norms = read.norms * len(losses)

    def _watched(self, losses: Tensor) -> None:
        loss = losses.mean()
        assert self._watch is not None
        with self._watch(loss, self.step.model, len(losses)) as read:
            loss.backward()
        if read is not None:
            self.norms = read.norms * len(losses)

    def _own_pass(self, losses: Tensor) -> None:
        self.norms = self.pergrad.norms(losses, self.step.model, retain_graph=True)
        losses.mean().backward()

    def _once(self) -> None:
        self.optimizer.zero_grad()
        self.backward(self.step.losses())
        self.optimizer.step()

    def first(self) -> child.Answer:
        """Some steps, their seconds, the norms of the first, and a digest of the weights."""
        seconds, norms = [], None
        for n in range(CHECKED):
            start = time.perf_counter()
            self._once()
            seconds.append(time.perf_counter() - start)
            if n == 0 and self.norms is not None:
                norms = self.norms.tolist()
        bits = hashlib.sha256()
        for p in self.step.model.parameters():
            bits.update(p.detach().contiguous().view(torch.uint8).numpy().tobytes())
        failures = [] if self._watch is None else self._watch.failures
        return {"seconds": seconds, "norms": norms, "weights": bits.hexdigest(),
                "failures": failures}  # fmt: skip

    def turn(self, steps: int) -> child.Answer:
        """The mean of so many steps, after one to get warm again."""
        if self.way != "watch":  # there that one would be the watched one of ten
            self._once()
        start, used = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self._once()
        return {"seconds": (time.perf_counter() - start) / steps,
                "processor": (time.process_time() - used) / steps}  # fmt: skip


def measure(
    workload: workloads.Workload, seconds: float, rounds: int, *, tiny: bool = False
) -> dict[str, Any]:
    """Ratios to the plain step of every way."""
    started = harness.environment()
    processes = {way: Process(workload.name, way, tiny=tiny, script=Path(__file__)) for way in WAYS}
    try:
        ready = {way: process.answer(PATIENCE) for way, process in processes.items()}
        first = {way: process.ask("first", seconds=PATIENCE) for way, process in processes.items()}
        error = _check(workload.name, first)
        once = min(first["plain"]["seconds"])
        steps = max(1, round(TURN_SECONDS / once))
        whole = EVERY * max(1, steps // EVERY)  # every tenth step is in each turn as often
        counts = {way: whole if way == "watch" else min(steps, EVERY) for way in WAYS}
        taken, used, peaks = in_turns(processes, counts, seconds, rounds)
    finally:
        for process in processes.values():
            process.close()
    plain_peak = peaks["plain"] - ready["plain"]["imports"]
    return {
        "workload": workload.name,
        "title": workload.title,
        "environment": started,
        "error": error,
        "ways": {
            way: {
                "title": WAYS[way],
                "milliseconds": harness.Spread.of(taken[way]).record(3, 1e3),
                "ratio": ratios(taken[way], taken["plain"]),
                "processor_ratio": ratios(used[way], used["plain"]),
                "memory_ratio": round((peaks[way] - ready[way]["imports"]) / plain_peak, 4),
                # beyond a warm step, in plain steps: what is planned and verified once
                "first_step": round((first[way]["seconds"][0] - first["plain"]["seconds"][0])
                                    / statistics.median(taken["plain"]), 2),
                "bound": BOUNDS.get(workload.name, {}).get(way),
            }
            for way in WAYS
        },
    }  # fmt: skip


def in_turns(
    processes: dict[str, Process], steps: dict[str, int], seconds: float, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, int]]:
    """Of each way: the mean seconds of a step by the clock and of the processor, turn by turn, and
    the peak.
    """
    order, begun = random.Random(0), time.monotonic()
    taken: dict[str, list[float]] = {way: [] for way in processes}
    used: dict[str, list[float]] = {way: [] for way in processes}
    peaks = dict.fromkeys(processes, 0)
    for n in range(rounds):
        if n > 1 and time.monotonic() - begun > seconds:
            break
        for way in order.sample(list(processes), len(processes)):
            answer = processes[way].ask("turn", seconds=PATIENCE, steps=steps[way])
            taken[way].append(answer["seconds"])
            used[way].append(answer["processor"])
            peaks[way] = max(peaks[way], answer["peak"])
    return taken, used, peaks


def ratios(one: list[float], other: list[float]) -> dict[str, Any]:
    """Turn by turn."""
    return harness.Spread.of([a / b for a, b in zip(one, other, strict=True)]).record(4)


def _check(name: str, first: dict[str, dict[str, Any]]) -> float:
    """Equal weights, equal norms: the largest relative deviation of these."""
    own = torch.tensor(first["own pass"]["norms"], dtype=torch.float64)
    largest = 0.0
    for way, answer in first.items():
        if answer["failures"]:
            raise SystemExit(f"{name}, {way}: {answer['failures'][0]}")
        # a pass of one's own changes no gradient either
        if answer["weights"] != first["plain"]["weights"]:
            raise SystemExit(f"{name}: the weights of {way!r} are not those of the plain step.")
        if answer["norms"] is not None:
            off = (torch.tensor(answer["norms"], dtype=torch.float64) - own) / own
            largest = max(largest, float(off.abs().max()))
    if not largest <= TOLERANCE:
        raise SystemExit(f"{name}: norms differ by {largest:.1e}.")
    return largest


def command(
    name: str,
    doc: str,
    names: tuple[str, ...],
    measured: Callable[..., dict[str, Any]],
    said: Callable[[dict[str, Any]], str] = lambda record: "",
) -> None:
    """Measure the workloads asked for, say what was found, and save it under this name."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", default=names, metavar="WORKLOAD")
    parser.add_argument("--seconds", type=float, default=80, help="for each workload, about")
    parser.add_argument("--rounds", type=int, default=15, help="at most")
    parser.add_argument("--tiny", action="store_true", help="the size that tests use")
    parser.add_argument("--add", action="store_true", help="keep the record's other workloads")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON")
    args = parser.parse_args()
    path = args.out / f"{name}.json"
    records = json.loads(path.read_text())["workloads"] if args.add and path.exists() else []
    for workload in workloads.chosen(list(args.workloads)):
        record = measured(workload, args.seconds, args.rounds, tiny=args.tiny)
        records = [r for r in records if r["workload"] != workload.name] + [record]
        words = ", ".join(f"{w} {r['ratio']['median']:.3f}" for w, r in record["ways"].items())
        print(f"{workload.name:<12} {words}{said(record)}", flush=True)
        harness.save(name, {"workloads": records}, args.out)


def main() -> None:
    command("training", __doc__, WORKLOADS, measure)


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[2] in WAYS:  # a process of `measure`
        child.serve(lambda: Worker(sys.argv[1], sys.argv[2], tiny="--tiny" in sys.argv))
    else:
        main()
