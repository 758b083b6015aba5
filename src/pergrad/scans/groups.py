"""Which parameters a column of norms is about.

Owns: the forms in which groups are asked for, and the messages about them.
Does not know: how norms are computed.
"""

from collections.abc import Mapping
from typing import Any

from pergrad import inputs
from pergrad.engine.places import module_of
from pergrad.errors import UsageError
from pergrad.scans import manifest
from pergrad.scans.job import Job
from pergrad.scans.text import printable, storable


def resolve_groups(groups: Any, job: Job) -> dict[str, tuple[str, ...]]:
    """Name of each group -> its parameters' names."""
    if groups is None:
        return {}
    names = list(manifest.parameters_of(job))
    if groups == "parameter":
        return {n: (n,) for n in names}
    if groups == "layer":
        found: dict[str, tuple[str, ...]] = {}
        for n in names:
            layer = module_of(n) or n
            found[layer] = (*found.get(layer, ()), n)
        return found
    if not isinstance(groups, Mapping):
        raise UsageError(
            f"groups is {groups!r}. Pass \"layer\", \"parameter\", or a mapping from a name to a "
            "list of parameters' names."
        )  # fmt: skip
    for group, members in groups.items():
        unknown = [] if isinstance(members, str) else [n for n in members if n not in names]
        if isinstance(members, str) or unknown or not members:
            raise UsageError(
                f"The group {group!r} has "
                + (
                    f"no parameters called {inputs.names_list(unknown)}"
                    if unknown
                    else "no list of names"
                )
                + f". The parameters are {inputs.names_list(names, 10)}."
            )
    named = {storable(str(group)): tuple(members) for group, members in groups.items()}
    if len(named) < len(groups):
        raise UsageError(
            f"Two of the groups {printable(list(groups))} have one name as text, and so one "
            "column. Rename one of them."
        )
    return named
