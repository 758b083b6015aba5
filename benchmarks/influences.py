"""Targets: influences 10, 5 and 1.4 times faster than kronfluence's, with the same scores.

A perceptron with 2000 examples x 64 queries, a CNN with 64 x 16, a GPT of T=128 with 128 x 16:
fitting and scoring, by EK-FAC and by inner products. One thread each, a process
each, in turns, in one run.

    python benchmarks/influences.py                      # install the peers, run all (four minutes)
    python benchmarks/influences.py --python PYTHON      # one that has the peers already
    python benchmarks/influences.py --only cnn --rounds 1

Fails if scores of two libraries differ.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import harness
from correctness import PINS, environment

ROOT = Path(__file__).parents[1]
LIBRARIES = ("pergrad", "kronfluence", "dattri-llm")
METHODS = ("identity", "ekfac")
TARGETS = {"perceptron": 10.0, "cnn": 5.0, "gpt": 1.4}  # times faster than kronfluence
ROUNDS = {"perceptron": 2, "cnn": 5, "gpt": 2}
# of the largest score: what float32 explains, of inner products and of products with an inverse
# (dattri-llm takes eigenvectors in float32, the others in float64)
SAME = {"identity": 1e-5, "ekfac": 5e-3}


class Child:
    """A library in a process of its own."""

    def __init__(self, python: Path, library: str, workload: str, kept: Path) -> None:
        paths = os.pathsep.join(str(ROOT / name) for name in ("src", "benchmarks"))
        more = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.library, self.kept = library, kept / library
        self.process = subprocess.Popen(
            [python, "-m", "attributors.child", library, workload, self.kept],
            env={**os.environ, **more}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        said = json.loads(line) if line else {"error": "it stopped"}
        if "error" in said:
            _, trace = self.process.communicate()
            sys.exit(f"{self.library}: {said['error']}\n{trace[-3000:]}")
        return said

    def time(self, method: str) -> dict[str, Any]:
        """One repetition: seconds by the clock and of the processor."""
        assert self.process.stdin is not None
        print(method, file=self.process.stdin, flush=True)
        return self.answer()

    def scores(self, method: str) -> torch.Tensor:
        """Those of the last repetition."""
        return torch.load(f"{self.kept}-{method}.pt").double()

    def end(self) -> None:
        self.process.communicate()


def measured(python: Path, workload: str, rounds: int) -> dict[str, Any]:
    """Seconds of every library and method, and how far scores are from pergrad's."""
    with tempfile.TemporaryDirectory() as kept:
        children = [Child(python, library, workload, Path(kept)) for library in LIBRARIES]
        times: dict[tuple[str, str], list[dict[str, float]]] = {}
        for _ in range(rounds):
            for method in METHODS:
                for child in children:
                    times.setdefault((method, child.library), []).append(child.time(method))
        methods: dict[str, Any] = {}
        for method in METHODS:
            ours = children[0].scores(method)
            methods[method] = {}
            for child in children:
                found = times[method, child.library]
                off = float((child.scores(method) - ours).abs().max() / ours.abs().max())
                methods[method][child.library] = {
                    "seconds": statistics.median(t["clock"] for t in found),
                    "processor_seconds": statistics.median(t["processor"] for t in found),
                    "each": [round(t["clock"], 4) for t in found],
                    "off": off,
                }
                print(workload, method, child.library, methods[method][child.library], flush=True)
        for child in children:
            child.end()
    return {"rounds": rounds, "target": TARGETS[workload], "methods": methods}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", type=Path, help="one that has the peers already")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--rounds", type=int)
    given = parser.parse_args()
    from attributors.workloads import build

    python = given.python or environment()
    torch.set_num_threads(1)
    found = {}
    for name in given.only:
        found[name] = {"title": build(name).title,
                       **measured(python, name, given.rounds or ROUNDS[name])}  # fmt: skip
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", PINS.read_text(), re.MULTILINE))
    path = harness.RESULTS / "influences.json"
    old = json.loads(path.read_text())["workloads"] if path.exists() else {}
    record = {
        "environment": {**harness.environment(), "threads": 1},
        "versions": {name: pins[name] for name in LIBRARIES if name in pins},
        "workloads": {name: {**old, **found}[name] for name in TARGETS if name in {**old, **found}},
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    wrong = [
        f"{name}, {method}: {library} is off by {each['off']:.1e}"
        for name, work in found.items()
        for method, libraries in work["methods"].items()
        for library, each in libraries.items()
        if not each["off"] <= SAME[method]
    ]
    if wrong:
        sys.exit("Scores differ: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
