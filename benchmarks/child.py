"""One contestant on one workload, in a process of its own: does what it is told over a pipe.

    python benchmarks/child.py WORKLOAD CONTESTANT

Commands and answers are lines of JSON on standard input and output; `processes.py` is the other
end. The contestant "reference" computes what is right, and is not timed.

Owns: setting up, timing one repetition, its own peak memory.
Does not know: whose turn it is, or what the others take.
"""

import argparse
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import contestants
import workloads

# A contestant that wants more memory than this fails instead of making the machine swap.
LIMIT_BYTES = 16 << 30

Answer = dict[str, Any]


def peak_bytes() -> int:
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


def limit_memory(size: int) -> None:
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def short(error: BaseException) -> str:
    """The last word of an error, for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def record_of(task: str, result: Any) -> dict[str, Tensor] | None:
    """What a contestant returned, in the form that `harness.error` compares."""
    if result is None or isinstance(result, dict):
        return result
    if task == "clip":
        norms, grads = result
        total = torch.cat([g.detach().flatten() for g in grads.values()])
        return {"norms": norms.detach(), "sum": total}
    return {"norms" if task in ("norms", "lengths") else "values": result.detach()}


class Worker:
    """The state between commands."""

    def __init__(self, workload: str, contestant: str, *, tiny: bool = False) -> None:
        self.workload = workloads.REGISTRY[workload]
        self.task = self.workload.task
        self.own = contestant == "reference"
        if self.own:
            setup = getattr(importlib.import_module("contestants.reference"), self.task)
        else:
            setup = contestants.CONTESTANTS[contestant].function(self.task)
        if not (self.own or tiny):
            self._once(setup)
        gc.collect()
        self.imports = peak_bytes()
        self.step = self.workload.build(tiny)
        self.batches = self.workload.batches(tiny) if self.workload.batches else []
        self.run: Callable[[Any], Any] = (
            (lambda batch: setup(workloads.Step(self.step.model, batch, self.step.loss,
                                                self.step.reference)))
            if self.own else setup(self.step)
        )  # fmt: skip

    def _once(self, setup: Callable[[Any], Any]) -> None:
        """The whole way in small: pages of code that are read for the first time are no memory that
        a contestant takes, and count as an import.
        """
        small = self.workload.build(True)
        with suppress(Exception):  # it will say so again, and then somebody listens
            setup(small)(small.batch)

    def ready(self) -> Answer:
        return {
            "imports": self.imports,
            "examples": len(self.step),
            "parameters": sum(p.numel() for p in self.step.params().values()),
            "threads": torch.get_num_threads(),
            "package": getattr(sys.modules.get("pergrad"), "__file__", None),
        }

    def _batch(self, examples: int | None) -> tuple[Tensor, ...]:
        return tuple(t[:examples] for t in self.step.batch)

    def first(self, examples: int | None = None, save: str | None = None) -> Answer:
        """One repetition whose result is kept for comparison."""
        batch = self._batch(examples)
        start = time.perf_counter()
        result = self.run(batch)
        seconds = time.perf_counter() - start
        self._save(result, save)
        gc.collect()
        gc.freeze()  # what is alive now stays alive: the collector need not look at it again
        return {"seconds": seconds}

    def turn(self, repeats: int, warm: int, examples: int | None = None) -> Answer:
        """Several repetitions; those to get warm again are not timed."""
        batch, found, processor = self._batch(examples), [], []
        for n in range(warm + repeats):
            start, used = time.perf_counter(), time.process_time()
            self.run(batch)
            if n >= warm:
                found.append(time.perf_counter() - start)
                processor.append(time.process_time() - used)
        return {"all": found, "processor": processor}

    def batch(self, index: int, save: str | None = None) -> Answer:
        """One of the batches of different lengths: the first time, and again."""
        batch = self.batches[index]
        if self.own:
            self._save(self.run(batch), save)
            return {}
        start, used = time.perf_counter(), time.process_time()
        result = self.run(batch)
        middle, processor = time.perf_counter(), time.process_time() - used
        self.run(batch)
        end = time.perf_counter()
        self._save(result, save)
        return {"first": middle - start, "again": end - middle, "processor": processor}

    def multiply_adds(self) -> Answer:
        """Of the matrix products of a plain step, and of those that pergrad puts in the place of
        its weight gradients.
        """
        from torch.utils.flop_counter import FlopCounterMode

        import pergrad

        with FlopCounterMode(display=False) as counter:
            self.step.losses().mean().backward()
        coverage = pergrad.explain(self.step.losses(), self.step.model)
        return {
            "plain": counter.get_total_flops() // 2,
            "pergrad": sum(row.cost for row in coverage.rows),
        }

    def _save(self, result: Any, path: str | None) -> None:
        record = record_of(self.task, result)
        if path is not None and record is not None:
            torch.save(record, path)


@contextmanager
def answers() -> Iterator[Callable[[Answer], None]]:
    """A way to answer. What libraries print goes to standard error instead."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(line: Answer) -> None:
        pipe.write(json.dumps(line) + "\n")
        pipe.flush()

    yield answer


def serve(make: Callable[[], Any]) -> None:
    """Do what comes over the pipe, by a worker that has a method for each command."""
    limit_memory(LIMIT_BYTES)
    with answers() as answer:
        try:
            worker = make()
            answer(worker.ready())
            for line in sys.stdin:
                command = json.loads(line)
                done = getattr(worker, command.pop("do"))(**command)
                answer({**done, "peak": peak_bytes()})
        except BaseException as error:  # whatever it is, the table shows it
            answer({"error": short(error)})
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload")
    parser.add_argument("contestant")
    parser.add_argument("--tiny", action="store_true", help="the size that tests use")
    args = parser.parse_args()
    serve(lambda: Worker(args.workload, args.contestant, tiny=args.tiny))


if __name__ == "__main__":
    main()
