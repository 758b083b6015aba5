"""The command: `python -m tests.whole.databases`: all ops and modules, in processes that may die.

It needs the package `expecttest`, which torch's own tests need.
"""

import argparse
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
_BEGINS = "BEGINS "
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def work(names: list[str], dtype: str, most: int) -> None:
    """In the new process: judge the models of these ops; a line for each op, and for each model."""
    from tests.whole.databases.judge import judge
    from tests.whole.databases.samples import models

    torch.set_num_threads(1)
    for name in names:
        print(f"{_BEGINS}{name}", flush=True)  # noqa: T201
        for model in models(name, DTYPES[dtype], most):
            verdict = judge(model)
            if verdict is not None:
                print(json.dumps(asdict(verdict)), flush=True)  # noqa: T201


def in_a_process(
    names: list[str], dtype: str, most: int, timeout: float
) -> Iterator[dict[str, str]]:
    """The verdicts on some ops. Whoever ends or holds up the process is named, and left out."""
    left = list(names)
    while left:
        command = [sys.executable, "-W", "ignore", "-m", "tests.whole.databases",
                   "--dtype", dtype, "--most", str(most), "--worker", *left]  # fmt: skip
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True) as run:  # fmt: skip
            assert run.stdout is not None
            clock = threading.Timer(timeout, run.kill)
            clock.start()
            for line in run.stdout:
                if line.startswith(_BEGINS):
                    clock.cancel()
                    clock = threading.Timer(timeout, run.kill)
                    clock.start()
                    del left[: left.index(line[len(_BEGINS) :].strip())]
                elif line.startswith("{"):
                    yield json.loads(line)
            clock.cancel()
        if run.returncode == 0:
            return
        yield {"name": left[0], "way": "", "kind": "died", "detail": f"status {run.returncode}"}
        del left[0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.whole.databases", description=__doc__)
    parser.add_argument("--only", default="*", help="names to run, as a pattern")
    parser.add_argument("--dtype", choices=DTYPES, default="float64")
    parser.add_argument("--most", type=int, default=1000, help="samples of each op")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one op")
    parser.add_argument("--out", type=Path, help="write what is not exact to this file, as JSON")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        work(chosen.worker, chosen.dtype, chosen.most)
        return 0
    from tests.whole.databases.samples import names

    wanted = [name for name in names() if fnmatch(name, chosen.only)]
    counts: Counter[str] = Counter()
    rest: list[dict] = []

    def share(start: int) -> None:
        for verdict in in_a_process(
            wanted[start :: chosen.jobs], chosen.dtype, chosen.most, chosen.timeout
        ):
            counts[verdict["kind"]] += 1
            if verdict["kind"] not in ("exact", "torch", "refused"):
                rest.append(verdict)
                print(json.dumps(verdict), flush=True)  # noqa: T201

    with ThreadPoolExecutor(chosen.jobs) as pool:
        list(pool.map(share, range(chosen.jobs)))
    print(f"{len(wanted)} ops and modules, {counts.total()} models: {dict(counts)}")  # noqa: T201
    if chosen.out:
        chosen.out.write_text(json.dumps({"counts": counts, "rest": rest}, indent=1))
    return 1 if counts["wrong"] or counts["raw"] or counts["died"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
