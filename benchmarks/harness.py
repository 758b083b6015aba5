"""Fair timings and memory of everyone on one workload.

Owns: how things are measured. Every contestant has a process of its own; in every round each is
asked in turn, in a new random order, for one timed repetition (several of short ones), so that a
machine that slows down slows all; a ratio is taken within a round; medians and quartiles are kept.
Memory is the peak of the process. What a contestant computes is compared with the loop in float64,
and one that is wrong is not timed.

Does not know: which models and contestants there are, or what is claimed of them.
"""

import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contestants import Contestant
from processes import FailedError, Process
from workloads import TASKS, Workload

RESULTS = Path(__file__).parent / "results"

# Largest error allowed, relative to the norms. Float32 autograd itself is at about 1e-6 on these
# models, and at 1e-5 on an inner product of two; a wrong method is off by far more than this.
TOLERANCE = 1e-4

# A turn begins with a repetition that is not recorded: while the others had theirs, the caches have
# gone to them, and a training loop is warm. It goes on for about this long.
TURN_SECONDS = 0.6
WARM_SECONDS = 1.0  # only repetitions longer than this are timed cold
BRIEF_SECONDS = 2.0  # the peak of shorter ones is looked at in other processes, too
SCALED_SECONDS = 1.5  # what is proportional to the examples is timed on as many as fit into this


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float = 15  # of timing, for each workload, about
    rounds: int = 20  # at most
    memory: int = 7  # processes whose peaks are taken, of small workloads; three of larger ones
    batches: int | None = None  # at most, of different lengths
    patience: float = 120  # seconds; who takes longer for one answer is stopped


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

    def record(self, digits: int, scale: float = 1.0) -> dict[str, Any]:
        return {
            "median": round(self.median * scale, digits),
            "quartiles": [round(self.low * scale, digits), round(self.high * scale, digits)],
            "runs": self.runs,
        }


# --- correctness -----------------------------------------------------------------------------


def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest deviation from the reference, relative to the gradients' norms.

    The reference has some of the examples ("rows", and "columns" on the other side), and those of
    them count that the contestant computed.
    """
    rows = want["rows"]
    rows = rows[rows < len(got.get("norms", got.get("values", rows)))]
    n, found = len(rows), [0.0]
    if "norms" in want:
        expected = want["norms"][:n]
        found.append(_largest((got["norms"][rows].double() - expected) / expected))
    if "values" in want:
        values, expected, scale = got["values"][rows].double(), want["values"][:n], want["left"][:n]
        if "columns" in want:
            columns = want["columns"]
            columns = columns[columns < values.shape[1]]
            values, expected = values[:, columns], expected[:, : len(columns)]
            scale = scale[:, None] * want["right"][: len(columns)]
        found.append(_largest((values - expected) / scale))
    if "sum" in want and len(got["norms"]) == len(want["norms"]):
        expected = want["sum"]
        found.append(_largest((got["sum"].double() - expected).norm() / expected.norm()))
    return max(found)


def allowed(want: dict[str, Tensor]) -> float:
    """The largest error that is rounding's: twice that of torch's own gradient, if known."""
    return max(TOLERANCE, 2 * float(want.get("of autograd", 0.0)))


def _largest(x: Tensor) -> float:
    return float(x.abs().nan_to_num(nan=float("inf")).max()) if x.numel() else 0.0


# --- one workload ----------------------------------------------------------------------------


@dataclass
class Runner:
    """A contestant at work."""

    contestant: Contestant
    process: Process
    patience: float
    imports: int = 0
    examples: int = 0
    part: int | None = None  # so many examples are timed, and the time scaled
    once: float = 0.0  # seconds of a repetition
    spent: float = 0.0
    peak: int = 0
    error: float | None = None
    failure: str | None = None
    seconds: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.contestant.name

    @property
    def scale(self) -> float:
        return self.examples / self.part if self.part else 1.0

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        start = time.monotonic()
        found = self.process.ask(do, seconds=self.patience, **more)
        self.spent += time.monotonic() - start
        self.peak = max(self.peak, found["peak"])
        return found

    def turn(self) -> float:
        """The median time of the repetitions of one turn."""
        repeats = max(1, min(10, int(TURN_SECONDS / max(self.once, 1e-4))))
        warm = int(self.once < WARM_SECONDS)
        found = self.ask("turn", repeats=repeats, warm=warm, examples=self.part)["all"]
        return statistics.median(found) * self.scale

    def fail(self, failure: str) -> None:
        self.failure = failure
        self.process.close()


@contextmanager
def _running(
    workload: Workload, chosen: list[Contestant], effort: Effort, *, tiny: bool
) -> Iterator[list[Runner]]:
    """Processes of all contestants, set up: at once, since nothing is timed yet."""
    runners = [
        Runner(c, Process(workload.name, c.name, tiny=tiny), effort.patience) for c in chosen
    ]
    try:
        for r in runners:
            try:
                ready = r.process.answer(effort.patience)
                r.imports, r.examples = ready["imports"], ready["examples"]
            except FailedError as error:
                r.fail(str(error))
        yield runners
    finally:
        for r in runners:
            r.process.close()


def _reference(
    workload: Workload, folder: Path, batches: int, effort: Effort, *, tiny: bool
) -> dict[str, Any]:
    process = Process(workload.name, "reference", tiny=tiny)
    try:
        about = process.answer(effort.patience)
        process.ask("first", seconds=10 * effort.patience, save=str(folder / "want"))
        if workload.task == "norms":
            counts = process.ask("multiply_adds", seconds=effort.patience)
            about["multiply_adds"] = {who: counts[who] for who in ("plain", "pergrad")}
        for k in range(batches):
            process.ask(
                "batch", seconds=10 * effort.patience, index=k, save=str(folder / f"want{k}")
            )
    except FailedError as error:
        raise SystemExit(f"No reference for {workload.name}: {error}\n{process.printed}") from None
    finally:
        process.close()
    return about


def _first(r: Runner, folder: Path) -> None:
    """One repetition, compared with the reference; a part of the examples for the linear ones."""
    path = folder / r.name
    if r.contestant.linear and r.examples > 4:
        r.part = 4
        r.ask("first", examples=r.part)
        each = r.ask("first", examples=r.part)["seconds"] / r.part
        r.part = max(4, min(r.examples, int(SCALED_SECONDS / each)))
        r.part = None if r.part == r.examples else r.part
    r.once = r.ask("first", examples=r.part, save=str(path))["seconds"]
    _compare(r, path, folder / "want")


def _compare(r: Runner, got: Path, want: Path) -> None:
    if not got.exists():
        return  # the plain step computes nothing to compare
    right = torch.load(want)
    found = error(torch.load(got), right)
    r.error = max(found, r.error or 0.0)
    if not found <= allowed(right):
        r.fail(f"wrong: off by {found:.1e}")


def _minimum(r: Runner) -> int:
    """Turns that everyone gets whatever they cost; more for those whose difference is looked at."""
    if r.name in ("plain", "pergrad", "by_torch", "floor"):
        return 2 if r.once > 4 else 5
    return 1 if r.once > 4 else 2 if r.once > 1 else 3


def _interleave(runners: list[Runner], effort: Effort) -> None:
    """Rounds of turns; the slow ones have had their share after a few."""
    order = random.Random(0)
    plain = next(r for r in runners if r.name == "plain")
    others = [r for r in runners if r.name not in ("plain", "pergrad")]
    share = {r.name: effort.seconds / 2 / (len(others) or 1) for r in others}
    share |= dict.fromkeys(("plain", "pergrad"), effort.seconds / 4)
    for r in runners:
        r.spent = 0.0
        _short_again(r)
    for _ in range(effort.rounds):
        active = [
            r
            for r in runners
            if r.failure is None
            and (len(r.seconds) < _minimum(r) or r.spent + r.once * r.scale < share[r.name])
        ]
        if not active or active == [plain]:
            break
        if plain not in active:
            active.append(plain)
        taken = {}
        for r in order.sample(active, len(active)):
            try:
                taken[r.name] = r.turn()
            except FailedError as error:
                r.fail(str(error))
        for r in active:
            if r.name in taken:
                r.seconds.append(taken[r.name])
                r.ratios.append(taken[r.name] / taken["plain"])


def _short_again(r: Runner) -> None:
    """The first repetition of a short one says little about how long it takes when warm."""
    if r.failure is None and r.once < 1:
        try:
            r.once = min(r.once, r.ask("turn", repeats=1, warm=1, examples=r.part)["all"][0])
        except FailedError as error:
            r.fail(str(error))


def _lengths(runners: list[Runner], count: int, checked: int, folder: Path) -> None:
    """Every batch once by everyone, each time twice: the time of the first is what is compared."""
    order = random.Random(0)
    for r in runners:
        r.spent = 0.0
    for k in range(count):
        taken = {}
        active = [r for r in runners if r.failure is None]
        for r in order.sample(active, len(active)):
            if r.name not in ("plain", "pergrad") and k >= checked and k * 6 >= count:
                continue  # a few of the batches tell what the others cost
            path = folder / f"{r.name}{k}"
            try:
                more = {"save": str(path)} if k < checked else {}
                found = r.ask("batch", index=k, **more)
                if k < checked:
                    _compare(r, path, folder / f"want{k}")
            except FailedError as error:
                r.fail(str(error))
                continue
            taken[r.name] = found["first"]
            r.seconds.append(found["first"])
            r.again.append(found["again"])
        for r in active:
            if r.name in taken:
                r.ratios.append(taken[r.name] / taken["plain"])


def _peaks(workload: Workload, r: Runner, effort: Effort, *, tiny: bool) -> list[int]:
    """Peaks above the imports': of the process that was timed, and of more if it is small.

    Where the blocks of a pass happen to lie differs by process, and peaks of the same pass by 10 %.
    """
    found = [r.peak - r.imports]
    count = 1
    if r.name in ("plain", "pergrad"):
        if found[0] < 200e6:
            count = effort.memory
        elif r.once < BRIEF_SECONDS and workload.batches is None:
            count = min(3, effort.memory)
    for _ in range(count - 1):
        process = Process(workload.name, r.name, tiny=tiny)
        try:
            imports = process.answer(effort.patience)["imports"]
            for _ in range(5):
                peak = process.ask("first", seconds=effort.patience)["peak"]
            found.append(peak - imports)
        finally:
            process.close()
    return found


def measure(
    workload: Workload, chosen: list[Contestant], effort: Effort, *, tiny: bool = False
) -> dict[str, Any]:
    """Errors, times and memory of everyone on one workload."""
    begun = time.monotonic()
    started = environment()
    count = 0
    if workload.batches is not None:
        count = len(workload.batches(tiny))
        count = count if effort.batches is None else min(effort.batches, count)
    checked = min(count, 3)
    with (
        tempfile.TemporaryDirectory() as name,
        _running(workload, chosen, effort, tiny=tiny) as runners,
    ):
        folder = Path(name)
        about = _reference(workload, folder, checked, effort, tiny=tiny)
        for r in runners:
            if r.failure is None:
                try:
                    _first(r, folder)
                except FailedError as failed:
                    r.fail(str(failed))
            if r.failure is not None and r.name in ("plain", "pergrad"):
                raise SystemExit(
                    f"{r.name} fails on {workload.name}, and nothing is saved: {r.failure}\n"
                    f"{r.process.printed}"
                )
        if count:
            _lengths(runners, count, checked, folder)
        else:
            _interleave(runners, effort)
        plain = next(r for r in runners if r.name == "plain")
        unit = statistics.median(_peaks(workload, plain, effort, tiny=tiny))
        return {
            "workload": workload.name,
            "title": workload.title,
            "task": workload.task,
            "task_title": TASKS[workload.task],
            "targets": [[t.measure, t.bound, t.claim] for t in workload.targets],
            "examples": about["examples"],
            "parameters": about["parameters"],
            "multiply_adds": about.get("multiply_adds"),
            "environment": started,
            "contestants": {
                r.name: _row(r, unit, _peaks(workload, r, effort, tiny=tiny) if r is not plain
                             else [int(unit)], whole=count > 0)
                for r in runners
            },
            "seconds": round(time.monotonic() - begun, 1),
        }  # fmt: skip


def _row(r: Runner, unit: float, peaks: list[int], *, whole: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"title": r.contestant.title, "failure": r.failure}
    if r.failure is not None or not r.seconds:
        return row
    row |= {
        "milliseconds": Spread.of(r.seconds).record(3, 1e3),
        "ratio": Spread.of(r.ratios).record(4),
        "peak_bytes": peaks,
        "memory_ratio": round(statistics.median(peaks) / unit, 4),
        "error": r.error,
        "part": [r.part, r.examples] if r.part else None,
    }
    if whole:
        row["first_over_again"] = round(sum(r.seconds) / sum(r.again), 4)
    return row


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
