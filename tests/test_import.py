"""Importing pergrad needs torch and the standard library alone, and changes nothing."""

import json
import subprocess
import sys
from typing import Any

PROBE = """
import json, logging, random, sys, threading, warnings
import torch
import torch.utils.data  # what torch itself imports on demand is not ours to count

def state():
    return {
        "handlers": len(logging.root.handlers),
        "level": logging.root.level,
        "filters": len(warnings.filters),
        "threads": threading.active_count(),
        "torch threads": torch.get_num_threads(),
        "rng": hash(bytes(torch.get_rng_state().tolist())),
        "random": hash(random.getstate()),
        "grad": torch.is_grad_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "showwarning": warnings.showwarning is shown,
        "excepthook": sys.excepthook is sys.__excepthook__,
    }

shown = warnings.showwarning
before, modules = state(), set(sys.modules)
import pergrad
new = sorted({name.partition(".")[0] for name in set(sys.modules) - modules})
print(json.dumps({"before": before, "after": state(), "new": new}))
"""


def probe() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_import_needs_torch_and_the_standard_library_alone() -> None:
    allowed = {"pergrad", "torch", *sys.stdlib_module_names}
    assert set(probe()["new"]) <= allowed


def test_import_has_no_side_effect() -> None:
    found = probe()
    assert found["after"] == found["before"]
