"""Finding what a command line names: `path/to/file.py:function` or `package.module:function`.

Owns: loading a file or a module, calling a function of it, and saying what went wrong there.
Does not know: what a job is for, or the options of the command line.
"""

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from pergrad import inputs
from pergrad.errors import UsageError
from pergrad.scans import model_state
from pergrad.scans.job import Job

OURS = str(Path(__file__).parents[1]) + os.sep  # frames of pergrad itself tell a user nothing
FORM = "path/to/file.py:function or package.module:function"


def split(name: str) -> tuple[str, str]:
    """The file or module, and the function.

    >>> split("examples/digits.py:job")
    ('examples/digits.py', 'job')
    """
    where, colon, function = name.rpartition(":")
    if not (colon and where and function.isidentifier()):
        raise UsageError(f"`{name}` does not name a function. Write {FORM}.")
    return where, function


def function(name: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:function` or `package.module:function` names.

    A file is run, as `python file.py` would run it, except that `__name__` is the file's own name.
    Its folder, or for a module the current one, goes on `sys.path`, as Python does for a script.

    Raises:
        UsageError: nothing is there, it cannot be loaded, or it has no such function.
    """
    where, wanted = split(name)
    module = _from_file(where) if _is_file(where) else _from_module(where)
    found = getattr(module, wanted, None)
    if found is None:
        own = [key for key, value in vars(module).items() if _defined_in(value, module)]
        close = difflib.get_close_matches(wanted, own, n=1)
        remedy = f"Did you mean {where}:{close[0]}?" if close else (
            f"Its functions are: {', '.join(own)}." if own else "It has no functions at all."
        )  # fmt: skip
        raise UsageError(f"{where} has no function `{wanted}`. {remedy}")
    if not callable(found):
        raise UsageError(
            f"`{wanted}` in {where} is of type {type(found).__name__}, not a function. Put it into "
            "a function that returns it, and name that."
        )
    return found


def call(name: str, *arguments: Any) -> Any:
    """What the named function returns; where it raises, an error says so and where.

    Raises:
        UsageError: as in `function`, or it raised.
    """
    found = function(name)
    with told(name):
        return found(*arguments)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Where the user's code raises, an error that says so, and where: no traceback is needed."""
    try:
        yield
    except Exception as error:
        raise UsageError(f"{what} raised {_last_line(error)}") from error


def job(name: str) -> Job:
    """The job that the named function returns.

    Raises:
        UsageError: as in `call`, or it returned something else.
    """
    found = call(name)
    if not isinstance(found, Job):
        remedy = (
            "Does its last line lack a `return`?" if found is None
            else "Return pergrad.Job(model=..., data=..., losses=...)."
        )  # fmt: skip
        raise UsageError(f"{name} returned {type(found).__name__}, not a pergrad.Job. {remedy}")
    return found


def references(texts: list[str], job: Job, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the functions of --against return for this job, by name.

    They are called with the model in the mode of the scan, and on its device.
    """
    found: dict[str, Any] = {}
    if texts and asked["device"] is not None:
        inputs.check_device(asked["device"])
    for text in texts:
        name, equals, function = text.rpartition("=")
        with model_state.prepared(job.model, asked["mode"], asked["device"]):
            value = call(function, job)
        if equals:
            found[name] = value
        elif isinstance(value, Mapping):
            found |= value
        else:
            raise UsageError(
                f"{function} returned {type(value).__name__}. Give it a name, --against "
                f"NAME={function}, or return a dict from names to references."
            )
    return found


def checkpoints(texts: list[str]) -> dict[str, Path] | None:
    """The files of --checkpoints by name: what stands before the first =, or the file's own.

    >>> checkpoints(["runs/epoch-1.pt", "last=runs/epoch-9.pt"])
    {'epoch-1': PosixPath('runs/epoch-1.pt'), 'last': PosixPath('runs/epoch-9.pt')}

    Raises:
        UsageError: two have one name.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        path = Path(file if equals else text)
        name = name if equals else path.stem
        if name in found:
            raise UsageError(
                f"Two files of --checkpoints have the name {name}. Write --checkpoints NAME={path}."
            )
        found[name] = path
    return found or None


def _is_file(where: str) -> bool:
    return where.endswith(".py") or os.sep in where


def _from_file(where: str) -> ModuleType:
    """The module that running this file gives; run once, however often it is named."""
    path = Path(where).resolve()
    if not path.is_file():
        raise UsageError(
            f"There is no file {where} (looked for {path}). JOB is {FORM}; a path is taken from "
            "the current folder."
        )
    about = path.stat()
    return _run(path, (about.st_mtime_ns, about.st_size))


class _AsItIs(SourceFileLoader):
    """Compiles the file itself.

    Bytecode beside it is held against the file's size and time in whole seconds alone, and an edit
    may change neither.
    """

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


@lru_cache
def _run(path: Path, stamp: tuple[int, int]) -> ModuleType:
    """Run a file, as it is at a stamp of its time and size."""
    # Under its own name, so that worker processes can import what it defines; unless that name is
    # taken, by `random`, say.
    taken = path.stem in sys.modules or path.stem in sys.stdlib_module_names
    name = f"pergrad_job_{path.stem}" if taken else path.stem
    if path.suffix != ".py":
        raise UsageError(f"{path} is not a Python file. JOB is {FORM}.")
    loader = _AsItIs(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # there is a loader
    module = importlib.util.module_from_spec(spec)
    _search(str(path.parent))
    sys.modules[name] = module
    try:
        with told(f"Loading {path}"):
            loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_module(where: str) -> ModuleType:
    _search(os.getcwd())
    with told(f"Importing {where}"):
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{where}.".startswith(f"{error.name}."):
                raise
            missing = error.name
    raise UsageError(
        f"There is no module {missing}. JOB is {FORM}; a file's name ends in .py, and a module is "
        "looked for in the current folder and among the installed packages."
    )


def _search(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _defined_in(value: Any, module: ModuleType) -> bool:
    return inspect.isfunction(value) and getattr(value, "__module__", None) == module.__name__


def _last_line(error: Exception) -> str:
    """The last line of a traceback, and where it was: in the user's code, and at the very end."""
    if isinstance(error, SyntaxError):
        return "".join(traceback.format_exception_only(error)).strip()  # has the place already
    last = f"{type(error).__name__}: {error}".removesuffix(": ")
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and not frame.filename.startswith(OURS)
    ]  # fmt: skip
    own = [frame for frame in frames if not _is_installed(frame.filename)]
    shown = [*own[-1:], *(frames[-1:] if frames[-1:] != own[-1:] else [])]
    lines = [
        f"  {f.filename}, line {f.lineno}, in {f.name}: {(f.line or '').strip()}" for f in shown
    ]
    return "\n".join([last, *lines])


def _is_installed(filename: str) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    return any(
        filename.startswith(sysconfig.get_path(kind) + os.sep)
        for kind in ("stdlib", "platstdlib", "purelib", "platlib")
    )
