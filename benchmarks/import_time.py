"""Claim: `import pergrad` with its verbs adds less than 0.2 seconds to `import torch`.

And `pergrad top` takes less than half a second of processor time: what only reads needs no torch.

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
CLAIM_TOP_SECONDS = 0.5

CHILD = """
import time, torch
start = time.perf_counter()
import pergrad
alone = time.perf_counter() - start
pergrad.norms
print(alone, time.perf_counter() - start)
"""

SCORES = """
import sys, torch, pergrad
job = pergrad.Job(torch.nn.Linear(3, 1), list(torch.randn(2000, 3)), lambda m, x: m(x).squeeze(1))
pergrad.scan(job, sys.argv[1], progress=False)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON")
    args = parser.parse_args()
    started = harness.environment()
    alone, verbs, torchs, top = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        # as an installed package: with its bytecode, also where this process must not write any
        env = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        scores = f"{folder}/scores"
        subprocess.run([sys.executable, "-c", SCORES, scores], check=True, env=env)
        for n in range(args.repeats + 1):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", CHILD], check=True, stdout=-1, text=True, env=env
            )
            whole = time.perf_counter() - start
            before = os.times()
            subprocess.run(
                [sys.executable, "-m", "pergrad", "top", scores], check=True, stdout=-1, env=env
            )
            after = os.times()
            if n:  # the first fills the disk's cache and writes the bytecode
                first, second = map(float, done.stdout.split())
                alone.append(first)
                verbs.append(second)
                torchs.append(whole - second)
                top.append(
                    after.children_user + after.children_system
                    - before.children_user - before.children_system
                )  # fmt: skip
    seconds, command = harness.Spread.of(verbs), harness.Spread.of(top)
    record = {
        "claims": {"seconds": CLAIM_SECONDS, "top_seconds": CLAIM_TOP_SECONDS},
        "environment": started,
        "pergrad_seconds": seconds.record(4),
        "pergrad_without_verbs_seconds": harness.Spread.of(alone).record(4),
        "python_and_torch_seconds": harness.Spread.of(torchs).record(4),
        "top_processor_seconds": command.record(4),
    }
    print(
        f"import pergrad, its verbs, after torch: {seconds.median:.3f} s (claim: {CLAIM_SECONDS} s)"
    )
    print(f"pergrad top, processor time: {command.median:.3f} s (claim: {CLAIM_TOP_SECONDS} s)")
    print(f"saved {harness.save('import_time', record, args.out)}")


if __name__ == "__main__":
    main()
