"""The parent's end of a contestant's process: start it, ask it, stop it.

Owns: pipes, time limits, and the error of whoever fails.
Does not know: what is asked.
"""

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

CHILD = Path(__file__).parent / "child.py"


class FailedError(Exception):
    """A contestant cannot do it; the message is for the table."""


class Process:
    """One contestant on one workload. Asking after a failure raises that failure again.

    `source` is a folder to import packages from before those that are installed; `script` is what
    the process runs, and answers as child.py does.
    """

    def __init__(
        self, workload: str, contestant: str, *, tiny: bool = False, source: Path | None = None,
        script: Path = CHILD,
    ) -> None:  # fmt: skip
        # A file, open as long as self: some libraries print more than a pipe that nobody reads
        # can hold.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._child = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), workload, contestant]
            + (["--tiny"] if tiny else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=None if source is None else {**os.environ, "PYTHONPATH": str(source)},
        )
        self._selector = selectors.DefaultSelector()
        assert self._child.stdout is not None
        self._selector.register(self._child.stdout, selectors.EVENT_READ)
        self.error: str | None = None
        self.printed = ""

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next answer; it must come within so many seconds."""
        assert self._child.stdout is not None
        start = time.monotonic()
        if not self._selector.select(seconds):
            self._fail(f"stopped: not done within {seconds:.0f} s")
        line = self._child.stdout.readline()
        if not line:
            code = self._child.wait()
            self._fail(
                f"the process ended with status {code} after {time.monotonic() - start:.0f} s"
            )
        found = json.loads(line)
        if "error" in found:
            self._fail(found["error"])
        return found

    def ask(self, do: str, *, seconds: float, **more: Any) -> dict[str, Any]:
        if self.error is not None:
            raise FailedError(self.error)
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            self._fail(f"the process ended with status {self._child.wait()}")
        return self.answer(seconds)

    def _fail(self, error: str) -> None:
        self.error = error
        self.close()
        raise FailedError(error)

    def close(self) -> None:
        """End the process; what it wrote to standard error stays in `printed`."""
        if self._log.closed:
            return
        self._child.kill()
        self._child.wait()
        self._selector.close()
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            with suppress(OSError):  # a command that was never read is of no interest
                pipe.close()
        self._log.seek(0)
        self.printed = self._log.read()
        self._log.close()
