"""A job in another process: the settings of torch that decide what its numbers are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Packed under changed settings, unpacked in a process that has torch's own.
HERE = """
import pickle, sys, torch
from pergrad.scans.runners.packing import Numerics
exec(sys.argv[1])
sys.stdout.buffer.write(pickle.dumps(Numerics.here(1)))
"""
THERE = """
import pickle, sys, warnings
warnings.simplefilter("error")
from pergrad.scans.runners.packing import Numerics
wanted = pickle.load(sys.stdin.buffer)
before = Numerics.here(1)
wanted.apply()
assert Numerics.here(1) == wanted != before, (Numerics.here(1), wanted, before)
"""


OLDER = """
torch.set_float32_matmul_precision("high")
torch.backends.cudnn.allow_tf32 = False
torch.backends.cudnn.benchmark = True
torch.set_default_dtype(torch.bfloat16)
torch.use_deterministic_algorithms(True, warn_only=True)
"""
NEWER = """
torch.backends.cuda.matmul.fp32_precision = "tf32"
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
"""
CASES = {"older names": OLDER}
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    CASES["newer names"] = NEWER


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_settings_of_torch_travel(settings: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    packed = subprocess.run(
        [sys.executable, "-c", HERE, settings], check=True, capture_output=True, env=environment
    ).stdout
    subprocess.run([sys.executable, "-c", THERE], input=packed, check=True, env=environment)
