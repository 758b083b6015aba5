"""Columns added to scores that are finished: only what is missing is scored.

Owns: telling a request for more columns from one for something else, and putting them beside those
there are.
Does not know: how a block is scored; the columns come from a scan of their own.

The new columns are scored into a folder of their own, adding-{hash}/, by a scan like any other,
which goes on after any stop. Until it is finished the scores are what they were. Then part after
part is written again with all columns, and its old file removed; last the manifest. Where that
stops in between, the manifest still says the old columns, which every part has, and the same scan
goes on: a part says for which columns it was written. A scan for others writes all parts again.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pergrad import folders
from pergrad.errors import StoreError
from pergrad.scans import manifest
from pergrad.scans.form import MEANS, mean_of, means_of
from pergrad.scans.options import ScanOptions
from pergrad.scans.parts import in_turn, pack, turn_of
from pergrad.scans.store import Store, disk, schema
from pergrad.scans.text import printable, storable
from pergrad.scans.work import Work

PARTS_AT_ONCE = 64  # are written again before the old ones are removed


@dataclass(frozen=True)
class Added:
    """What is new in a request: groups, references, checkpoints, and their columns."""

    groups: tuple[str, ...]
    references: tuple[str, ...]
    checkpoints: tuple[str, ...]
    columns: tuple[str, ...]  # in order

    @property
    def scored(self) -> tuple[str, ...]:
        """The new columns that have to be scored; means follow from others."""
        return tuple(name for name in self.columns if name not in MEANS)

    @property
    def means(self) -> bool:
        """Whether the means over checkpoints are new or become others."""
        return bool(self.checkpoints) or any(name in MEANS for name in self.columns)

    @property
    def place(self) -> str:
        """The folder of the scan for them."""
        return f"adding-{manifest.hash_of_strings(self.scored)[:12]}"


def added(old: Mapping[str, Any], new: Mapping[str, Any]) -> Added | None:
    """What a manifest has more than a finished one; None if that is not all that differs."""
    before, after = old["settings"], new["settings"]
    names = {}
    for kind in ("groups", "against", "checkpoints"):
        had, has = before.get(kind) or {}, after.get(kind) or {}
        if any(name not in has for name in had):
            return None
        names[kind] = [name for name in has if name not in had]
    columns = [name for name in new["columns"] if name not in old["columns"]]
    if not columns or not all(_belongs(name, *names.values()) for name in columns):
        return None
    if any(name not in new["columns"] for name in old["columns"]) or not old["finished"]:
        return None
    fewer = {
        kind: {n: value for n, value in (after.get(kind) or {}).items() if n not in names[kind]}
        for kind in names
    }
    alike = {**new, "columns": old["columns"], "settings": {**after, **fewer}}
    if manifest.differences(old, alike):
        return None
    groups, references, points = (tuple(each) for each in names.values())
    return Added(groups, references, points, tuple(columns))


def _belongs(column: str, *names: list[str]) -> bool:
    """Whether a column is one of those groups, references and checkpoints, or a mean."""
    groups, references, points = ([storable(name) for name in kind] for kind in names)
    kind, _, name = column.partition(":")
    if kind in ("dot", "cosine"):
        return any(name == r or name.startswith(f"{r}:") for r in references)
    return (
        column in MEANS
        or column in [f"norm:{group}" for group in groups]
        or column in [f"{what}@{point}" for point in points for what in ("loss", "norm")]
    )


def options_for(options: ScanOptions, new: Added, work: Work, command: str | None) -> ScanOptions:
    """The scan for the new columns alone; references as they have been made ready already."""
    return replace(
        options,
        groups={name: work.settings.groups[name] for name in new.groups} or None,
        against={r.name: r.value for r in work.references if r.name in new.references} or None,
        checkpoints=None,  # the request has them
        batch_size=work.settings.batch_size,
        resume=True,
        rescore=options.rescore or "failed",  # it may have been a disk that was away
        command=command,
    )


def put_beside(store: Store, staged: Store | None, new: Mapping[str, Any], what: Added) -> None:
    """Give every part the columns that were scored apart, and say so in the manifest.

    Raises:
        StoreError: an example that has scores could not be scored for them.
    """
    extra = list(what.scored)
    rows_of = None if staged is None else _Staged(staged, extra)
    if staged is not None:
        _refuse_failures(store, staged)
    means = means_of(new["columns"]) if what.means else {}
    if any(name in store.columns for name in means):
        # of some parts they are over more checkpoints soon: nobody is to read them meanwhile
        left = {name: about for name, about in store.columns.items() if name not in means}
        store.save({**(store.manifest or {}), "columns": left})
    wanted, mark = schema(new["columns"]), _mark(new)
    _remove(store, store.superseded())
    old: list[Path] = []
    for part in store.parts():
        content = part.load()
        if content is None:
            continue  # the survey has named it before
        table = store.whole(part, content)
        turn, written_for = turn_of(table.schema)
        if written_for != mark:
            columns = dict(zip(table.column_names, table.columns, strict=True))
            failed = pc.is_valid(table["error"])
            if rows_of is not None:
                columns |= _where(failed, rows_of(table["index"].to_numpy()), extra)
            for mean, over in means.items():
                rows = [columns[name].to_numpy() for name in over]
                values = pa.array(mean_of(rows), wanted.field(mean).type)
                columns[mean] = pc.if_else(failed, pa.scalar(None, values.type), values)
            arrays = [columns[name].cast(wanted.field(name).type) for name in wanted.names]
            shape = in_turn(wanted, turn + 1, mark)
            store.put(pack(pa.Table.from_arrays(arrays, schema=shape)))
            old.append(part.path)
        if len(old) == PARTS_AT_ONCE:
            _remove(store, old)
            old = []
    _remove(store, old)
    store.save(dict(new))
    if staged is not None:
        with disk(store.folder):
            shutil.rmtree(staged.folder)
    forget(store)  # a scan for some of these columns, that was stopped


def _mark(new: Mapping[str, Any]) -> str:
    """Of the model, the data and the settings that columns are of."""
    settings = {n: v for n, v in new["settings"].items() if n not in ("batch_size", "device")}
    about = [new["scored"], settings, list(new["columns"])]
    return manifest.hash_of_strings([json.dumps(about, sort_keys=True)])


def _where(failed: pa.Array, more: pa.Table, names: Sequence[str]) -> dict[str, Any]:
    """Columns of a table, null for what has failed."""
    return {
        name: pc.if_else(failed, pa.scalar(None, more[name].type), more[name]) for name in names
    }


def forget(store: Store) -> None:
    """Remove the scans for columns that the scores have: the end of an earlier one was cut off."""
    for folder in store.folder.glob("adding-*"):
        with suppress(StoreError):
            staged = Store(folder).manifest
            # without a manifest it was being removed, or nothing had been scored
            if staged is None or set(staged["columns"]) <= set(store.columns):
                with disk(store.folder):
                    shutil.rmtree(folder)


def _remove(store: Store, paths: Sequence[Path]) -> None:
    """Remove parts that are there in another form."""
    if not paths:
        return
    store.settle()
    with disk(store.folder):
        for path in paths:
            path.unlink(missing_ok=True)
        folders.sync(store.folder / "parts")


def _refuse_failures(store: Store, staged: Store) -> None:
    """Every example with scores must have the new columns too."""
    total = store.manifest["scored"]["examples"] if store.manifest else 0
    here, there = store.survey(total), staged.survey(total)
    wrong = np.flatnonzero(~here.failed & there.failed)
    if len(wrong):
        table = staged.read(["index", "error"])
        said = table.filter(pc.equal(table["index"], int(wrong[0])))["error"][0].as_py()
        raise StoreError(
            f"{len(wrong)} examples have scores in {printable(store.folder)}, and could not be "
            f"scored for the new columns: example {wrong[0]} raised {printable(said)[:300]}. "
            "Nothing was changed, and what was scored is kept. Run the same scan again when the "
            "cause is gone: it tries these again."
        )


class _Staged:
    """The new columns by example, a part at a time."""

    def __init__(self, staged: Store, columns: list[str]) -> None:
        self.staged, self.columns = staged, columns
        self.parts = staged.parts()
        assert staged.manifest is not None
        total = staged.manifest["scored"]["examples"]
        self.part_of = np.zeros(total, dtype=np.int32)
        self.row_of = np.zeros(total, dtype=np.int32)
        for k, (_, table) in enumerate(staged.tables(["index"])):
            if table is not None:
                index = table["index"].to_numpy()
                self.part_of[index], self.row_of[index] = k, np.arange(len(index))
        self.load = lru_cache(maxsize=4)(self._load)

    def _load(self, k: int) -> pa.Table:
        for _, table in self.staged.tables(self.columns, self.parts[k : k + 1]):
            if table is not None:
                return table
        raise StoreError(
            f"{printable(self.parts[k].path)} is not what was written. Run the scan again with "
            'rescore="damaged".'
        )

    def __call__(self, index: np.ndarray) -> pa.Table:
        """The rows of some examples."""
        owners = self.part_of[index]
        used = np.unique(owners)
        starts = np.cumsum([0, *(self.parts[k].rows for k in used)])[:-1]
        table = pa.concat_tables([self.load(int(k)) for k in used])
        at = starts[np.searchsorted(used, owners)] + self.row_of[index]
        return table.take(pa.array(at))
