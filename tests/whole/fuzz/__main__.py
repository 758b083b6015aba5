"""The command: `python -m tests.whole.fuzz --seeds 0:10000 --report`."""

import argparse
import time
import warnings
from collections import Counter

import torch
from tests.whole.fuzz.judge import describe, judge, smallest


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge random models against plain autograd.")
    parser.add_argument("--seeds", default="0:1000", help="FIRST:LAST, the last not included")
    parser.add_argument("--report", action="store_true", help="make failures small, and print them")
    chosen = parser.parse_args()
    first, last = map(int, chosen.seeds.split(":"))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    fallbacks = 0
    start, spent = time.perf_counter(), 0.0
    failed = []
    for seed in range(first, last):
        verdict = judge(seed)
        counts[verdict.kind] += 1
        fallbacks += verdict.fallbacks > 0
        if verdict.kind in ("refused", "torch", "unsupported"):
            print(f"seed {seed}: {verdict.kind}: {verdict.detail[:160]}", flush=True)  # noqa: T201
        if verdict.failed:
            failed.append(seed)
            print(f"seed {seed}: {verdict.kind}: {verdict.detail[:300]}", flush=True)  # noqa: T201
            if chosen.report:
                before = time.perf_counter()
                skip, small = smallest(seed, verdict.kind)
                print(f"  without steps {sorted(skip)}: {describe(seed, skip)}\n"  # noqa: T201
                      f"  {small.kind}: {small.detail[:600]}", flush=True)  # fmt: skip
                spent += time.perf_counter() - before
    seconds = time.perf_counter() - start - spent
    print(f"{last - first} models, {(last - first) / seconds:.0f} per second: {dict(counts)}; "  # noqa: T201
          f"{fallbacks} with a fallback; failed: {failed}")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
