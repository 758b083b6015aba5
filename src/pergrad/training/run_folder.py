"""The folder that a watched run is kept in: rows of examples and of steps, as Parquet files.

Owns: the folder's layout and columns, its checksums, which steps are there already, and who writes.
Does not know: how rows come about, what is made of them.

    manifest.json
    examples/part-{rank}-{first step}-{rows}-{checksum}.parquet
    steps/part-{rank}-{first step}-{rows}-{checksum}.parquet
    shown/{rank}-{checksum}.parquet     what a person sees of the examples
    notes/                              see `run_notes`
    .lock-{rank}                        who writes

A file is written under another name and renamed, so there is never half a file. Each rank of a
distributed run writes files of its own; whoever reads takes all of them as one table.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.parquet as pq

from pergrad import folders
from pergrad.errors import StoreError
from pergrad.scans.store import digest_of
from pergrad.scans.text import printable
from pergrad.training.run_notes import PLACE
from pergrad.training.waiting import EXAMPLES, Waiting

FORMAT, VERSION = "pergrad run", 1
_NAME = re.compile(r"part-(\d{4,})-(\d{12,})-(\d+)-([0-9a-f]{32})\.parquet")
_SHOWN = re.compile(r"(\d{4,})-([0-9a-f]{32})\.parquet")
_OURS = {"manifest.json", "examples", "steps", "shown", PLACE, "report.html"}

QUANTILES = (1, 10, 50, 90, 99)
STEPS = pa.schema(
    [(n, pa.int64()) for n in ("step", "rank", "ranks", "examples")]
    + [("sharded", pa.bool_())]
    + [(n, pa.float64()) for n in (
        "loss", "grad_norm", "weight_sum", "sq_weight_sum", "sq_norm_sum",
        *(f"p{q}" for q in QUANTILES), "max", "zero", "clipped", "top_share", "cosine",
        "noise_scale", "noise_low", "noise_high")]
    + [("spike", pa.string()), ("note", pa.string())]
)  # fmt: skip
SHOWN = pa.schema(
    [("key", pa.string()), ("kind", pa.string()), ("label", pa.string()), ("data", pa.binary())]
)


@dataclass(frozen=True, slots=True)
class Part:
    """One file of rows, as its name tells."""

    path: Path
    rank: int
    digest: str


class RunFolder:
    """A watched run on the disk. Reading needs no lock.

    Raises:
        StoreError: the folder is something else's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: filelock.BaseFileLock | None = None
        self.manifest = self._read_manifest()

    def _read_manifest(self) -> dict[str, Any] | None:
        path, where = self.folder / "manifest.json", printable(self.folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise StoreError(f"{where} is a file. Give the run a folder of its own.")
        try:
            text = folders.read(path)
        except FileNotFoundError:
            there = os.listdir(self.folder) if self.folder.is_dir() else []
            foreign = sorted(n for n in there if n not in _OURS and not n.startswith("."))
            if foreign:
                raise StoreError(
                    f"{where} is not the folder of a watched run: it has "
                    f"{printable(', '.join(foreign[:3]))} and no manifest.json. Nothing was "
                    "changed; give the run a folder of its own."
                ) from None
            return None
        except OSError as error:
            raise StoreError(
                f"Cannot read {printable(path)}: {error.strerror or error}. Check the folder's "
                "path and permissions."
            ) from error
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            kind = "the scores of a data set" if _is_scores(found) else "something else"
            raise StoreError(
                f"{where} has a manifest.json of {kind}, not of a watched run. Nothing was "
                "changed; give the run a folder of its own."
            )
        if found.get("version") != VERSION:
            raise StoreError(
                f"{where} has a run in format version {printable(found.get('version'))[:40]}; this "
                f"pergrad reads version {VERSION}. Nothing was changed. Read it with the pergrad "
                f"that wrote it ({printable(found.get('pergrad', 'unknown'))[:40]})."
            )
        kinds: dict[str, Any] = {
            "model": str,
            "parameters": list,
            "created": str,
            "tokens": (int, float),
        }
        wrong = [n for n, kind in kinds.items() if not isinstance(found.get(n), kind)]
        if wrong:
            raise StoreError(
                f"{where}/manifest.json has no {wrong[0]} of the right kind. Nothing was changed. "
                "Bring the file back from a copy, or give the run another folder."
            )
        return found

    def check_new(self) -> None:
        """There is no run yet. Raises StoreError."""
        if self.manifest is not None:
            raise StoreError(
                f"{printable(self.folder)} has a watched run already, and resume is False. Give "
                f"this run a folder of its own, such as {printable(self.free())}, or delete the "
                "old one."
            )

    def free(self) -> Path:
        """A folder of a like name that is not there."""
        names = (self.folder.with_name(f"{self.folder.name}-{n}") for n in itertools.count(2))
        return next(path for path in names if not path.exists())

    # --- writing ---------------------------------------------------------------------------------

    def take(self, rank: int) -> None:
        """Be the only one who writes this rank's rows. Raises OSError, StoreError."""
        if self._lock is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.folder / f".lock-{rank}", timeout=0)
        with suppress(NotImplementedError):  # a file system without locks
            try:
                lock.acquire()
            except filelock.Timeout:
                raise StoreError(
                    f"Another run is writing to {printable(self.folder)} at this moment. Wait for "
                    "it to end, or give this one another folder."
                ) from None
        self._lock = lock

    def leave(self) -> None:
        """Let others write."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def save(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, unless there is one: of several ranks the first wins."""
        path = self.folder / "manifest.json"
        if not path.exists():
            text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
            content = text.encode("utf-8", "backslashreplace")
            folders.write(path, content, mode=0o666, durable=True)
        self.manifest = self._read_manifest()

    def add_examples(self, rank: int, rows: Waiting) -> None:
        """Write rows of examples as a new file. Raises OSError."""
        content = _parquet(rows.tables(rank), EXAMPLES)
        self._keep("examples", _name(rank, rows.first_step, len(rows)), content)

    def add_steps(self, rank: int, rows: list[dict[str, Any]]) -> None:
        """Write rows of steps as a new file. Raises OSError."""
        table = table_of(rows, STEPS)
        content = _parquet([table], table.schema)
        self._keep("steps", _name(rank, rows[0]["step"], len(rows)), content)

    def add_shown(self, rank: int, rows: list[dict[str, Any]]) -> None:
        """Replace what this rank keeps for a person to see. Raises OSError."""
        content = _parquet([pa.Table.from_pylist(rows, SHOWN)], SHOWN)
        old = [path for path, match in self._listed("shown", _SHOWN) if int(match[1]) == rank]
        new = self._keep("shown", f"{rank:04d}", content)
        for path in old:
            if path != new:
                path.unlink(missing_ok=True)

    def _keep(self, place: str, name: str, content: memoryview) -> Path:
        path = self.folder / place / f"{name}-{digest_of(content)}.parquet"
        folders.write(path, content, mode=0o666, durable=True)
        return path

    # --- reading ---------------------------------------------------------------------------------

    def _listed(self, place: str, shape: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
        folder = self.folder / place
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        return [(folder / n, m) for n in names if (m := shape.fullmatch(n)) is not None]

    def parts(self, kind: str) -> list[Part]:
        """The files of rows there are."""
        return [Part(path, int(m[1]), m[4]) for path, m in self._listed(kind, _NAME)]

    def _load(self, path: Path, digest: str) -> pa.Table:
        try:
            content = folders.read(path)
            if digest_of(content) != digest:
                raise ValueError("its checksum differs")
            with pa.BufferReader(content) as source:
                return pq.ParquetFile(source).read(use_threads=False)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise StoreError(
                f"{printable(path)} is not what was written ({printable(error)[:200]}). Bring the "
                "file back from a copy, or move it elsewhere: the run is read without it."
            ) from None

    def read(self, kind: str) -> pa.Table:
        """All rows of all ranks, by step, rank and row.

        Raises:
            StoreError: a file is damaged, or a step is there twice.
        """
        schema = STEPS if kind == "steps" else EXAMPLES
        tables = [(p, self._load(p.path, p.digest)) for p in self.parts(kind)]
        seen: dict[tuple[int, int], Path] = {}
        for part, table in tables:
            here = set(table["step"].to_pylist())
            for step in here:
                if (other := seen.get((part.rank, step))) is not None:
                    raise StoreError(
                        f"Step {step} is in {printable(other)} and in {printable(part.path)}: "
                        f"files of another run were put into {kind}/. Take them out."
                    )
            seen |= {(part.rank, step): part.path for step in here}
        if not tables:
            return schema.empty_table()
        whole = pa.concat_tables([t for _, t in tables], promote_options="default")
        order = ["step", "rank"] + (["row"] if kind == "examples" else [])
        return whole.sort_by([(name, "ascending") for name in order]).combine_chunks()

    def steps_of(self, rank: int) -> set[int]:
        """The steps of which this rank has written anything."""
        tables = [self._load(p.path, p.digest) for kind in ("steps", "examples")
                  for p in self.parts(kind) if p.rank == rank]  # fmt: skip
        return {step for table in tables for step in table["step"].to_pylist()}

    def examples_of(self, rank: int, step: int) -> dict[str, list[Any]]:
        """The columns of one step's examples, of one rank. Raises StoreError."""
        parts = [p for p in self.parts("examples") if p.rank == rank]
        tables = [self._load(p.path, p.digest) for p in parts]
        whole = pa.concat_tables([EXAMPLES.empty_table(), *tables], promote_options="default")
        there = whole.filter(pa.array([at == step for at in whole["step"].to_pylist()], pa.bool_()))
        return there.sort_by("row").to_pydict()

    def shown(self) -> dict[str, tuple[str, str | None, bytes]]:
        """Key -> what is kept for a person to see, as a preview stores it."""
        return {
            row["key"]: (row["kind"], row["label"], row["data"])
            for path, match in self._listed("shown", _SHOWN)
            for row in self._load(path, match[2]).to_pylist()
        }


def _is_scores(manifest: object) -> bool:
    return isinstance(manifest, dict) and manifest.get("format") == "pergrad scores"


def _name(rank: int, first: int, rows: int) -> str:
    return f"part-{rank:04d}-{first:012d}-{rows}"


def _parquet(tables: Iterable[pa.Table], schema: pa.Schema) -> memoryview:
    """The content of a file of these rows; of each table, a group of its own."""
    sink = pa.BufferOutputStream()
    # numbers that differ from row to row are no entries of a dictionary: it would be built in vain
    few = [field.name for field in schema if not pa.types.is_floating(field.type)]
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=few) as writer:
        for table in tables:
            writer.write_table(table)
    return memoryview(sink.getvalue())


def is_run(folder: Path) -> bool:
    """Whether a folder says that it is a watched run's."""
    try:
        found = json.loads(folders.read(folder / "manifest.json"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def table_of(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table: the schema's columns, then norms of groups where there are any."""
    listed = list(rows)
    more = dict.fromkeys(n for row in listed for n in row if n not in schema.names)
    whole = pa.schema([*schema, *(pa.field(n, pa.float64()) for n in more)])
    return pa.Table.from_pylist(listed, whole)
