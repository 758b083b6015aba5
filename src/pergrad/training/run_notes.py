"""Notes in a run's folder: what watches have said that stands in none of its rows.

Owns: leaving a note and reading them. A second run that the folder refuses leaves one, so that who
looks into the folder later does not take the first run for it.
Does not know: rows, who refuses and why.

    notes/{rank}-{checksum}.json
"""

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pergrad import folders
from pergrad.errors import StoreError
from pergrad.scans.store import digest_of
from pergrad.scans.text import printable

PLACE = "notes"
_NAME = re.compile(r"(\d{4,})-([0-9a-f]{32})\.json")


def leave(folder: Path, rank: int, words: str) -> None:
    """Add a note; one of the same words that is there already is replaced. Raises OSError."""
    same = [path for path, note in _listed(folder) if note and note["words"] == words]
    note = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "rank": rank, "words": words}
    content = (json.dumps(note, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    path = folder / PLACE / f"{rank:04d}-{digest_of(content)}.json"
    folders.write(path, content, mode=0o666, durable=True)
    for old in same:
        if old != path:
            old.unlink(missing_ok=True)


def notes(folder: Path) -> list[dict[str, Any]]:
    """Time, rank and words of each note, the latest first; what all ranks say is there once.

    Raises:
        StoreError: a note is damaged.
    """
    found: dict[str, dict[str, Any]] = {}
    for path, note in sorted(_listed(folder)):
        if note is None:
            raise StoreError(
                f"{printable(path)} is not what was written. Bring the file back from a copy, or "
                "move it elsewhere: the run is read without it."
            )
        there = found.setdefault(note["words"], note)
        there["time"] = max(there["time"], note["time"])
    return sorted(found.values(), key=lambda note: str(note["time"]), reverse=True)


def as_sentence(note: dict[str, Any]) -> str:
    """A note for a person."""
    return f"Said at {note['time'].replace('T', ' ')}: {note['words']}"


def _listed(folder: Path) -> list[tuple[Path, dict[str, Any] | None]]:
    """Each note's file and what it says; None if it is damaged."""
    place = folder / PLACE
    names = os.listdir(place) if place.is_dir() else []
    return [(place / n, _load(place / n, m[2])) for n in names if (m := _NAME.fullmatch(n))]


def _load(path: Path, digest: str) -> dict[str, Any] | None:
    try:
        content = folders.read(path)
        note = json.loads(content) if digest_of(content) == digest else None
    except (OSError, ValueError, RecursionError):
        return None
    right = isinstance(note, dict) and all(isinstance(note.get(n), str) for n in ("time", "words"))
    return note if right else None
