"""Kill scans at arbitrary moments and go on: run by test_scan_kills.py in a process of its own.

A moment is the n-th time that anything is called while a scan runs, from Python or from C: the
process then kills itself with SIGKILL. So the moments are as fine as the code, are spread over the
whole scan, whatever the machine's speed. How many calls there are does depend on it, for progress
is shown by the clock: where a moment comes after the end, an earlier one is taken.
"""

import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch
from scanning import Listed, data, job, scan

from pergrad.scans import writer

COUNT = 40
SETTINGS = {"batch_size": 8}


def child(folder: Path, kill_at: int | None) -> tuple[bool, int]:
    """Scan in a forked process; whether it was killed, and how many calls it made if not."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            calls = 0

            def count(frame: object, event: str, argument: object) -> None:
                nonlocal calls
                calls += event in ("call", "c_call")
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            task = job(COUNT, data=Listed(data(COUNT), {29: ValueError("broken")}))
            sys.setprofile(count)
            scan(task, folder, **SETTINGS)
            sys.setprofile(None)
            os.write(writing, str(calls).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read()
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True, 0
    assert os.WEXITSTATUS(status) == 0, "the scan failed; its traceback is above"
    return False, int(said)


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    writer.ROWS_PER_PART = 16
    scan(job(8), folder / "warm", **SETTINGS)  # what is imported on demand is, before the forks
    _, calls = child(folder / "whole", None)
    choose = random.Random(0)
    moments = sorted(choose.sample(range(1, calls), kills))
    for k, moment in enumerate(moments):
        out = folder / f"killed-{k}"
        killed, made = child(out, moment)
        while not killed:
            shutil.rmtree(out)
            killed, made = child(out, choose.randrange(1, made))
        # every fourth is killed again while it goes on
        if k % 4 == 0:
            child(out, choose.randrange(1, calls))
        killed, _ = child(out, None)
        assert not killed
    sys.stdout.write(f"{len(moments)} kills among {calls} calls")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
