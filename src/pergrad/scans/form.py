"""The form of a folder of scores: its manifest and its columns.

Owns: the format's name and version, the columns with units and meanings, and what a manifest must
have.
Does not know: torch, files, or what was scored.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pergrad.errors import StoreError, UsageError
from pergrad.scans.text import printable, storable

FORMAT = "pergrad scores"
VERSION = 1
TYPES = ("int64", "float", "double", "string")
MEANS = ("loss@mean", "norm@mean")  # over checkpoints
ALWAYS = {"index": ("int64",), "loss": ("float", "double"), "norm": ("float", "double"),
          "error": ("string",)}  # fmt: skip


def means_of(columns: Iterable[str]) -> dict[str, list[str]]:
    """The means over checkpoints that some columns have, each with the columns that it is over.

    >>> means_of(["loss", "norm", "loss@a", "norm@a", "loss@b", "norm@b"])
    {'loss@mean': ['loss@a', 'loss@b'], 'norm@mean': ['norm@a', 'norm@b']}
    """
    single = [name for name in columns if name not in MEANS]
    found = {mean: [n for n in single if n.startswith(mean.removesuffix("mean"))] for mean in MEANS}
    return {mean: over for mean, over in found.items() if over}


def mean_of(rows: Sequence[Any]) -> Any:
    """The mean of numpy's columns, in float64 and in their order, so that it is always the same."""
    return sum(row.astype("float64") for row in rows) / len(rows)


def columns_of(
    *,
    double: bool,
    keys: bool,
    groups: Mapping[str, Iterable[str]],
    references: Iterable[str],
    checkpoints: Sequence[str] = (),
) -> dict[str, Any]:
    """The table's columns in order: type (Arrow's name), unit, meaning.

    Raises:
        UsageError: two of them would have one name.
    """
    number, norm = "double" if double else "float", "loss per unit of parameter"
    found = {"index": {"type": "int64", "unit": "", "meaning": "number of the example, from 0"}}

    def add(name: str, kind: str, unit: str, meaning: str) -> None:
        name, meaning = storable(name), storable(meaning)
        if name in found:
            raise UsageError(
                f"Two columns would be called {printable(name)!r}: a group or reference has the "
                "name of another one (the rows of a reference NAME with several rows are NAME:0, "
                "NAME:1, ...). Rename one of them."
            )
        found[name] = {"type": kind, "unit": unit, "meaning": meaning}

    if keys:
        add("key", "string", "", "the example's stable name")
    add("loss", number, "loss", "the example's loss")
    add("norm", number, norm, "L2 norm of the gradient of the loss for all parameters")
    for group, members in groups.items():
        names = list(members)
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        add(f"norm:{group}", number, norm, f"L2 norm of the gradient's part for {shown}")
    for name in references:
        add(f"dot:{name}", number, f"({norm})²", f"inner product with the reference {name}")
        add(f"cosine:{name}", number, "", f"cosine with the reference {name}; 0 for no gradient")
    for name in checkpoints:
        add(f"loss@{name}", number, "loss", f"loss with the weights of the checkpoint {name}")
        add(f"norm@{name}", number, norm, f"norm with the weights of the checkpoint {name}")
    if checkpoints:
        over = f"over the {len(checkpoints)} checkpoints"
        add("loss@mean", number, "loss", f"mean of the losses {over}")
        add("norm@mean", number, norm, f"mean of the norms {over}")
    add("error", "string", "", "why the example has no scores; null where it has")
    return found


def check_format(manifest: object, where: str) -> dict[str, Any]:
    """A manifest that this version can read.

    Raises:
        StoreError: it is something else's, or of another format version.
    """
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(
            f"{where} has a manifest.json that pergrad did not write. Nothing was changed; give "
            "the scores a folder of their own."
        )
    version = manifest.get("version")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        remedy = (
            "Install a newer pergrad to read it."
            if newer
            else "Read it with the pergrad that wrote it "
            f"({_writer(manifest)}), or scan again into "
            "another folder."
        )
        raise StoreError(
            f"{where} has scores in format version {printable(version)[:40]}; this pergrad reads "
            f"version {VERSION}. Nothing was changed. {remedy}"
        )
    wrong = _wrong(manifest)
    if wrong is not None:
        raise StoreError(
            f"{where}/manifest.json is not what pergrad wrote: {wrong}. Nothing was changed. Bring "
            "the file back from a copy, or scan again into another folder."
        )
    return manifest


def _writer(manifest: dict[str, Any]) -> str:
    scored = manifest.get("scored")
    return printable(scored.get("pergrad", "unknown")) if isinstance(scored, dict) else "unknown"


def _wrong(manifest: dict[str, Any]) -> str | None:
    """What a manifest lacks or has of another kind, in words; None if it is well formed."""

    def lacks(holder: Any, where: str, wanted: dict[str, type | tuple[type, ...]]) -> str | None:
        if not isinstance(holder, dict):
            return f"{where} is not an object"
        for name, kind in wanted.items():
            value = holder.get(name)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                return f"{where} has no {name} of the right kind"
        return None

    found = (
        lacks(manifest, "it", {"scored": dict, "settings": dict, "columns": dict, "counts": dict,
                               "created": str, "finished": bool})
        or lacks(manifest["scored"], "scored", {"model": str, "parameters": list, "examples": int,
                                                "weights_hash": str})
        or lacks(manifest["settings"], "settings", {"batch_size": int, "mode": str})
    )  # fmt: skip
    if found:
        return found
    scored, settings, columns = (manifest[n] for n in ("scored", "settings", "columns"))
    if scored["examples"] < 1 or not settings["batch_size"] >= 1:
        return "its number of examples or its batch size is below 1"
    for entry in scored["parameters"]:
        if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str)):
            return "scored.parameters has something else than [name, shape, dtype]"
    if not isinstance(scored.get("keys_hash"), (str, type(None))):
        return "scored.keys_hash is no text"
    for name in ("groups", "options", "against", "checkpoints"):
        if not isinstance(settings.get(name, {}), dict):
            return f"settings.{name} is not an object"
    for name, about in columns.items():
        wrong = lacks(about, f"the column {printable(name)}",
                      {"type": str, "unit": str, "meaning": str})  # fmt: skip
        if wrong or about["type"] not in ALWAYS.get(name, TYPES):
            return wrong or f"the column {printable(name)} has another type"
        if any(storable(text) != text for text in (name, about["unit"], about["meaning"])):
            return f"the column {printable(name)} has text that UTF-8 lacks"
    absent = [name for name in ALWAYS if name not in columns]
    if absent:
        return f"it has no column {absent[0]}"
    for name, count in manifest["counts"].items():
        if not isinstance(count, int) or count < 0:
            return f"counts.{printable(name)} is no count"
    return None
