"""Measure the worst case: pergrad's norms over all architectures and all models of the tests' zoo.

    python benchmarks/everything.py                     # a quarter of an hour
    python benchmarks/everything.py --only 'timm-*' 'zoo-*'
    make zoo                                            # installs what the architectures come from

A plain step is a forward and a backward pass of the sum of all losses. A loop is a forward pass and
a backward pass for each loss. All three take turns, in one thread, and the processor's time counts,
which others on the machine disturb less. The price of a model is the smaller of pergrad's plain
steps / 4 and loops / 1.2: at most 1 is what pergrad is meant to take.

Owns: the turns, the processes (each may die), and the record.
Does not know: the models, which are in tests/whole.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import harness
import pergrad

ROOT = Path(__file__).parents[1]
EXAMPLES = 16  # of a model of the zoo, which may have any number; architectures have their own
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
STEPS, LOOPS = 4.0, 1.2  # what pergrad is meant to take, whichever is less
BRIEF_SECONDS = 0.02  # shorter calls are repeated within a turn
_BEGINS = "BEGINS "

Step = tuple[Callable[[], Tensor], dict[str, Tensor]]


def models() -> dict[str, Callable[[], Step]]:
    """Every model by name; those of packages that are not installed are left out."""
    for folder in ("tests/whole", "tests", "."):
        if str(ROOT / folder) not in sys.path:
            sys.path.insert(0, str(ROOT / folder))
    from tests.whole.architectures.compare import named
    from tests.whole.architectures.models import ARCHITECTURES
    from zoo import CASES

    def architecture(case: Any) -> Step:
        problem = case.problem()
        return (lambda: problem.losses(0)), named(problem.params)

    def small(case: Any) -> Step:
        try:
            run = case.run(EXAMPLES)
        except (RuntimeError, IndexError, ValueError, AssertionError):  # takes fewer
            run = case.run(max(case.batch))
        return run.again, run.named

    found: dict[str, Callable[[], Step]] = {}
    for name, entry in ARCHITECTURES.items():
        if entry.available():
            found[name] = lambda entry=entry: architecture(entry)  # type: ignore[misc]
    for name, case in CASES.items():
        if case.deterministic and max(case.batch) > 1:
            found[f"zoo-{name}"] = lambda case=case: small(case)  # type: ignore[misc]
    return found


def measured(build: Callable[[], Step], rounds: int) -> dict[str, Any]:
    """The record of one model.

    Raises:
        ValueError: the norms are not those of the loop.
    """
    torch.manual_seed(0)
    # Where objects of earlier models are freed Python postpones its collections, and what pergrad
    # looks through at every call, its young objects, grows.
    gc.collect()
    losses, named = build()
    params = [p for p in named.values() if p.requires_grad]
    options: dict[str, Any] = {}

    def plain() -> None:
        torch.autograd.grad(losses().sum(), params, allow_unused=True)

    def ours() -> Tensor:
        return pergrad.norms(losses(), named, **options)

    def loop() -> Tensor:
        rows = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
                for loss in losses()]  # fmt: skip
        squares = [sum(_square(g) for g in row if g is not None) for row in rows]
        return torch.stack([torch.as_tensor(s) for s in squares]).sqrt()

    want = loop()
    try:
        got = ours()
    except pergrad.MixedExamplesError:
        options["on_mixing"] = "exact"
        got = ours()
    error = float((got.double() - want).abs().max() / want.max().clamp_min(1e-300))
    narrowest = max(TOLERANCES.get(p.dtype, 0.05) for p in params)
    if not error < narrowest:
        raise ValueError(f"error {error:.0e}")
    seconds: dict[str, list[float]] = {"plain": [], "pergrad": [], "loop": []}
    for _ in range(rounds):
        for name, call in (("plain", plain), ("pergrad", ours), ("loop", loop)):
            seconds[name].append(_turn(call))
    steps, loops = (
        harness.Spread.of([b / a for a, b in zip(seconds[of], seconds["pergrad"], strict=True)])
        for of in ("plain", "loop")
    )
    return {
        "losses": len(want),
        "mixes": bool(options),
        "error": float(f"{error:.1e}"),
        "plain_milliseconds": harness.Spread.of(seconds["plain"]).record(3, 1e3),
        "plain_steps": steps.record(3),
        "loops": loops.record(3),
        "price": round(min(steps.median / STEPS, loops.median / LOOPS), 3),
    }


def _turn(call: Callable[[], object]) -> float:
    """Seconds of the processor for one repetition, the median where it is brief."""
    times: list[float] = []
    while not times or (sum(times) < BRIEF_SECONDS and len(times) < 20):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def _square(g: Tensor) -> Tensor:
    g = g.to_dense() if g.layout is not torch.strided else g
    return (torch.view_as_real(g) if g.is_complex() else g).double().square().sum()


def _work(names: list[str], rounds: int) -> None:
    """In the new process: a line before each model, and one with its record."""
    torch.set_num_threads(1)
    found = models()
    for name in names:
        print(f"{_BEGINS}{name}", flush=True)
        try:
            record = measured(found[name], rounds)
        except Exception as error:
            record = {"failure": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps({"name": name, **record}), flush=True)


def _in_processes(names: list[str], rounds: int, patience: float) -> Iterator[dict[str, Any]]:
    """The records; whoever ends or holds up the process is named, and left out."""
    left = list(names)
    while left:
        command = [sys.executable, "-W", "ignore", __file__, "--rounds", str(rounds), "--worker"]
        with subprocess.Popen([*command, *left], cwd=ROOT, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True) as run:  # fmt: skip
            assert run.stdout is not None
            clock = threading.Timer(patience, run.kill)
            clock.start()
            for line in run.stdout:
                if line.startswith(_BEGINS):
                    clock.cancel()
                    clock = threading.Timer(patience, run.kill)
                    clock.start()
                    del left[: left.index(line[len(_BEGINS) :].strip())]
                elif line.startswith("{"):
                    yield json.loads(line)
            clock.cancel()
        if run.returncode == 0:
            return
        yield {"name": left[0], "failure": f"the process ended with {run.returncode}"}
        del left[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="PATTERN", default=["*"])
    parser.add_argument("--add", action="store_true", help="what the JSON lacks, as after a stop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=120.0, help="seconds for one model")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # that some are slow is what is measured
    if args.worker:
        _work(args.worker, args.rounds)
        return
    torch.set_num_threads(1)  # as in the processes: the record says so
    found: dict[str, Any] = {
        "environment": harness.environment(),
        "examples": EXAMPLES,
        "bound": {"steps": STEPS, "loops": LOOPS},
        "models": {},
        "failures": {},
    }
    before = args.out / "everything.json"
    if args.add and before.exists():
        kept = json.loads(before.read_text())
        found |= {key: kept[key] for key in ("models", "failures")}
    names = [
        n
        for n in models()
        if n not in found["models"] and any(fnmatch(n, pattern) for pattern in args.only)
    ]
    for record in _in_processes(names, args.rounds, args.patience):
        name = record.pop("name")
        found["failures"].pop(name, None)
        if "failure" in record:
            found["failures"][name] = record["failure"]
            print(f"{name:<48} {record['failure']}", flush=True)
            continue
        found["models"][name] = record
        steps, loops = record["plain_steps"]["median"], record["loops"]["median"]
        print(f"{name:<48} {steps:7.2f} plain steps, {loops:.2f} loops", flush=True)
        harness.save("everything", found, args.out)  # whoever stops it keeps what there is
    print(f"saved {harness.save('everything', found, args.out)}")


if __name__ == "__main__":
    main()
