"""The files that rows are in: their names, and which of them count.

Owns: what a part's name says, reading it whole, and parts that were written again with more
columns.
Does not know: what the columns mean.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pergrad import folders
from pergrad.errors import StoreError
from pergrad.scans.text import printable

_NAME = re.compile(r"part-(\d{12,})-(\d+)-([0-9a-f]{32})\.parquet")


@dataclass(frozen=True, slots=True)
class Part:
    """One file of scores, as its name tells."""

    path: Path
    first: int
    rows: int
    digest: str

    def load(self) -> bytes | None:
        """Its bytes, None if they are not those that were written."""
        try:
            content = folders.read(self.path)
        except OSError:
            return None
        return content if digest_of(content) == self.digest else None

    def width(self) -> int:
        """How many columns it has; 0 if it is damaged."""
        content = self.load()
        try:
            return 0 if content is None else len(pq.read_schema(pa.BufferReader(content)))
        except pa.ArrowException:
            return 0


def digest_of(content: bytes) -> str:
    """What a file's name says of its content."""
    return blake2b(content, digest_size=16).hexdigest()


def name_of(first: int, rows: int, digest: str) -> str:
    """A part's name."""
    return f"part-{first:012d}-{rows}-{digest}.parquet"


def parts_in(folder: Path) -> list[Part]:
    """All parts in a folder, by their first example.

    Raises:
        StoreError: another Parquet file is there.
    """
    found = []
    for name in os.listdir(folder) if folder.is_dir() else ():
        match = _NAME.fullmatch(name)
        if match:
            found.append(Part(folder / name, int(match[1]), int(match[2]), match[3]))
        elif name.endswith(".parquet"):
            raise StoreError(
                f"{printable(folder / name)} is not a part that pergrad wrote. Everything that "
                "reads the folder would read it too: move it elsewhere."
            )
    return sorted(found, key=lambda part: (part.first, part.path.name))


def latest(parts: Sequence[Part]) -> list[Part]:
    """Without those that were written again with more columns, and not removed yet.

    No two parts of a scan begin with the same example, so such a pair is one part twice. Two that
    are as wide as each other are none of ours, and stay: whoever reads them finds examples twice.
    """
    kept: list[Part] = []
    for _, several in groupby(parts, key=lambda part: (part.first, part.rows)):
        same = list(several)
        if len(same) > 1:
            widths = [part.width() for part in same]
            same = [p for p, width in zip(same, widths, strict=True) if width == max(widths)]
        kept += same
    return kept
