"""The folder that scores are kept in: whole files whose names certify their content.

Owns: the folder's layout, its lock, its parts and their checksums, and what the disk says no to.
Does not know: how scores come about, nor what their columns mean.

    manifest.json
    parts/part-{first index}-{rows}-{checksum}.parquet
    references/{name}-{checksum}.pt     mean gradients, so that going on compares with the same
    shown/previews-{checksum}.parquet   what a person sees of the examples
    set-aside/                    what was damaged, after it was asked for again
    .lock, .owner                 who writes

A part is written under a temporary name, forced to the disk and renamed, so there is never a part
that is not whole; the checksum in its name tells when it has changed since. No other record says
which examples are done: the parts do.
"""

import json
import os
import re
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pergrad import folders
from pergrad.errors import StoreError
from pergrad.scans.form import TYPES, check_format
from pergrad.scans.parts import Packed, Part, latest, pack, parts_in
from pergrad.scans.parts import digest_of as digest_of  # also for other folders' files
from pergrad.scans.text import printable

_CHECKSUM = re.compile(r"-([0-9a-f]{32})\.\w+$")
_OURS = {"manifest.json", "parts", "shown", "set-aside", "references"}
_TYPES = dict(zip(TYPES, (pa.int64(), pa.float32(), pa.float64(), pa.string()), strict=True))
_OWNER = ".owner"


def schema(columns: Mapping[str, Any]) -> pa.Schema:
    """The table's Arrow schema, from the manifest's columns; units and meanings go with it."""
    return pa.schema(
        [
            pa.field(name, _TYPES[c["type"]], metadata={k: c[k] for k in ("unit", "meaning")})
            for name, c in columns.items()
        ]
    )


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """What the operating system refuses, in words."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None else f" ({printable(error.filename)})"
        raise StoreError(
            f"Cannot write to {printable(folder)}: {error.strerror or error}{where}. What has been "
            "written there before is whole and stays. Make room (or a folder that can be written "
            "to), and run the same scan again: it goes on where it stopped."
        ) from error


class Store:
    """A folder of scores. Reading needs no lock; writing is for who holds `locked(folder)`.

    `manifest` is what manifest.json says, None before there is one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.owner: str | None = None  # the mark of who writes; None for a reader
        self.settled = True  # whether the names of all parts are on the disk
        self.manifest: dict[str, Any] | None = self._read_manifest()

    # --- the manifest ----------------------------------------------------------------------------

    def _read_manifest(self) -> dict[str, Any] | None:
        path = self.folder / "manifest.json"
        try:
            text = folders.read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(
                f"Cannot read {printable(path)}: {error.strerror or error}. Check "
                "the folder's path and permissions."
            ) from error
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None  # not ours
        return check_format(found, printable(self.folder))

    @property
    def columns(self) -> dict[str, Any]:
        """The manifest's columns."""
        assert self.manifest is not None
        return self.manifest["columns"]

    def save(self, manifest: dict[str, Any]) -> None:
        """Replace the manifest. What it says of the parts holds: they are on the disk before."""
        self._mine()
        self.settle()
        # what UTF-8 lacks becomes an escape that JSON reads as the same
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        self._write(self.folder / "manifest.json", text.encode("utf-8", "backslashreplace"))
        self.manifest = manifest

    def _write(self, path: Path, content: bytes, *, named: bool = True) -> None:
        with disk(self.folder):
            if not path.parent.exists():
                path.parent.mkdir(exist_ok=True)
                folders.sync(self.folder)
            folders.write(path, content, mode=0o666, durable=True, named=named)

    def _mine(self) -> None:
        """Make sure that no other scan has begun to write here since this one did.

        A lock that was deleted, or that a network's file system does not keep, lets two scans in;
        the mark of the later one stands.
        """
        if self.owner is None:
            return
        try:
            now = folders.read(self.folder / _OWNER).decode(errors="replace").strip()
        except OSError:
            now = "nobody"
        if now != self.owner:
            raise StoreError(
                f"Another scan has begun to write to {printable(self.folder)} (its lock was "
                "removed, or the file system keeps none), so this one stops. What it has written "
                "is whole and stays; let the other one finish, or start it again."
            )

    # --- parts -----------------------------------------------------------------------------------

    def parts(self) -> list[Part]:
        """The parts there are, by their first example."""
        return latest(parts_in(self.folder / "parts"))

    def superseded(self) -> list[Path]:
        """Files of parts that were written again with more columns."""
        found = parts_in(self.folder / "parts")
        return sorted({part.path for part in found} - {part.path for part in latest(found)})

    def add(self, table: pa.Table) -> Part:
        """Write rows as a new part, for good."""
        part = self.put(pack(table))
        self.settle()
        return part

    def put(self, packed: Packed) -> Part:
        """Write a new part. Its content is on the disk; its name is after `settle`."""
        path = self.folder / "parts" / packed.name
        self._mine()
        try:
            self._write(path, packed.content, named=False)
        except StoreError:
            self._mine()  # another scan removes what it takes for left over
            raise
        self.settled = False
        try:
            self._mine()  # else the other scan may not have seen it, and scores the same
        except StoreError:
            path.unlink(missing_ok=True)
            raise
        return Part(path, packed.first, packed.rows, packed.digest)

    def settle(self) -> None:
        """Force the names of the parts to the disk: until then a power cut may undo them."""
        if self.settled:
            return
        self.settled = True  # before: a thread may add one meanwhile
        try:
            with disk(self.folder):
                folders.sync(self.folder / "parts")
        except BaseException:
            self.settled = False
            raise

    def damaged(self) -> list[Part]:
        """The parts whose content does not agree with their checksum. Reads everything."""
        return [part for part in self.parts() if part.load() is None]

    def tables(
        self, names: Sequence[str], parts: Sequence[Part] | None = None
    ) -> Iterator[tuple[Part, "pa.Table | None"]]:
        """The parts one by one, each with its rows, or None where it is damaged."""
        wanted = pa.schema([schema(self.columns).field(name) for name in names])
        for part in self.parts() if parts is None else parts:
            content = part.load()
            yield part, None if content is None else self._rows(part, content, wanted)

    def whole(self, part: Part, content: bytes) -> pa.Table:
        """A part with all columns that it has, which may be more than the manifest knows."""
        self._rows(part, content, schema(self.columns))
        with pa.BufferReader(content) as source:
            return pq.ParquetFile(source).read(use_threads=False)

    def _rows(self, part: Part, content: bytes, wanted: pa.Schema) -> pa.Table:
        """A part's rows. Its checksum is right; that does not make it one of this scan's."""
        try:
            with pa.BufferReader(content) as source:
                table = pq.ParquetFile(source).read(wanted.names, use_threads=False)
            table = table.select(wanted.names).replace_schema_metadata(None)
            table.validate(full=True)  # text, among others, is text
            found = {field.name: field.type for field in table.schema}
        except (pa.ArrowException, KeyError, OSError, ValueError) as error:
            raise _foreign(part, f"it cannot be read ({printable(error)[:200]})") from None
        for column in wanted:
            if found[column.name] != column.type:
                raise _foreign(
                    part, f"its column {printable(column.name)} has {found[column.name]}, not "
                    f"{column.type}"
                )  # fmt: skip
        if len(table) != part.rows:
            raise _foreign(part, f"it has {len(table)} rows, and its name says {part.rows}")
        if "index" in found:
            index = table["index"]
            total = self.manifest["scored"]["examples"] if self.manifest else 0
            least, most = pc.min_max(index).as_py().values()
            if index.null_count or (len(table) and not 0 <= least <= most < total):
                raise _foreign(part, f"it has examples that are not among the {total:,} scored")
        return table

    def set_aside(self, path: Path) -> None:
        """Move a file out of the way; what was in it counts as not there."""
        self._mine()
        with disk(self.folder):
            aside = self.folder / "set-aside"
            if not aside.exists():
                aside.mkdir(exist_ok=True)
                folders.sync(self.folder)
            os.replace(path, aside / path.name)
            folders.sync(aside)
            folders.sync(path.parent)

    # --- other files -----------------------------------------------------------------------------

    def add_file(self, place: str, name: str, content: bytes, suffix: str) -> None:
        """Keep content as `place/name-{checksum}{suffix}`, instead of what has that name."""
        self._mine()
        old = self._files(place, name, suffix)
        new = self.folder / place / f"{name}-{digest_of(content)}{suffix}"
        self._write(new, content)
        with disk(self.folder):
            for path in old:
                if path != new:
                    path.unlink(missing_ok=True)

    def file(self, place: str, name: str, suffix: str) -> bytes | None:
        """What was kept under a name, None if there is nothing.

        Raises:
            StoreError: it is not what was written.
        """
        for path in self._files(place, name, suffix):
            content = self._content(path)
            if content is None:
                raise StoreError(say_damaged_file(path))
            return content
        return None

    def _files(self, place: str, name: str, suffix: str) -> list[Path]:
        """Files of a name, the newest first. An earlier version's have no checksum."""
        shape = re.compile(rf"{re.escape(name)}(-[0-9a-f]{{32}})?{re.escape(suffix)}")
        folder = self.folder / place
        found = [folder / n for n in (os.listdir(folder) if folder.is_dir() else ())
                 if shape.fullmatch(n)]  # fmt: skip
        return sorted(found, key=lambda path: (path.lstat().st_mtime_ns, path.name), reverse=True)

    def _content(self, path: Path) -> bytes | None:
        try:
            content = folders.read(path)
        except OSError:
            return None
        checksum = _CHECKSUM.search(path.name)
        return content if checksum is None or checksum[1] == digest_of(content) else None

    def damaged_files(self) -> list[Path]:
        """References and previews that are not what was written."""
        found = []
        for place in ("references", "shown"):
            folder = self.folder / place
            for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
                if not name.startswith(".") and self._content(folder / name) is None:
                    found.append(folder / name)
        return found

    # --- reading ---------------------------------------------------------------------------------

    def read(self, names: Sequence[str] | None = None) -> pa.Table:
        """The rows of all parts, sorted by index, each checked against its checksum.

        Raises:
            StoreError: a part is damaged, two parts have the same example, or a column is unknown.
        """
        wanted = list(self.columns) if names is None else list(names)
        unknown = [name for name in wanted if name not in self.columns]
        if unknown:
            raise StoreError(
                f"There is no column {', '.join(map(printable, unknown))}. The columns are: "
                f"{', '.join(map(printable, self.columns))}."
            )
        asked = list(dict.fromkeys(["index", *wanted]))
        shape = pa.schema([schema(self.columns).field(name) for name in asked])
        parts = list(self.tables(asked))
        damaged = [part for part, table in parts if table is None]
        tables = [table for _, table in parts if table is not None]
        if damaged:
            raise StoreError(say_damaged(self.folder, damaged))
        if not tables:
            return shape.empty_table().select(wanted)
        table = pa.concat_tables(tables)
        # `to_numpy` would import pandas where that is installed, which takes longer than all else
        chunks = [np.from_dlpack(chunk) for chunk in table["index"].chunks]
        index = np.concatenate([np.zeros(0, dtype=np.int64), *chunks])
        if np.any(index[1:] <= index[:-1]):
            order = np.argsort(index, kind="stable")
            table = table.take(pa.array(order))
            index = index[order]
            twice = np.flatnonzero(index[1:] == index[:-1])
            if len(twice):
                raise StoreError(
                    f"{self.folder} has example {index[twice[0]]} twice ({len(twice)} such): files "
                    "of another scan were put into parts/. Take them out."
                )
        return table.select(wanted).combine_chunks()

    def survey(self, total: int) -> "Survey":
        """What there is of the examples 0 .. total - 1. Reads everything once."""
        found = Survey(np.zeros(total, dtype=bool), np.zeros(total, dtype=bool))
        for part, table in self.tables(["index", "loss", "norm", "error"]):
            if table is None:
                found.damaged.append(part)
                continue
            index = table["index"].to_numpy()
            found.present[index] = True
            failed = table["error"].is_valid().to_numpy()
            if failed.any():
                found.failed[index[failed]] = True
                found.failed_parts.append(part)
            finite = pc.and_(pc.is_finite(table["loss"]), pc.is_finite(table["norm"]))
            found.not_finite += pc.sum(pc.invert(finite)).as_py() or 0
        return found


@dataclass(slots=True)
class Survey:
    """Which examples there are, as masks, and which parts need attention."""

    present: np.ndarray  # has a row, with scores or with an error
    failed: np.ndarray  # has an error
    failed_parts: list[Part] = field(default_factory=list)  # nothing but errors is in them
    damaged: list[Part] = field(default_factory=list)
    not_finite: int = 0


def _foreign(part: Part, why: str) -> StoreError:
    return StoreError(
        f"{printable(part.path)} is not a part of these scores: {why}. It was not written by this "
        "scan: move it elsewhere, and run the scan again; it scores what is missing."
    )


def say_damaged_file(path: Path) -> str:
    """That a reference or the previews are damaged, and what to do."""
    return (
        f"{printable(path)} is not what was written (its checksum differs). Run the scan again "
        'with rescore="damaged": it moves the file to set-aside/ and makes it again.'
    )


def say_damaged(folder: Path, parts: Sequence[Part]) -> str:
    """Which parts are damaged, and what to do."""
    names = ", ".join(part.path.name for part in parts[:5])
    more = f" and {len(parts) - 5} more" if len(parts) > 5 else ""
    rows = sum(part.rows for part in parts)
    return (
        f"{len(parts)} of the parts in {folder / 'parts'} are not what was written (their "
        f"checksums differ): {names}{more}; {rows:,} examples are in them. Run the scan again with "
        'rescore="damaged": it moves them to set-aside/ and scores their examples again.'
    )


@contextmanager
def locked(folder: Path) -> Iterator[Store]:
    """Make the folder if need be, and be the only one who writes to it.

    Raises:
        StoreError: it cannot be written to, another scan is at it, or it is something else's.
    """
    with disk(folder):
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is a file. Give the scores a folder of their own.")
        there = set(os.listdir(folder)) if folder.exists() else set()
        foreign = sorted(name for name in there - _OURS if not name.startswith("."))
        if foreign and not (folder / "manifest.json").exists():
            raise StoreError(
                f"{folder} is not a folder of scores: it has {', '.join(foreign[:3])}"
                f"{', ...' if len(foreign) > 3 else ''} and no manifest.json. Nothing was changed; "
                "give the scores a folder of their own."
            )
        Store(folder)  # refuses what is not ours before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except NotImplementedError:
            pass  # a file system without locks: the owner's mark is what there is
        except filelock.Timeout:
            raise StoreError(
                f"Another scan is writing to {folder} at this moment. Wait for it to end, or give "
                "this one another folder."
            ) from None
    store = Store(folder)
    try:
        with disk(folder):
            store.owner = _take(folder)
            for left in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
                left.unlink()  # of a scan that was killed while it wrote
        yield store
    finally:
        _leave(store)
        lock.release()


def _take(folder: Path) -> str:
    """Say in the folder who writes to it from now on; what was said."""
    owner = f"{secrets.token_hex(8)} process {os.getpid()} on {socket.gethostname()}"
    mark = folder / _OWNER
    mark.unlink(missing_ok=True)  # also a link that somebody put there
    with open(mark, "x", encoding="utf-8") as file:
        file.write(owner)
    return owner


def _leave(store: Store) -> None:
    """Take the mark away, if it is still this scan's."""
    with suppress(OSError):
        mark = store.folder / _OWNER
        if folders.read(mark).decode(errors="replace") == store.owner:
            mark.unlink()
