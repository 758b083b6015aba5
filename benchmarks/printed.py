"""Run the examples whose figures stand in README.md, and keep what they printed of them.

python benchmarks/printed.py [influential_digits] [digits]    # a minute
python benchmarks/printed.py           # and Fashion-MNIST, which has to be there; three minutes
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import tables

ROOT = Path(__file__).parents[1]

# Of each example: figures by name, and where they stand in what it prints.
FIGURES = {
    "influential_digits": {
        "influence": r"influence: +(-?\d\.\d+) ",
        "alike": r"the digits most alike: +(-?\d\.\d+) ",
        "losses": r"the training digits' losses: +(-?\d\.\d+) ",
    },
    "digits": {
        "norm": r"by gradient norm: +(\d+) of 90",
        "loss": r"by loss: +(\d+) of 90",
    },
    "fashion": {
        "said": r"the 600 most against: +said (\S+), found",
        "found": r"the 600 most against: +said \S+, found (\S+)",
    },
}


def printed(name: str, text: str) -> dict[str, str]:
    """The figures in the output of an example, or in a page that shows it."""
    found = {}
    for figure, pattern in FIGURES[name].items():
        match = re.search(pattern, text)
        assert match, f"{name} no longer prints {pattern}"
        found[figure] = match[1]
    return found


def run(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, ROOT / "examples" / f"{name}.py"],
            check=True, stdout=subprocess.PIPE, text=True, cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "MPLCONFIGDIR": folder},
        )  # fmt: skip
    print(done.stdout)
    return {"figures": printed(name, done.stdout), "environment": harness.environment()}


def main() -> None:
    record = tables.read_other("examples") or {}
    record |= {name: run(name) for name in sys.argv[1:] or FIGURES}
    harness.save("examples", record)


if __name__ == "__main__":
    main()
