"""Folders for what is found out about a machine once: measured costs, compiled kernels.

Owns: where they are, and files that are there whole or not at all.
Does not know: what is in them.
"""

import os
from pathlib import Path
from tempfile import NamedTemporaryFile


def folder(variable: str, name: str) -> Path | None:
    """What the environment variable says, else ~/.cache/pergrad/<name>.

    None if the variable is empty, or the user has no home.
    """
    chosen = os.environ.get(variable)
    if chosen == "":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(chosen or f"{home}/pergrad/{name}").expanduser()
    except RuntimeError:  # a container whose user is a mere number
        return None


def write(path: Path, content: bytes) -> None:
    """Never half a file, whoever reads it now. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("wb", dir=path.parent, suffix=".new", delete=False) as whole:
        try:
            whole.write(content)
            whole.flush()
            os.replace(whole.name, path)
        except OSError:
            os.unlink(whole.name)
            raise
