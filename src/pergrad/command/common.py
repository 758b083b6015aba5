"""What several commands say alike: a job's name, --json, exit codes, and how to go on after Ctrl-C.

Owns: these options and codes, and the words after an interruption.
Does not know: the commands.
"""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pergrad.errors import PergradError

FINE, ERROR, USAGE, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130

JobName = Annotated[
    str,
    typer.Argument(
        metavar="JOB",
        help="path/to/file.py:function (loading it runs that file) or package.module:function.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@contextmanager
def resumable(kept: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C, say what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        try:
            said = kept()
        except PergradError:
            said = "Nothing is stored yet."
        typer.echo(f"\nInterrupted. {said} To resume, say:\n  {again()}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def again() -> str:
    """The command line that started this process; said again, it resumes."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"torchrun (as before) -m pergrad {shlex.join(sys.argv[1:])}"
    return f"{program()} {shlex.join(word for word in sys.argv[1:] if word != '--no-resume')}"


def program() -> str:
    """What this process was started as: `pergrad`, or `python -m pergrad`."""
    started = Path(sys.argv[0])
    return "python -m pergrad" if started.name == "__main__.py" else started.stem
