"""The demo: an example file of the project, run where it is installed.

Owns: where the examples are, and what the demo needs.
Does not know: what the demo does.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pergrad
from pergrad.command import jobs
from pergrad.errors import UsageError

NEEDED = ("jinja2", "matplotlib", "PIL", "pyarrow", "sklearn")


def file() -> Path:
    """The demo's file: beside the package in a checkout, inside it where it is installed."""
    package = Path(pergrad.__file__).parent
    installed = package / "examples"
    return (installed if installed.is_dir() else package.parents[1] / "examples") / "digits.py"


def run(out: Path) -> dict[str, Any]:
    """Run it; what it found.

    Raises:
        UsageError: a package that it needs is not installed.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"The demo needs packages that are not installed ({', '.join(missing)}). Say "
            "`pip install 'pergrad[demo]'`."
        )
    return jobs.function(f"{file()}:main")(out)
