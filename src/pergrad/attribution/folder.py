"""A folder of results that is written whole files at a time, and gone on with after any stop.

Owns: its manifest, its lock, files whose names certify their content, and what the disk says no to.
Does not know: what the results are.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pergrad.errors import StoreError

_NAME = re.compile(r"(\w+)-(\d{12,})-(\d{12,})-([0-9a-f]{32})\.(\w+)")


class Folder:
    """Files by kind and range of examples, and manifest.json.

    Args:
        path: the folder.
        what: the format's name, such as "pergrad curvature", which the manifest has to carry.
        version: the format's version.
    """

    def __init__(self, path: str | os.PathLike[str], what: str, version: int = 1) -> None:
        self.path = Path(path)
        self.what, self.version = what, version

    def manifest(self) -> dict[str, Any] | None:
        """What manifest.json says; None before there is one."""
        try:
            found = json.loads((self.path / "manifest.json").read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict) or found.get("format") != self.what:
            raise StoreError(
                f"{self.path} has a manifest.json of something else than a {self.what}. Nothing "
                "was changed; give the results a folder of their own."
            )
        if found.get("version") != self.version:
            raise StoreError(
                f"{self.path} is a {self.what} in format version {found.get('version')}; this "
                f"pergrad reads version {self.version}. Nothing was changed: read it with the "
                "pergrad that wrote it, or make it again in another folder."
            )
        return found

    def save_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replace the manifest."""
        whole = {"format": self.what, "version": self.version, **manifest}
        self._write("manifest.json", (json.dumps(whole, indent=1, ensure_ascii=False)).encode())

    def files(self, kind: str) -> list[tuple[int, int, Path]]:
        """(first, past the last, path) of the files of a kind, by their first example."""
        found = []
        for name in os.listdir(self.path) if self.path.is_dir() else ():
            match = _NAME.fullmatch(name)
            if match and match[1] == kind:
                found.append((int(match[2]), int(match[3]), self.path / name))
        return sorted(found)

    def add(self, kind: str, first: int, stop: int, content: bytes, suffix: str) -> Path:
        """Write a file about the examples first:stop."""
        digest = blake2b(content, digest_size=16).hexdigest()
        name = f"{kind}-{first:012d}-{stop:012d}-{digest}.{suffix}"
        self._write(name, content)
        return self.path / name

    def check(self, path: Path) -> None:
        """A file's content is what was written; it is not kept in memory.

        Raises:
            StoreError: it is not.
        """
        with open(path, "rb") as file:
            digest = file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()
        self._certified(path, digest)

    def read(self, path: Path) -> bytes:
        """A file's content, which must be what was written.

        Raises:
            StoreError: it is not.
        """
        content = path.read_bytes()
        self._certified(path, blake2b(content, digest_size=16).hexdigest())
        return content

    def _certified(self, path: Path, digest: str) -> None:
        match = _NAME.fullmatch(path.name)
        if match is None or digest != match[4]:
            raise StoreError(
                f"{path} is not what was written: its checksum differs. Remove this file and make "
                "the same call again: it computes what is missing."
            )

    def _write(self, name: str, content: bytes) -> None:
        """All or nothing: a temporary file, forced to the disk, renamed."""
        path = self.path / name
        temporary = self.path / f".{name}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StoreError(
                f"Cannot write to {self.path}: {error.strerror or error}. What has been written "
                "before is whole and stays. Make room (or a folder that can be written to), and "
                "make the same call again: it goes on where it stopped."
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder if need be, and be the only one who writes to it.

        Raises:
            StoreError: it cannot be written to, another run is at it, or it is something else's.
        """
        import filelock

        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{self.path} is a file. Give the results a folder of their own.")
        there = os.listdir(self.path) if self.path.exists() else []
        if self.manifest() is None and any(not name.startswith(".") for name in there):
            raise StoreError(
                f"{self.path} is not a {self.what}: it has {', '.join(sorted(there)[:3])} and no "
                "manifest.json. Nothing was changed; give the results a folder of their own."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.path / ".lock", timeout=0)
            lock.acquire()
        except filelock.Timeout:
            raise StoreError(
                f"Another run is writing to {self.path} at this moment. Wait for it to end, or "
                "give this one another folder."
            ) from None
        except OSError as error:
            raise StoreError(
                f"Cannot write to {self.path}: {error.strerror or error}. Give the results a "
                "folder that can be made and written to."
            ) from error
        try:
            for left in self.path.glob(".*.tmp"):
                left.unlink()  # of a run that was killed while it wrote
            yield
        finally:
            lock.release()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions of a run, in words."""
    found = []
    for name in {**old, **new}:
        was, now = old.get(name), new.get(name)
        if was != now:
            found.append(f"{name} was {_short(was)} and is {_short(now)}")
    return found


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors by name as the content of a safetensors file."""
    from safetensors.torch import save

    return save(
        {
            n: t.detach().cpu().clone(memory_format=torch.contiguous_format)
            for n, t in tensors.items()
        }
    )


def tensors_from_bytes(content: bytes) -> dict[str, Tensor]:
    """The same tensors again, each in memory of its own."""
    from safetensors.torch import load

    return {n: t.clone() for n, t in load(content).items()}
