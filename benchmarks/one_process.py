"""What a user sees: pergrad and the plain step in one process, in turns.

    python benchmarks/one_process.py                         # on an idle machine, six minutes
    python benchmarks/one_process.py --only small digits-sized
    python benchmarks/one_process.py --tiny

The other benchmarks give everyone a process, whose memory allocator then serves one alone. Here
both have the same one, as torch leaves it. Models under `torch.compile` are held against their own
compiled step: the default backend, which has been compiled before it is timed.

Owns: which workloads are measured so, the turns and the record.
Does not know: models (`workloads`), what is called (`contestants`).
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harness
import pergrad
from child import record_of
from contestants import CONTESTANTS, reference
from turns import turn
from workloads import REGISTRY, Step


@dataclass(frozen=True)
class Case:
    """A model with what is asked of it, and the share of a plain step that is aimed at."""

    title: str
    task: str
    build: Callable[[bool], Step]
    target: float | None = None
    compiled: bool = False  # the user's model, by torch.compile
    step: bool = False  # pergrad.compiled in the place of the verb


def _perceptron(*sizes: int) -> Callable[[bool], Step]:
    """A small classifier in a batch of 32."""

    def build(tiny: bool) -> Step:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]

        def loss(call: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(call(x), y, reduction="none")

        examples = 4 if tiny else 32
        batch = torch.randn(examples, sizes[0]), torch.randint(sizes[-1], (examples,))
        return Step(nn.Sequential(*layers[:-1]), batch, loss)

    return build


def _workload(
    name: str, target: float | None = None, *, compiled: bool = False, step: bool = False
) -> Case:
    found = REGISTRY[name]
    title = f"{found.title}, compiled: norms" if compiled else found.title
    title = f"{title}, by pergrad.compiled" if step else title
    return Case(title, found.task, found.build, target, compiled, step)


def _step(title: str, build: Callable[[bool], Step]) -> Case:
    return Case(f"{title}: norms by pergrad.compiled", "norms", build, 1.2, step=True)


def _asked(case: Case, step: Step, backend: str) -> Callable[[tuple[Tensor, ...]], Any]:
    """What pergrad is asked: the verb, or a compiled step."""
    if not case.step:
        return CONTESTANTS["pergrad"].function(case.task)(step)
    whole = pergrad.compiled(lambda *batch: step.losses(batch), step.model, backend=backend)

    def run(batch: tuple[Tensor, ...]) -> Any:
        step.model.zero_grad(set_to_none=True)
        if case.task == "clip":
            found = whole.backward(*batch, weights=pergrad.clip(1.0))
            return found, {name: p.grad for name, p in step.params().items()}
        if case.task == "direction":
            return whole.dots(*batch, against=direction)
        return whole(*batch)

    direction = step.direction() if case.task == "direction" else {}
    return run


CASES = {
    "small": Case("perceptron 4-32-2, B=32", "norms", _perceptron(4, 32, 2), 2.0),
    "digits-sized": Case("perceptron 64-64-10, B=32", "norms", _perceptron(64, 64, 10), 2.0),
    "small-step": _step("perceptron 4-32-2, B=32", _perceptron(4, 32, 2)),
    "digits-sized-step": _step("perceptron 64-64-10, B=32", _perceptron(64, 64, 10)),
    "norms-mlp": _workload("W1-mlp", 0.70),
    "norms-gpt": _workload("W0-gpt"),
    "norms-gpt-T128": _workload("W2-gpt-T128"),
    "norms-resnet": _workload("W4-resnet"),
    "direction-mlp": _workload("W7-direction-mlp", 1.10),
    "direction-mlp-step": _workload("W7-direction-mlp", 1.10, step=True),
    "clip-mlp": _workload("W8-clip-mlp", 1.05),
    "clip-mlp-step": _workload("W8-clip-mlp", 1.05, step=True),
    "clip-resnet": _workload("W8-clip-resnet"),
    "compiled-mlp": _workload("W1-mlp", 1.0, compiled=True),
    "compiled-gpt": _workload("W0-gpt", 1.0, compiled=True),
    "compiled-resnet": _workload("W4-resnet", 1.0, compiled=True),
}  # fmt: skip


def measured(case: Case, rounds: int, *, tiny: bool, backend: str = "inductor") -> dict[str, Any]:
    """The record of one case.

    Raises:
        SystemExit: what pergrad computes is not what the loop computes.
    """
    step = case.build(tiny)
    want = getattr(reference, case.task)(step)
    if case.compiled:
        step = replace(step, model=torch.compile(step.model, backend=backend))
    calls = {
        "plain": CONTESTANTS["plain"].function(case.task)(step),
        "pergrad": _asked(case, step, backend),
    }
    for _ in range(3):  # compiled, planned, and verified
        calls["plain"](step.batch)
        got = record_of(case.task, calls["pergrad"](step.batch))
    assert got is not None
    error = harness.error(got, want)
    if not error <= harness.allowed(want):
        raise SystemExit(f"{case.title}: error {error:.0e}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            seconds[name].append(turn(lambda call=calls[name]: call(step.batch)))
    shares = [b / a for a, b in zip(seconds["plain"], seconds["pergrad"], strict=True)]
    return {
        "title": case.title,
        "error": float(f"{error:.1e}"),
        "milliseconds": {
            name: harness.Spread.of(found).record(3, 1e3) for name, found in seconds.items()
        },
        "share": harness.Spread.of(shares).record(3),
        "target": case.target,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="the size that tests use")
    parser.add_argument("--backend", default="inductor", help="of the compiled models")
    parser.add_argument("--add", action="store_true", help="keep the record's other cases")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON")
    args = parser.parse_args()
    found: dict[str, Any] = {"environment": harness.environment(), "cases": {}}
    path = args.out / "one_process.json"
    if args.add and path.exists():
        found["cases"] = json.loads(path.read_text())["cases"]
    for name in args.only:
        record = measured(CASES[name], args.rounds, tiny=args.tiny, backend=args.backend)
        found["cases"][name] = record
        aim = "" if record["target"] is None else f" ({record['target']:.2f})"
        print(f"{record['title']:<90} {record['share']['median']:6.2f}{aim}", flush=True)
        saved = harness.save("one_process", found, args.out)  # those before one that fails count
    print(f"saved {saved}")


if __name__ == "__main__":
    main()
