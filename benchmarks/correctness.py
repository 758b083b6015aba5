"""Write docs/comparison.md: the same small models through pergrad and its peers.

python benchmarks/correctness.py             # install the peers, run everything, write (4 minutes)
python benchmarks/correctness.py --check     # only say whether the page is that of the results

The peers have an environment of their own, build/peers, of the versions in benchmarks/peers.txt.
pergrad runs in it too, from this checkout. Fails unless pergrad is right in every row.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "correctness.json"
PAGE = ROOT / "docs" / "comparison.md"
PINS = ROOT / "benchmarks" / "peers.txt"
START, END = "<!-- table: written by benchmarks/correctness.py -->", "<!-- end of table -->"
Cell = dict[str, Any]

# Heading and package of each column (recipes: comparison/libraries.py).
COLUMNS = {
    "pergrad": ("pergrad", None),
    "Opacus, hooks": ("Opacus, `GradSampleModule`", "opacus"),
    "Opacus, ghost": ("Opacus, ghost clipping", "opacus"),
    "BackPACK": ("BackPACK, `BatchL2Grad`", "backpack-for-pytorch"),
    "captum, loop": ("captum `TracInCP`, as by default (a loop)", "captum"),
    "captum, together": ("captum, `sample_wise_grads_per_batch`", "captum"),
    "kronfluence": ("kronfluence", "kronfluence"),
    "dattri": ("dattri (vmap)", "dattri"),
    "dattri-llm": ("dattri-llm", "dattri-llm"),
    "bergson": ("bergson", "bergson"),
    "TorchJD": ("TorchJD, `autogram`", "torchjd"),
    "vmap": ("`torch.func`: `vmap(grad)`", "torch"),
}
# Cells that are as the library's own documentation or a warning of it says.
_LINEAR_AND_CONV = (
    "bare parameter, embedding, padding rows, sparse embedding, positions by arange, "
    "GPT-2's Conv1D, layer norm, RMS norm, group norm, LSTM, attention"
)
DOCUMENTED = {
    "Opacus, hooks": "LSTM, attention",
    "Opacus, ghost": "LSTM, attention, reused layer, tied weights",
    "BackPACK": f"{_LINEAR_AND_CONV}, functional use",
    "captum, together": f"{_LINEAR_AND_CONV}, functional use",
    "kronfluence": _LINEAR_AND_CONV,
    "dattri-llm": "reused layer, tied weights, positions by arange",
    "bergson": f"{_LINEAR_AND_CONV}, 4-D input, convolution, grouped convolution, "
    "circular convolution",
    "TorchJD": "functional use, LSTM, positions by arange, in-place writes",
}


def environment() -> Path:
    """The peers' python, installed if it is not there."""
    folder = ROOT / "build" / "peers"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.exists() or stamp.read_text() != PINS.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "-r", PINS], check=True)
        stamp.write_text(PINS.read_text())
    return python


def measured(python: Path) -> dict[str, Any]:
    """Every cell, each library in a process of its own."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("src", "benchmarks"))
    more = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    cells: list[Cell] = []
    for library in COLUMNS:
        print(library, flush=True)
        done = subprocess.run(
            [python, "-m", "comparison.child", library],
            env={**os.environ, **more}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{library} stopped:\n{done.stderr[-2000:]}")
        cells += [json.loads(line) for line in done.stdout.splitlines()]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", PINS.read_text(), re.MULTILINE))
    versions = {package: pins[package] for _, package in COLUMNS.values() if package}
    return {
        "cells": cells, "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }  # fmt: skip


def text_of(cell: Cell) -> str:
    """A cell of the table."""
    if cell["kind"] == "right":
        return "right"
    if cell["kind"] == "refused":
        words = "refused" if cell["error"] in _MEANT else f"fails: {cell['error']}"
    elif cell["kind"] == "part":
        words = f"{cell['covered']} of {cell['of']} parameters"
    else:
        words = f"**{cell['least']:.3f} to {cell['most']:.3f}**"
    documented = cell["case"] in DOCUMENTED.get(cell["library"], "").split(", ")
    return f"{words} †" if documented else words


_MEANT = ("NotImplementedError", "UnsupportedError", "MixedExamplesError", "ValueError")


def table(results: dict[str, Any]) -> str:
    """The table, and how many cells of each column are what."""
    cells = {(c["case"], c["library"]): c for c in results["cells"]}
    cases = list(dict.fromkeys(c["case"] for c in results["cells"]))
    heads = []
    for heading, package in COLUMNS.values():
        version = results["versions"].get(package)
        heads.append(f"{heading} {version}" if version else heading)
    lines = [f"| | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for name in cases:
        row = [text_of(cells[name, library]) for library in COLUMNS]
        lines.append(f"| {name} | {' | '.join(row)} |")
    words = {"right": "right", "part": "part of the parameters", "wrong": "another number",
             "refused": "an error"}  # fmt: skip
    counted = {library: Counter(cells[n, library]["kind"] for n in cases) for library in COLUMNS}
    for kind, meaning in words.items():
        row = [f"{counts[kind]}" for counts in counted.values()]
        lines.append(f"| *{meaning}, of {len(cases)}* | {' | '.join(row)} |")
    return "\n".join(lines) + f"\n\n{results['machine']}; float32 on a CPU."


def page_with(text: str) -> str:
    """docs/comparison.md with this table."""
    page = PAGE.read_text()
    before, rest = page.split(START)
    return f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare the page")
    parser.add_argument("--python", type=Path, help="one that has the peers already")
    given = parser.parse_args()
    if given.check:
        if page_with(table(json.loads(RESULTS.read_text()))) != PAGE.read_text():
            sys.exit(f"{PAGE} is not that of the results: run {sys.argv[0]}")
        return
    results = measured(given.python or environment())
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page_with(table(results)))
    wrong = [c for c in results["cells"] if c["library"] == "pergrad" and c["kind"] != "right"]
    if wrong:
        sys.exit(f"pergrad is not right: {wrong}")


if __name__ == "__main__":
    main()
