"""Compiles the C of this folder for the machine at hand, once, and keeps it.

Owns: the compiler's name and flags, the folder of libraries, what a library is good for, and that
none is loaded which somebody else could have put there.
Does not know: what the C computes.

Whatever goes wrong is a NoKernelError, which costs its caller some speed and nothing else.
"""

import ctypes
import hashlib
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from pergrad.folders import folder, make_private, open_to_others, read, write

FOLDER = "PERGRAD_KERNELS"  # the environment variable that says where they are kept; empty: none
# Not -ffast-math: with GCC, loading such a library changes how the whole process rounds. And no
# library at all, not even C's, so that a bare compiler is enough.
_FLAGS = ("-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-nostdlib")
_NATIVE = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}
_PATIENCE = 60  # seconds
_MOST_SAID = 4096  # bytes of what a compiler says
# In a process of its own: what is no library, or half of one, may take down who loads it.
_TRIAL = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
for name in sys.argv[3:]:
    getattr(library, name)
exec(sys.argv[2])
"""


class NoKernelError(Exception):
    """Nothing was compiled, or what was cannot be used; says why."""


def library(
    source: Path, *definitions: str, functions: tuple[str, ...] = (), trial: str = ""
) -> ctypes.CDLL:
    """The compiled source, from the folder if it is there.

    What was compiled just now is kept if a process of its own can load it, finds the functions in
    it, and lives through the `trial`, Python in which `library` is the library.

    Raises:
        NoKernelError: there is none, for whatever reason.
    """
    try:
        return _library(source, definitions, functions, trial)
    except NoKernelError:
        raise
    except Exception as error:  # of the disk, the compiler, the environment, the loader
        home = folder(FOLDER, "kernels")
        raise NoKernelError(f"{home}: {type(error).__name__}: {error}") from error


def _library(
    source: Path, definitions: tuple[str, ...], functions: tuple[str, ...], trial: str
) -> ctypes.CDLL:
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
    kept = _kept(home, key)
    if kept is None:
        kept = _made(home, key, source, flags, functions, trial)
    return ctypes.CDLL(str(kept))


def refuse(bad: ctypes.CDLL, reason: str) -> None:
    """Never load this library again, in no process: it computes what is wrong."""
    path = Path(bad._name)
    try:
        compiler = _compiler()
        path.unlink(missing_ok=True)
        _mark(path.parent, path.name.partition("-")[0], compiler, reason)
    except (OSError, NoKernelError):
        pass  # then it is tried, and found out, the next time too


def _kept(home: Path, key: str) -> Path | None:
    """The library with this key; a damaged one could take the process down and is not loaded."""
    if not home.is_dir():
        return None
    _trust(home)
    for path in sorted(home.glob(f"{key}-*.so")):
        if path.is_symlink() or not path.is_file():  # a fifo would be waited for
            continue
        if path.name == f"{key}-{_digest(read(path))}.so":
            _trust(path)
            return path
    return None


def _trust(path: Path) -> None:
    why = open_to_others(path)
    if why is not None:
        raise NoKernelError(
            f"{why}, so a library there may not be yours. Say `chmod go-w` there, or name a folder "
            f"of your own in the environment variable {FOLDER}"
        )


def _made(
    home: Path, key: str, source: Path, flags: tuple[str, ...], functions: tuple[str, ...],
    trial: str,
) -> Path:  # fmt: skip
    """Compile, try, and keep; or remember that what was made is no good."""
    compiler = _compiler()
    reason = _marked(home, key, compiler)
    if reason is not None:
        raise NoKernelError(f"{reason} (found earlier; delete {home} to try again)")
    with TemporaryDirectory(prefix="pergrad-") as scratch:
        out = Path(scratch, "library.so")
        _compile(compiler, flags, source, out)
        content = read(out)
        failed = _failed(out, functions, trial)
    make_private(home)
    _trust(home)
    if failed is not None:
        _mark(home, key, compiler, failed)
        raise NoKernelError(failed)
    path = home / f"{key}-{_digest(content)}.so"
    write(path, content)
    return path


def _compiler() -> str:
    wanted = os.environ.get("CC") or "cc"
    compiler = shutil.which(wanted) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoKernelError(f"there is no C compiler ({wanted}, gcc, clang) on the PATH")
    return compiler


def _compile(compiler: str, flags: tuple[str, ...], source: Path, out: Path) -> None:
    code, said = _ran([compiler, *flags, "-o", str(out), str(source)])
    if code is None:
        raise NoKernelError(f"{compiler} took more than {_PATIENCE} s")
    if code or not out.is_file():
        raise NoKernelError(f"{compiler} cannot compile it, and says: {_first_line(said)}")


def _failed(path: Path, functions: tuple[str, ...], trial: str) -> str | None:
    """Why a library that was just made is no good; None if it is."""
    if not sys.executable or getattr(sys, "frozen", False):
        return None  # no Python to start
    code, said = _ran([sys.executable, "-I", "-S", "-c", _TRIAL, str(path), trial, *functions])
    if code == 0:
        return None
    lines = said.strip().splitlines() or [f"nothing, exit code {code}"]
    return f"what was compiled cannot be used, and loading it says: {_printable(lines[-1])}"


def _ran(command: list[str]) -> tuple[int | None, str]:
    """Exit code (None: out of patience) and the first of what was said, whatever that is."""
    said = b""
    end = time.monotonic() + _PATIENCE
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        with process.stdout as pipe, selectors.DefaultSelector() as ready:
            ready.register(pipe, selectors.EVENT_READ)
            while left := max(0.0, end - time.monotonic()):
                if ready.select(left):
                    piece = os.read(pipe.fileno(), 65536)
                    if not piece:
                        break
                    said = (said + piece)[:_MOST_SAID]
            return process.wait(max(0.0, end - time.monotonic())), said.decode(errors="replace")
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.poll() is None:  # with all that it has started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _first_line(said: str) -> str:
    return _printable((said.strip().splitlines() or ["nothing"])[0])


def _printable(line: str) -> str:
    """What may be shown on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in line[:300])


def _marker(home: Path, key: str) -> Path:
    return home / f"{key}.refused"


def _mark(home: Path, key: str, compiler: str, reason: str) -> None:
    write(_marker(home, key), f"{_identity(compiler)}\n{reason}".encode(errors="replace"))


def _marked(home: Path, key: str, compiler: str) -> str | None:
    """Why what this very compiler makes of the source is no good, if that is known."""
    try:
        made_by, _, reason = read(_marker(home, key)).decode(errors="replace").partition("\n")
    except OSError:
        return None
    return _printable(reason) if made_by == _identity(compiler) else None


def _identity(compiler: str) -> str:
    about = os.stat(compiler)
    return f"{compiler!r} {about.st_size} {about.st_mtime_ns}"


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
