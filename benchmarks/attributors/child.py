"""One library on one workload: a method's name a line comes in, a line of JSON goes out.

Run by `benchmarks/influences.py`, which lets the libraries take turns.
"""

import contextlib
import io
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from attributors.libraries import LIBRARIES
from attributors.workloads import build


def main() -> None:
    """Warm up with a few examples, and serve."""
    library, name, kept = sys.argv[1:4]
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    out, ask = sys.stdout, LIBRARIES[library]
    tiny, work = build(name, tiny=True), build(name)

    def asked(what: object, method: str) -> tuple[torch.Tensor, float, float]:
        with tempfile.TemporaryDirectory() as folder:
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                clock, processor = time.perf_counter(), time.process_time()
                scores = ask(what, method, Path(folder))
                spent = time.perf_counter() - clock, time.process_time() - processor
        return scores.detach().clone(), *spent

    try:
        for method in ("identity", "ekfac"):
            asked(tiny, method)
        print(json.dumps({"ready": True}), file=out, flush=True)
        for line in sys.stdin:
            method = line.strip()
            scores, clock, processor = asked(work, method)
            torch.save(scores, f"{kept}-{method}.pt")
            print(json.dumps({"clock": clock, "processor": processor}), file=out, flush=True)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"[:500]
        print(json.dumps({"error": message}), file=out, flush=True)
        raise


if __name__ == "__main__":
    main()
