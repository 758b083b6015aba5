"""Compiles the C of this folder for the machine at hand, once, and keeps it.

Owns: the compiler's name and flags, the folder of libraries, what a library is good for.
Does not know: what the C computes.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from pergrad.folders import folder, write

FOLDER = "PERGRAD_KERNELS"  # the environment variable that says where they are kept; empty: none
# Not -ffast-math: with GCC, loading such a library changes how the whole process rounds. And no
# library at all, not even C's, so that a bare compiler is enough.
_FLAGS = ("-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-nostdlib")
_NATIVE = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}
_PATIENCE = 60  # seconds


class NoKernelError(Exception):
    """Nothing was compiled, or what was cannot be used; says why."""


def library(source: Path, *definitions: str) -> ctypes.CDLL:
    """The compiled source, from the folder if it is there. Raises NoKernelError."""
    home = folder(FOLDER, "kernels")
    if home is None:
        raise NoKernelError(
            f"the environment variable {FOLDER} is empty, or there is no home folder"
        )
    native = _NATIVE.get(platform.machine())
    if platform.system() != "Linux" or native is None:
        raise NoKernelError(f"not on {platform.system()} with {platform.machine()} so far")
    text = source.read_bytes()
    flags = (*_FLAGS, native, *definitions)
    # A home folder may be shared by machines with other processors.
    key = _digest(text, repr(flags).encode(), _processor())
    try:
        kept = _kept(home, key)
        return ctypes.CDLL(str(kept or _keep(home, key, _compiled(source, flags))))
    except OSError as error:
        raise NoKernelError(f"{home}: {error}") from error


def _kept(home: Path, key: str) -> Path | None:
    """The library with this key; a damaged one could take the process down and is not loaded."""
    for path in home.glob(f"{key}-*.so"):
        if path.name == f"{key}-{_digest(path.read_bytes())}.so":
            return path
    return None


def _keep(home: Path, key: str, content: bytes) -> Path:
    path = home / f"{key}-{_digest(content)}.so"
    write(path, content)
    return path


def _compiled(source: Path, flags: tuple[str, ...]) -> bytes:
    compiler = os.environ.get("CC") or "cc"
    found = shutil.which(compiler) or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        raise NoKernelError(f"there is no C compiler ({compiler}, gcc, clang) on the PATH")
    with TemporaryDirectory(prefix="pergrad-") as scratch:
        out = Path(scratch, "library.so")
        command = [found, *flags, "-o", str(out), str(source)]
        try:
            ran = subprocess.run(
                command, capture_output=True, text=True, timeout=_PATIENCE, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise NoKernelError(f"{found} took more than {_PATIENCE} s") from error
        if ran.returncode or not out.exists():
            said = (ran.stderr or ran.stdout).strip().splitlines() or ["nothing"]
            raise NoKernelError(f"{found} cannot compile it, and says: {said[0]}")
        return out.read_bytes()


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@lru_cache(maxsize=1)
def _processor() -> bytes:
    """What decides which instructions there are."""
    wanted = ("model name", "flags", "Features", "CPU part")
    lines: set[str] = set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as all_lines:
            lines = {line for line in all_lines if line.startswith(wanted)}
    except OSError:
        pass
    return "".join(sorted(lines)).encode()
