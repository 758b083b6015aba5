"""Fair timings and memory of per-example gradient norms, against a plain training step.

Owns: how things are measured. Runs of all contestants are interleaved, in a new random order each
round, in one process after a warm-up; a ratio is taken within a round, so that a machine that slows
down slows both sides; medians and quartiles are kept. Memory is the peak of a fresh child process.
Every run first compares the norms with a loop over the examples in float64.

Does not know: which models and methods there are. Those register themselves: see `norms.py`.
"""

import copy
import datetime
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"

# Largest deviation of a norm from the float64 loop, relative to that norm. Float32 autograd itself
# is at about 1e-6 on these models; a wrong method is off by far more than this.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Step:
    """A model, a batch, and how to get one loss per example."""

    model: nn.Module
    batch: tuple[Tensor, ...]
    loss: Callable[..., Tensor]  # (call the model, *batch) -> (B,)

    def losses(self) -> Tensor:
        return self.loss(self.model, *self.batch)


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    build: Callable[[], Step]
    time_claim: float | None  # norms take at most this share of a plain step
    memory_claim: float | None


@dataclass(frozen=True)
class Contestant:
    """One way to get something out of a step; `run` returns the norms (B,) if it computes them."""

    name: str
    title: str
    run: Callable[[Step], Tensor | None]
    rounds: int | None  # at most so many rounds, for slow ones
    memory: bool  # whether its peak memory is measured


WORKLOADS: dict[str, Workload] = {}
CONTESTANTS: dict[str, Contestant] = {}


def workload(
    name: str, title: str, *, time: float | None = None, memory: float | None = None
) -> Callable[[Callable[[], Step]], Callable[[], Step]]:
    """Register a function that builds a step; `time` and `memory` are what is claimed of it."""

    def add(build: Callable[[], Step]) -> Callable[[], Step]:
        WORKLOADS[name] = Workload(name, title, build, time, memory)
        return build

    return add


def contestant(
    name: str, title: str, *, rounds: int | None = None, memory: bool = False
) -> Callable[[Callable[[Step], Tensor | None]], Callable[[Step], Tensor | None]]:
    """Register a function that runs a step its way. The one called "plain" is the measure."""

    def add(run: Callable[[Step], Tensor | None]) -> Callable[[Step], Tensor | None]:
        CONTESTANTS[name] = Contestant(name, title, run, rounds, memory)
        return run

    return add


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        if len(values) < 2:
            return cls(values[0], values[0], values[0], len(values))
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    def record(self, digits: int) -> dict[str, float]:
        return {
            "median": round(self.median, digits),
            "quartiles": [round(self.low, digits), round(self.high, digits)],
            "runs": self.runs,
        }


@dataclass
class Timings:
    seconds: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)


def timings(step: Step, chosen: list[Contestant], *, warmup: int, rounds: int) -> Timings:
    """Interleaved runs on one step; the slow contestants apart, so that they disturb no other."""
    found = Timings({c.name: [] for c in chosen}, {c.name: [] for c in chosen})
    fast = [c for c in chosen if c.rounds is None]
    _interleave(step, fast, warmup, rounds, found)
    for c in chosen:
        if c.rounds is not None:
            aside = Timings({**found.seconds, "plain": []}, {**found.ratios, "plain": []})
            _interleave(step, [CONTESTANTS["plain"], c], 1, min(c.rounds, rounds), aside)
    return found


def _interleave(
    step: Step, chosen: list[Contestant], warmup: int, rounds: int, found: Timings
) -> None:
    for _ in range(warmup):
        for c in chosen:
            c.run(step)
    gc.collect()
    gc.freeze()  # what is alive now stays alive: no need for the collector to look at it again
    order = random.Random(0)
    for _ in range(rounds):
        taken = {}
        for c in order.sample(chosen, len(chosen)):
            start = time.perf_counter()
            c.run(step)
            taken[c.name] = time.perf_counter() - start
        for name, seconds in taken.items():
            found.seconds[name].append(seconds)
            found.ratios[name].append(seconds / taken["plain"])
    gc.unfreeze()


def alone_in_float64(step: Step) -> Tensor:
    """The norms by a forward and backward pass for every example on its own, in float64."""
    model = copy.deepcopy(step.model).double()
    params = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for i in range(step.batch[0].shape[0]):
        example = (t[i : i + 1] for t in step.batch)
        example = tuple(t.double() if t.is_floating_point() else t for t in example)
        grads = torch.autograd.grad(step.loss(model, *example)[0], params, allow_unused=True)
        norms.append(sum(float(g.square().sum()) for g in grads if g is not None) ** 0.5)
    return torch.tensor(norms, dtype=torch.float64)


def errors(step: Step, chosen: list[Contestant]) -> dict[str, float]:
    """Largest relative error of the norms of every contestant that returns them."""
    reference = alone_in_float64(step)
    found = {}
    for c in chosen:
        norms = c.run(step)
        if norms is not None:
            found[c.name] = float(((norms.double() - reference).abs() / reference).max())
    return found


# --- memory ----------------------------------------------------------------------------------


def _peak_bytes() -> int:
    """The largest resident size of this process so far."""
    # Not ru_maxrss where there is a choice: on Linux a new process starts from its parent's peak.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_child(build: Callable[[], Step], run: Callable[[Step], Any], steps: int = 3) -> None:
    """In a child process, after the imports: print the peaks as JSON."""
    imports = _peak_bytes()
    step = build()
    built = _peak_bytes()
    for _ in range(steps):
        run(step)
    print(json.dumps({"imports": imports, "built": built, "peak": _peak_bytes()}))


def peak_memory(script: Path, workload_name: str, contestant_name: str, repeats: int) -> list[int]:
    """Peak bytes above those of the imports, of `repeats` fresh processes: model, batch, steps."""
    found = []
    command = [sys.executable, str(script), "--memory-child", workload_name, contestant_name]
    for _ in range(repeats):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks = json.loads(done.stdout.splitlines()[-1])
        found.append(peaks["peak"] - peaks["imports"])
    return found


# --- the record ------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    import pergrad

    return {
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD") + _dirty(),
        "pergrad": pergrad.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parents[1], capture_output=True, text=True
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _dirty() -> str:
    return " with changes" if _git("status", "--short", "src") else ""


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def save(name: str, record: dict[str, Any], folder: Path = RESULTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def measure(
    chosen: Workload,
    script: Path,
    *,
    contestants: list[Contestant],
    warmup: int = 3,
    rounds: int = 30,
    memory_repeats: int = 5,
    folder: Path = RESULTS,
) -> dict[str, Any]:
    """Errors, times and memory of one workload, printed and saved."""
    started = environment()
    step = chosen.build()
    print(f"{chosen.name}: {chosen.title}")
    if started["load"] is not None and started["load"] > 0.5:
        print(f"  This machine is busy (load {started['load']}): these timings are worth little.")

    found = errors(step, contestants)
    for name, error in found.items():
        print(f"  {name:<10}largest relative error of a norm {error:.1e}")
        if not error <= TOLERANCE:
            raise SystemExit(f"{name} is wrong on {chosen.name}: error {error:.1e}. Nothing saved.")

    times = timings(step, contestants, warmup=warmup, rounds=rounds)
    record: dict[str, Any] = {
        "workload": chosen.name,
        "title": chosen.title,
        "claims": {"time": chosen.time_claim, "memory": chosen.memory_claim},
        "examples": len(step.batch[0]),
        "parameters": sum(p.numel() for p in step.model.parameters()),
        "environment": started,
        "contestants": {},
    }
    plain_memory = None
    for c in contestants:
        seconds, ratio = Spread.of(times.seconds[c.name]), Spread.of(times.ratios[c.name])
        row: dict[str, Any] = {
            "title": c.title,
            "milliseconds": Spread(
                *(1e3 * x for x in (seconds.median, seconds.low, seconds.high)), seconds.runs
            ).record(3),
            "ratio": ratio.record(4),
            "error": found.get(c.name),
        }
        if c.memory and memory_repeats:
            repeats = memory_repeats if c.rounds is None else 1
            peaks = peak_memory(script, chosen.name, c.name, repeats)
            median = statistics.median(peaks)
            plain_memory = median if c.name == "plain" else plain_memory
            row["peak_bytes"] = peaks
            row["memory_ratio"] = round(median / plain_memory, 4) if plain_memory else None
        record["contestants"][c.name] = row
        line = f"  {c.name:<10}{1e3 * seconds.median:9.1f} ms   {ratio.median:6.2f} of a plain step"
        line += f" ({ratio.low:.2f} to {ratio.high:.2f})"
        if "memory_ratio" in row:
            line += f"   {median / 1e6:.0f} MB, {row['memory_ratio']:.2f}"
        print(line, flush=True)
    print(f"  saved {save(chosen.name, record, folder)}")
    return record


def held(record: dict[str, Any]) -> dict[str, bool]:
    """Which of a workload's claims about `norms` hold: name of the claim -> whether."""
    ours = record["contestants"]["norms"]
    values = {"time": ours["ratio"]["median"], "memory": ours.get("memory_ratio")}
    return {
        name: values[name] is not None and values[name] <= bound
        for name, bound in record["claims"].items()
        if bound is not None
    }
