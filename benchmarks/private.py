"""What a private step costs: `pergrad.Private` and Opacus's ghost clipping, in turns.

    python benchmarks/private.py                              # three models; about six minutes
    python benchmarks/private.py --workloads W1 --seconds 20
    python benchmarks/private.py --workloads W4 --add         # to the record that is there

A step is that of training.py: forward, backward, AdamW; a private one clips each example's gradient
to norm 1 and adds noise. Both get the same batch without loading it. Each way has a process of its
own; in each round all have a turn, in a random order, and a ratio is that of two turns of one
round. Before that, what both give the optimizer without noise has to be the same.

Owns: the ways and the record.
Does not know: models (`workloads`), turns (`training`), how a table is written (`tables`).
"""

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
import training
import workloads
from processes import FailedError, Process

WORKLOADS = ("W1", "W0-gpt", "W4")
CLIP, NOISE = 1.0, 1.1
TOLERANCE = 1e-3  # Opacus adds 1e-6 to a norm before it divides, and the sums have other orders
BOUND = 0.60  # of Opacus's time

# way -> what it is, for the table. The first is what the others are divided by.
WAYS = {
    "plain": "the step alone, not private",
    "pergrad": "`pergrad.Private`",
    "opacus": "Opacus, ghost clipping",
}


class Worker:
    """One way of training, in its process."""

    def __init__(self, workload: str, way: str, *, tiny: bool = False) -> None:
        self.workload, self.way, self.tiny = workload, way, tiny
        if not tiny:  # code that is read for the first time counts as an import
            self._build(NOISE, tiny=True)()
        self.imports = child.peak_bytes()
        self.once: Callable[[], Any] = self._build(NOISE, tiny=tiny)

    def ready(self) -> child.Answer:
        return {"imports": self.imports}

    def _build(self, noise: float, *, tiny: bool) -> Callable[[], Any]:
        """A step, by this way."""
        self.step = workloads.REGISTRY[self.workload].build(tiny)
        self.optimizer = torch.optim.AdamW(self.step.model.parameters(), lr=1e-4)
        return {"plain": self._plain, "pergrad": self._pergrad, "opacus": self._opacus}[self.way](
            noise
        )

    def _plain(self, _: float) -> Callable[[], Any]:
        def once() -> None:
            self.optimizer.zero_grad()
            self.step.losses().mean().backward()
            self.optimizer.step()

        return once

    def _pergrad(self, noise: float) -> Callable[[], Any]:
        import pergrad

        step, size = self.step, len(self.step)
        private = pergrad.Private(
            step.model, self.optimizer, CLIP, noise, range(size), 1.0, size,
            collate=lambda _: step.batch,
        )  # fmt: skip

        def once() -> None:
            for batch in private:
                private.backward(step.losses(batch))

        return once

    def _opacus(self, noise: float) -> Callable[[], Any]:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        step = self.step
        if hasattr(step.model, "expand"):  # see contestants/ghost.py
            step.model.expand = True
        model = GradSampleModuleFastGradientClipping(
            step.model, loss_reduction="mean", max_grad_norm=CLIP, use_ghost_clipping=True
        )
        optimizer = DPOptimizerFastGradientClipping(
            self.optimizer, noise_multiplier=noise, max_grad_norm=CLIP,
            expected_batch_size=len(step), loss_reduction="mean",
        )  # fmt: skip

        class Criterion:
            reduction = "mean"

            def __call__(self, losses: Tensor) -> Tensor:
                return losses

        criterion = DPLossFastGradientClipping(model, optimizer, Criterion(), "mean")

        def once() -> None:
            optimizer.zero_grad()
            criterion(step.loss(model, *step.batch)).backward()
            optimizer.step()

        return once

    def gradient(self, save: str) -> child.Answer:
        """What the optimizer is given without noise."""
        found: list[Tensor] = []
        once = self._build(0.0, tiny=self.tiny)
        self.optimizer.register_step_pre_hook(
            lambda *_: found.extend(p.grad.flatten() for p in self.step.model.parameters())
        )
        once()
        torch.save(torch.cat(found), save)
        self.once = self._build(NOISE, tiny=self.tiny)
        return {}

    def first(self) -> child.Answer:
        """Some steps, to get warm."""
        seconds = []
        for _ in range(training.CHECKED):
            start = time.perf_counter()
            self.once()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def turn(self, steps: int) -> child.Answer:
        """The mean of so many steps, after one to get warm again."""
        self.once()
        start, used = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.once()
        return {"seconds": (time.perf_counter() - start) / steps,
                "processor": (time.process_time() - used) / steps}  # fmt: skip


def measure(
    workload: workloads.Workload, seconds: float, rounds: int, *, tiny: bool = False
) -> dict[str, Any]:
    """Ratios to the plain step, and of one private step to the other."""
    started = harness.environment()
    processes = {way: Process(workload.name, way, tiny=tiny, script=Path(__file__)) for way in WAYS}
    try:
        ready = {way: p.answer(training.PATIENCE) for way, p in processes.items()}
        first = {w: p.ask("first", seconds=training.PATIENCE) for w, p in processes.items()}
        once = min(first["plain"]["seconds"])
        steps = dict.fromkeys(WAYS, min(10, max(1, round(training.TURN_SECONDS / once))))
        taken, used, peaks = training.in_turns(processes, steps, seconds, rounds)
        error = _check(workload.name, processes)  # last: its model is one more in memory
    except FailedError as failed:
        raise SystemExit(f"{workload.name}: {failed}") from None
    finally:
        for process in processes.values():
            process.close()

    plain_peak = peaks["plain"] - ready["plain"]["imports"]
    return {
        "workload": workload.name,
        "title": workload.title,
        "environment": started,
        "error": error,
        "bound": BOUND,
        "of_opacus": training.ratios(taken["pergrad"], taken["opacus"]),
        "processor_of_opacus": training.ratios(used["pergrad"], used["opacus"]),
        "ways": {
            way: {
                "title": WAYS[way],
                "milliseconds": harness.Spread.of(taken[way]).record(3, 1e3),
                "ratio": training.ratios(taken[way], taken["plain"]),
                "processor_ratio": training.ratios(used[way], used["plain"]),
                "memory_ratio": round((peaks[way] - ready[way]["imports"]) / plain_peak, 4),
            }
            for way in WAYS
        },
    }


def _check(name: str, processes: dict[str, Process]) -> float:
    """Both give the optimizer the same: the deviation, relative to its norm."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("pergrad", "opacus"):
            path = f"{folder}/{way}"
            processes[way].ask("gradient", seconds=training.PATIENCE, save=path)
            found[way] = torch.load(path).double()
    error = float((found["pergrad"] - found["opacus"]).norm() / found["opacus"].norm())
    if not error <= TOLERANCE:
        raise SystemExit(f"{name}: the clipped means differ by {error:.1e}.")
    return error


def _said(record: dict[str, Any]) -> str:
    share, used = (record[n]["median"] for n in ("of_opacus", "processor_of_opacus"))
    return f"; {share:.3f} of Opacus's time, {used:.3f} of its processor time"


def main() -> None:
    training.command("private", __doc__, WORKLOADS, measure, _said)


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[2] in WAYS:  # a process of `measure`
        child.serve(lambda: Worker(sys.argv[1], sys.argv[2], tiny="--tiny" in sys.argv))
    else:
        main()
