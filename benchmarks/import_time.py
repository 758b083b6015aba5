"""Claim: `import pergrad` adds less than 0.2 seconds to `import torch`.

python benchmarks/import_time.py
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

CLAIM_SECONDS = 0.2

CHILD = """
import time, torch
start = time.perf_counter()
import pergrad
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON")
    args = parser.parse_args()
    started = harness.environment()
    ours, torchs = [], []
    with tempfile.TemporaryDirectory() as folder:
        # as an installed package: with its bytecode, also where this process must not write any
        env = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        for n in range(args.repeats + 1):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", CHILD], check=True, stdout=-1, text=True, env=env
            )
            if n:  # the first fills the disk's cache and writes the bytecode
                ours.append(float(done.stdout))
                torchs.append(time.perf_counter() - start - ours[-1])
    seconds = harness.Spread.of(ours)
    record = {
        "claims": {"seconds": CLAIM_SECONDS},
        "environment": started,
        "pergrad_seconds": seconds.record(4),
        "python_and_torch_seconds": harness.Spread.of(torchs).record(4),
    }
    print(f"import pergrad, after torch: {seconds.median:.3f} s (claim: {CLAIM_SECONDS} s)")
    print(f"saved {harness.save('import_time', record, args.out)}")


if __name__ == "__main__":
    main()
