"""What only some parts of pergrad need, and what to say where it is absent.

Owns: the message that names the `pip install` line.
Does not know: what the packages are for.
"""

from importlib.util import find_spec

from pergrad.errors import MissingExtraError


def need(extra: str, *packages: str) -> None:
    """Make sure that packages can be imported, which `pip install 'pergrad[extra]'` brings.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"This needs {' and '.join(missing)}, which pergrad does not install by default. "
            f"Say: pip install 'pergrad[{extra}]'"
        )
