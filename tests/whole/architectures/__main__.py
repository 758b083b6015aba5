"""The sweep: every architecture in a process of its own, and a table of what came out.

python -m tests.whole.architectures --out docs/architectures.md
python -m tests.whole.architectures --only 'hf-*'
python -m tests.whole.architectures --compiled aot_eager --out docs/architectures.md
"""

import argparse
import fnmatch
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from .compare import Result
from .models import ARCHITECTURES
from .processes import in_a_process, report
from .table import page


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.whole.architectures", description=__doc__
    )
    parser.add_argument("--out", type=Path, help="write the table to this file")
    parser.add_argument("--only", default="*", help="names to run, as a pattern")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one architecture")
    parser.add_argument("--results", type=Path, help="keep results here; a later line counts")
    parser.add_argument(
        "--compiled", default="", metavar="BACKEND", help="run them under torch.compile instead"
    )
    parser.add_argument("--new", action="store_true", help="leave out what has a result")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    backend = chosen.compiled
    if chosen.one:
        report(chosen.one, backend)
        return 0
    results: dict[tuple[str, str], Result] = {}
    if chosen.results and chosen.results.exists():
        for line in chosen.results.read_text().splitlines():
            kept = Result(**json.loads(line))
            results[kept.name, kept.backend] = kept
    missing = []
    for name, case in ARCHITECTURES.items():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in chosen.only.split(",")):
            continue
        if chosen.new and (name, backend) in results:
            continue
        if not case.available():
            missing.append(name)
            continue
        start = time.perf_counter()
        result = results[name, backend] = in_a_process(name, chosen.timeout, backend)
        verdict = "ok" if result.ok else "WRONG" if not result.error else "ERROR"
        print(
            f"{verdict:5} {name:40} {result.worst:.1e} {result.by_parameter:.1e} "
            f"{result.by_rule:7.2%} {time.perf_counter() - start:5.1f} s "
            f"{' '.join(result.fallback_ops)} {'refused' if result.refused else ''} "
            f"{result.missing or ''} {result.not_compiled[:200]} {result.error[:200]}",
            flush=True,
        )
        if chosen.results:
            with chosen.results.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
    if missing:
        print(f"Not installed: {', '.join(missing)}", flush=True)
    if chosen.out:
        old = chosen.out.read_text() if chosen.out.exists() else ""
        order = [r for name in ARCHITECTURES for r in results.values() if r.name == name]
        chosen.out.write_text(page(order, old))
    return 0 if all(result.ok for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
