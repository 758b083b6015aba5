"""The command `pergrad`, also `python -m pergrad`.

Owns: what stands between the shell and the commands: the packages they need, errors, exit codes.
Does not know: the commands.
"""

import importlib.util
import sys
import traceback

from pergrad.errors import PergradError


def main() -> int:
    """Run the command line that started this process; returns its exit code.

    An error of pergrad is printed without its traceback, unless --traceback is given.
    """
    if importlib.util.find_spec("typer") is None:
        print(  # noqa: T201
            "The pergrad command needs packages that are not installed. Say "
            "`pip install 'pergrad[scan]'`; `import pergrad` works without them.",
            file=sys.stderr,
        )
        return 1
    from pergrad.command import app

    try:
        return app.run(sys.argv[1:])
    except PergradError as error:
        if app.wants_traceback(sys.argv[1:]):
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return app.ERROR
