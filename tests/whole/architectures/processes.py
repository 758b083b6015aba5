"""Each architecture in a process of its own: a crash, a hang or a clash of packages stays there.

Owns: what the two processes say to each other.
Does not know: how results are shown.
"""

import json
import subprocess
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

from .compare import Result, compare
from .models import ARCHITECTURES

ROOT = Path(__file__).parents[3]
_MARK = "RESULT "


def report(name: str, backend: str = "") -> None:
    """In the new process: compare, and print the result."""
    torch.set_num_threads(1)
    case = ARCHITECTURES[name]
    try:
        result = compare(case, backend)
    except Exception as error:
        traceback.print_exc()
        says = f"{type(error).__name__}: {error}"
        result = Result(name, case.family, backend=backend, error=says)
    sys.stdout.write(f"\n{_MARK}{json.dumps(asdict(result))}\n")


def in_a_process(name: str, timeout: float, backend: str = "") -> Result:
    """The result of one architecture, whatever happens to it."""
    family = ARCHITECTURES[name].family
    command = [sys.executable, "-m", "tests.whole.architectures", "--one", name]
    command += ["--compiled", backend] if backend else []
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return Result(name, family, backend=backend, error=f"no result after {timeout:.0f} s")
    error = f"the process ended with {done.returncode}"
    result = Result(name, family, backend=backend, error=error)
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            result = Result(**json.loads(line.removeprefix(_MARK)))
    if result.error:
        sys.stderr.write(done.stderr[-3000:])
    return result
