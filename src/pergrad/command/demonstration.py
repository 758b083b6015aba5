"""The demo: an example file of the project, run where it is installed.

Owns: where the examples are, and what the demo needs.
Does not know: what the demo does.
"""

from pathlib import Path
from typing import Any

import pergrad
from pergrad.command import jobs
from pergrad.extras import need


def file() -> Path:
    """The demo's file: beside the package in a checkout, inside it where it is installed."""
    package = Path(pergrad.__file__).parent
    installed = package / "examples"
    folder = installed if installed.is_dir() else package.parents[1] / "examples"
    return folder / "influential_digits.py"


def run(out: Path) -> dict[str, Any]:
    """Run it; what it found.

    Raises:
        MissingExtraError: a package that it needs is not installed.
    """
    need("demo", "bokeh", "jinja2", "pyarrow", "safetensors", "PIL", "sklearn")
    return jobs.function(f"{file()}:main")(out)
