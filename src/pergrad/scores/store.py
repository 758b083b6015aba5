"""The folder that scores are kept in: whole files whose names certify their content.

Owns: the folder's layout, its lock, its parts and their checksums, and what the disk says no to.
Does not know: how scores come about, nor what their columns mean.

    manifest.json
    parts/part-{first index}-{rows}-{checksum}.parquet
    set-aside/                    damaged parts, after their examples were asked for again
    references/                   mean gradients, so that a resumed scan need not compute them again

A part is written under a temporary name, forced to the disk and renamed, so there is never a part
that is not whole; the checksum in its name tells when it has changed since. No other record says
which examples are done: the parts do.
"""

import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pergrad.errors import StoreError
from pergrad.scores.manifest import check_format

_NAME = re.compile(r"part-(\d{12,})-(\d+)-([0-9a-f]{32})\.parquet")
_OURS = {"manifest.json", "parts", "shown", "set-aside", "references"}
_TYPES = {"int64": pa.int64(), "float": pa.float32(), "double": pa.float64(), "string": pa.string()}


@dataclass(frozen=True, slots=True)
class Part:
    """One file of scores, as its name tells."""

    path: Path
    first: int
    rows: int
    digest: str


def schema(columns: Mapping[str, Any]) -> pa.Schema:
    """The table's Arrow schema, from the manifest's columns; units and meanings go with it."""
    return pa.schema(
        [
            pa.field(name, _TYPES[c["type"]], metadata={k: c[k] for k in ("unit", "meaning")})
            for name, c in columns.items()
        ]
    )


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """What the operating system refuses, in words."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"Cannot write to {folder}: {error.strerror or error}. What has been written there "
            "before is whole and stays. Make room (or a folder that can be written to), and run "
            "the same scan again: it goes on where it stopped."
        ) from error


def _write_whole(path: Path, content: bytes) -> None:
    """All or nothing, also if the machine stops: a temporary file, forced to the disk, renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "nt":
        return  # has no way to force a folder's entries to the disk
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class Store:
    """A folder of scores. Reading needs no lock; writing is for who holds `locked(folder)`.

    `manifest` is what manifest.json says, None before there is one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] | None = self._read_manifest()

    # --- the manifest ----------------------------------------------------------------------------

    def _read_manifest(self) -> dict[str, Any] | None:
        path = self.folder / "manifest.json"
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(
                f"Cannot read {path}: {error.strerror}. Check the folder's path and permissions."
            ) from error
        try:
            found = json.loads(text)
        except ValueError:
            found = None  # not ours
        return check_format(found, str(self.folder))

    @property
    def columns(self) -> dict[str, Any]:
        """The manifest's columns."""
        assert self.manifest is not None
        return self.manifest["columns"]

    def save(self, manifest: dict[str, Any]) -> None:
        """Replace the manifest."""
        with _disk(self.folder):
            text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
            _write_whole(self.folder / "manifest.json", text.encode())
        self.manifest = manifest

    # --- parts -----------------------------------------------------------------------------------

    def parts(self) -> list[Part]:
        """The parts there are, by their first example."""
        found = []
        folder = self.folder / "parts"
        for name in os.listdir(folder) if folder.is_dir() else ():
            match = _NAME.fullmatch(name)
            if match:
                found.append(Part(folder / name, int(match[1]), int(match[2]), match[3]))
            elif name.endswith(".parquet"):
                raise StoreError(
                    f"{folder / name} is not a part that pergrad wrote. Everything that reads the "
                    "folder would read it too: move it elsewhere."
                )
        return sorted(found, key=lambda part: (part.first, part.path.name))

    def add(self, table: pa.Table) -> Part:
        """Write rows as a new part."""
        table = table.sort_by("index") if len(table) > 1 else table
        sink = pa.BufferOutputStream()
        floats = [f.name for f in table.schema if pa.types.is_floating(f.type)]
        strings = [f.name for f in table.schema if pa.types.is_string(f.type)]
        pq.write_table(
            table,
            sink,
            compression="zstd",
            use_dictionary=False,
            use_byte_stream_split=floats,
            column_encoding={"index": "DELTA_BINARY_PACKED"}
            | dict.fromkeys(strings, "DELTA_BYTE_ARRAY"),
            store_schema=True,
        )
        content = sink.getvalue().to_pybytes()
        digest, first = _digest(content), table["index"][0].as_py()
        name = f"part-{first:012d}-{len(table)}-{digest}.parquet"
        path = self.folder / "parts" / name
        with _disk(self.folder):
            path.parent.mkdir(exist_ok=True)
            _write_whole(path, content)
        return Part(path, first, len(table), digest)

    def load(self, part: Part) -> bytes | None:
        """A part's bytes, None if they are not those that were written."""
        try:
            content = part.path.read_bytes()
        except OSError:
            return None
        return content if _digest(content) == part.digest else None

    def damaged(self) -> list[Part]:
        """The parts whose content does not agree with their checksum. Reads everything."""
        return [part for part in self.parts() if self.load(part) is None]

    def tables(self, names: Sequence[str]) -> Iterator[tuple[Part, "pa.Table | None"]]:
        """The parts one by one, each with its rows, or None where it is damaged."""
        for part in self.parts():
            content = self.load(part)
            if content is None:
                yield part, None
                continue
            with pa.BufferReader(content) as source:
                table = pq.read_table(source, columns=list(names), use_threads=False)
            yield part, table.select(names)

    def set_aside(self, part: Part) -> None:
        """Move a part out of the way; its examples count as not scored."""
        with _disk(self.folder):
            aside = self.folder / "set-aside"
            aside.mkdir(exist_ok=True)
            os.replace(part.path, aside / part.path.name)

    # --- references ------------------------------------------------------------------------------

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors by name."""
        sink = io.BytesIO()
        torch.save({n: t.cpu() for n, t in tensors.items()}, sink)
        with _disk(self.folder):
            (self.folder / "references").mkdir(exist_ok=True)
            _write_whole(self.folder / "references" / f"{name}.pt", sink.getvalue())

    def load_tensors(self, name: str) -> dict[str, Tensor] | None:
        """Tensors that were kept, None if there are none of that name."""
        path = self.folder / "references" / f"{name}.pt"
        return torch.load(path, weights_only=True) if path.exists() else None

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
                f"There is no column {', '.join(unknown)}. The columns are: "
                f"{', '.join(self.columns)}."
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
        index = table["index"].to_numpy()
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
    with _disk(folder):
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
        except filelock.Timeout:
            raise StoreError(
                f"Another scan is writing to {folder} at this moment. Wait for it to end, or give "
                "this one another folder."
            ) from None
    try:
        store = Store(folder)
        with _disk(folder):
            for left in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
                left.unlink()  # of a scan that was killed while it wrote
        yield store
    finally:
        lock.release()


def failed_rows(table: pa.Table) -> pa.Table:
    """The rows of examples that could not be scored."""
    return table.filter(pc.is_valid(table["error"]))
