"""The command `pergrad`, also `python -m pergrad`.

Owns: what stands between the shell and the commands: the packages they need, errors, exit codes.
Does not know: the commands.
"""

import sys
import traceback

from pergrad.errors import PergradError, UsageError, explained, glossary
from pergrad.extras import need
from pergrad.scans.text import printable_lines


def main() -> int:
    """Run the command line that started this process; returns its exit code.

    An error of pergrad is printed without its traceback, unless --traceback is given.
    """
    try:
        if sys.argv[1:2] == ["help"]:  # needs nothing but pergrad
            return _explain(" ".join(sys.argv[2:]))
        need("scan", "typer", "numpy", "pyarrow", "filelock", "rich")
        from pergrad.command import app

        return app.run(sys.argv[1:])
    except PergradError as error:
        if "--traceback" in sys.argv:
            traceback.print_exc()
        else:
            print(f"error: {printable_lines(error)}", file=sys.stderr)  # noqa: T201
            print(f"More: pergrad help {error.section}", file=sys.stderr)  # noqa: T201
        return 1


def _explain(section: str) -> int:
    """Print what docs/errors.md says under a name that an error gives, or the glossary of a word.

    Returns the exit code.
    """
    sections, words = explained(), glossary()
    asked = section.lower().replace("-", " ")
    said = [text for word, text in words.items() if asked == word.replace("-", " ")]
    if section and section not in sections and not said:
        names = "\n  ".join(sections)
        raise UsageError(
            f"No errors have a section {section!r}. The sections are:\n  {names}\n"
            f"Words that are explained as well: {', '.join(sorted(words))}."
        )
    print(sections.get(section) or "".join(said) or "\n".join(sections))  # noqa: T201
    return 0
