"""How a job gets to another process, and computes the same numbers there.

Owns: what travels, what to say when something cannot, and the settings of torch that travel along.
Does not know: Ray, how a batch is scored, the store.
"""

import importlib.machinery
import inspect
import io
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch

from pergrad.errors import UsageError
from pergrad.matrix import GradientMatrix
from pergrad.scans.work import Work

# What decides how products are rounded, the general before the special; not all of it is in every
# release of torch.
FLAGS = (
    "cudnn.benchmark",
    "cudnn.deterministic",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
)
OLDER_FLAGS = ("cudnn.allow_tf32",)  # with torch.get_float32_matmul_precision
NEWER_FLAGS = (
    "fp32_precision",
    "cuda.matmul.fp32_precision",
    "cudnn.fp32_precision",
    "cudnn.conv.fp32_precision",
    "cudnn.rnn.fp32_precision",
    "mkldnn.fp32_precision",
    "mkldnn.matmul.fp32_precision",
    "mkldnn.conv.fp32_precision",
    "mkldnn.rnn.fp32_precision",
)


def _flags(names: Iterable[str]) -> dict[str, Any]:
    """torch.backends's settings here, by name."""
    found = {}
    for name in names:
        with suppress(AttributeError):
            found[name] = attrgetter(name)(torch.backends)
    return found


@dataclass(frozen=True)
class Numerics:
    """The settings of torch that decide what a number is, as they are in one process."""

    threads: int
    dtype: torch.dtype
    deterministic: bool
    warn_only: bool
    matmul: str | None
    flags: dict[str, Any]

    @classmethod
    def here(cls, threads: int) -> "Numerics":
        """Those of this process, with another number of threads per op."""
        matmul = None
        try:
            matmul = torch.get_float32_matmul_precision()
            flags = _flags((*FLAGS, *OLDER_FLAGS))
        except RuntimeError:
            # The newer names were used, and torch refuses to mix: neither here nor over there.
            flags = _flags((*FLAGS, *NEWER_FLAGS))
        return cls(
            threads,
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            matmul,
            flags,
        )

    def apply(self) -> None:
        """Set them in this process."""
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        if self.matmul is not None and torch.get_float32_matmul_precision() != self.matmul:
            torch.set_float32_matmul_precision(self.matmul)
        for name, value in self.flags.items():
            if _flags([name]) != {name: value}:
                place, _, flag = f"backends.{name}".rpartition(".")
                setattr(attrgetter(place)(torch), flag, value)


def packed(value: Any, parts: Mapping[str, Any], cloudpickle: ModuleType) -> bytes:
    """The bytes of what a worker is sent; what its parts share stays shared.

    torch.save and not plain pickle: it keeps tensors that share memory together, and the other side
    can say on which device they land.

    Args:
        value: all of it.
        parts: what the user knows of it, by the name that it has for them.
        cloudpickle: Ray's.

    Raises:
        UsageError: it cannot be sent.
    """
    with _by_value(_only_here(parts), cloudpickle):
        try:
            return _saved(value, cloudpickle)
        except Exception as error:  # whatever an object's own __reduce__ or __getstate__ raises
            default = next(iter(parts.items()))
            path, culprit, reason = _culprit(parts, cloudpickle) or (*default, error)
            kind = type(culprit)
            raise UsageError(
                f"`{path}` ({kind.__module__}.{kind.__qualname__}) cannot be sent to another "
                f"process: {type(reason).__name__}: {reason}. Every worker gets a copy of the job, "
                "made by cloudpickle. Open files, locks and connections where they are first "
                "needed (in the data set's `__getitem__`) instead of keeping them, or leave them "
                'out of the copy with `__getstate__`; or use engine="local", which makes no copy.'
            ) from error


def unpacked(content: bytes) -> Any:
    """What was sent; tensors from a GPU land on this process's first, or in plain memory."""
    # Not weights_only: the job is code, sent by the process that started this one.
    return torch.load(io.BytesIO(content), map_location=_landing, weights_only=False)


def _landing(storage: Any, location: str) -> Any:
    """Where a tensor's memory goes; None stands for where it was."""
    if not location.startswith("cuda"):
        return None
    return storage.cuda(0) if torch.cuda.is_available() else storage


def on_device(work: Work, device: str | None) -> Work:
    """The work with its references on a device, beside the model."""
    if device is None:
        return work
    moved = []
    for reference in work.references:
        value = reference.value
        if isinstance(value, GradientMatrix):
            moved.append(replace(reference, value=value.to(device)))
        else:
            moved.append(replace(reference, value={n: v.to(device) for n, v in value.items()}))
    return replace(work, references=tuple(moved))


def _saved(value: Any, cloudpickle: ModuleType) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=cloudpickle)
    return buffer.getvalue()


def _culprit(
    parts: Mapping[str, Any], cloudpickle: ModuleType, depth: int = 4
) -> tuple[str, Any, Exception] | None:
    """The innermost named thing that cannot be packed: its path, itself, and why."""
    for path, value in parts.items():
        try:
            _saved(value, cloudpickle)
        except Exception as error:
            inner = {f"{path}{name}": item for name, item in _inside(value).items()}
            deeper = _culprit(inner, cloudpickle, depth - 1) if depth else None
            return deeper or (path, value, error)
    return None


def _inside(value: Any) -> dict[str, Any]:
    """What an object holds under a name, each with how one would write it after the object's."""
    if isinstance(value, dict):
        return {f"[{name!r}]": item for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return {f"[{i}]": item for i, item in enumerate(value[:100])}
    if is_dataclass(value) and not isinstance(value, type):
        return {f".{field.name}": getattr(value, field.name) for field in fields(value)}
    if inspect.isfunction(value):
        seen = inspect.getclosurevars(value)
        return {f" -> {name}": item for name, item in {**seen.globals, **seen.nonlocals}.items()}
    if inspect.ismethod(value):
        return {".__self__": value.__self__}
    return {f".{name}": item for name, item in getattr(value, "__dict__", {}).items()}


def _only_here(parts: Mapping[str, Any]) -> set[str]:
    """Modules of classes and functions that another process cannot import."""
    names: set[str] = set()
    for part in [*parts.values(), *(each for p in parts.values() for each in _inside(p).values())]:
        for thing in (part, *_inside(part).values()):
            names |= {getattr(each, "__module__", None) or "" for each in (thing, type(thing))}
        if isinstance(part, torch.nn.Module):
            names |= {type(module).__module__ for module in part.modules()}
    return {name for name in names if name in sys.modules and not _importable(name)}


def _importable(name: str) -> bool:
    """Whether a fresh interpreter with this sys.path finds the module's top package."""
    top = name.partition(".")[0]
    if top in sys.builtin_module_names or top == "__main__":  # cloudpickle sees to __main__ itself
        return True
    return importlib.machinery.PathFinder.find_spec(top) is not None


@contextmanager
def _by_value(names: set[str], cloudpickle: ModuleType) -> Iterator[None]:
    """Have cloudpickle send these modules' classes and functions instead of their names."""
    with ExitStack() as stack:
        for name in sorted(names - set(cloudpickle.list_registry_pickle_by_value())):
            module = sys.modules[name]
            cloudpickle.register_pickle_by_value(module)
            stack.callback(cloudpickle.unregister_pickle_by_value, module)
        yield
