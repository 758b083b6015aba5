"""Folders for what is found out about a machine once, and files that are there whole or not at all.

Owns: where the folders are, reading without waiting, writing through a name that nobody can guess,
and who else may write to a path.
Does not know: what is in the files.
"""

import os
import secrets
import stat
from pathlib import Path


def folder(variable: str, name: str) -> Path | None:
    """What the environment variable says, else ~/.cache/pergrad/<name>; always absolute.

    None if the variable is empty, or the user has no home.
    """
    chosen = os.environ.get(variable)
    if chosen == "":
        return None
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # its specification: such a value is to be ignored
        cache = "~/.cache"
    try:
        return Path(chosen or f"{cache}/pergrad/{name}").expanduser().absolute()
    except RuntimeError:  # a container whose user is a mere number
        return None


def read(path: Path) -> bytes:
    """What an ordinary file holds. Raises OSError, also of a fifo, which would be waited for."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with open(file, "rb") as whole:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(f"{path} is not an ordinary file")
        return whole.read()


def write(
    path: Path,
    content: bytes | memoryview,
    *,
    mode: int = 0o600,
    durable: bool = False,
    make: bool = True,
    named: bool = True,
) -> None:
    """Never half a file, whoever reads it now, and also (`durable`) if the machine stops.

    Unless `named`, that the file is there at all is durable only after `sync` of its folder.

    Through another name in the same folder, which follows no link, and that nobody can guess. What
    was at the path is replaced; a link there as well, not what it points to. The folder is made
    unless told not to. Raises OSError.
    """
    if make:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):  # each where the system has it
        flags |= getattr(os, name, 0)
    file = os.open(temporary, flags, mode)
    try:
        with open(file, "wb") as whole:
            whole.write(content)
            whole.flush()
            if durable:
                os.fsync(whole.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable and named:
        sync(path.parent)


def sync(place: Path) -> None:
    """Force a folder's entries to the disk. Raises OSError."""
    if os.name == "nt":
        return  # has no way to do so
    directory = os.open(place, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def make_private(place: Path) -> None:
    """A folder for this user alone, and what is missing above it. Raises OSError."""
    for each in (*reversed(place.parents), place):
        if not each.exists():
            each.mkdir(mode=0o700, exist_ok=True)


def open_to_others(path: Path) -> str | None:
    """Why what is at a path could have been put there by somebody else; None if it could not.

    A file or folder, and every folder above it, has to belong to the user or to root, and nobody
    else may write there; above, a folder like /tmp serves, where each removes only what is theirs.
    """
    if os.name == "nt":
        return None
    real = Path(os.path.realpath(path))
    for place in (real, *real.parents):
        about = os.stat(place)
        if about.st_uid not in (0, os.getuid()):
            return f"{place} belongs to somebody else"
        others = about.st_mode & stat.S_IWOTH or (
            about.st_mode & stat.S_IWGRP and not _alone_in(about.st_gid)
        )
        if others and not (place != real and about.st_mode & stat.S_ISVTX):
            return f"others may write to {place}"
    return None


def _alone_in(number: int) -> bool:
    """Whether a group is the one that many systems give each user, with nobody else in it."""
    try:
        import grp
        import pwd

        group, user = grp.getgrgid(number), pwd.getpwuid(os.getuid())
    except (ImportError, KeyError):
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
