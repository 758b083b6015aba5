"""Other weights of a model, put into it for a while: a training run at several of its steps.

Owns: reading checkpoints from modules, mappings, files and functions, their names, putting them
into a model and back.
Does not know: scores, queries, files of results.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pergrad.errors import UsageError
from pergrad.inputs import names_list
from pergrad.matrix import GradientMatrix
from pergrad.scans.tensors import hash_of_tensors
from pergrad.scans.text import printable, storable

State = Mapping[str, Tensor]
Source = State | nn.Module | str | PathLike[str] | Callable[[], Any]


@dataclass(frozen=True)
class Checkpoint:
    """Weights, in memory or in a file, read when they are needed."""

    source: Any
    number: int | str  # where it stands in what the user gave

    def state(self) -> dict[str, Tensor]:
        """name -> tensor.

        Raises:
            UsageError: it is not a state dict, a module, or a file or function that gives one.
        """
        found = self.source
        if callable(found) and not isinstance(found, (nn.Module, Mapping)):
            found = found()
        if isinstance(found, (str, PathLike)):
            found = _read(Path(found), self.number)
        if isinstance(found, nn.Module):
            found = found.state_dict()
        if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
            inside = ""
            if isinstance(found, Mapping):
                inside = f" with {names_list([str(n) for n in found])}, not all of them tensors"
            raise UsageError(
                f"checkpoints[{self.number!r}] is a {type(found).__name__}{inside}. Pass a state "
                "dict (name -> tensor), a module, or a file or function with a state dict."
            )
        return dict(found)

    def check(self, model: nn.Module) -> dict[str, Tensor]:
        """Its tensors, which are those of the model by name and shape.

        Raises:
            UsageError: names or shapes differ, or the model's tensors cannot be had.
        """
        state, own = self.state(), model.state_dict()
        missing = [n for n in own if n not in state]
        extra = [n for n in state if n not in own]
        if missing or extra:
            told = [f"it lacks {names_list(missing)}"] if missing else []
            told += [f"it has {names_list(extra)}, which the model has not"] if extra else []
            raise UsageError(
                f"checkpoints[{self.number!r}] is of another model: {'; '.join(told)}. Pass state "
                "dicts of this model, with the same names."
            )
        for n, value in state.items():
            if value.shape != own[n].shape:
                raise UsageError(
                    f"checkpoints[{self.number!r}] has shape {tuple(value.shape)} for `{n}`, and "
                    f"the model {tuple(own[n].shape)}. Pass state dicts of this model."
                )
        return state

    def put(self, model: nn.Module) -> None:
        """Into a model, in place."""
        put(model, self.check(model))

    def hash(self) -> str:
        """Of all its numbers."""
        return hash_of_tensors(sorted(self.state().items()))

    def apart(self, models: Sequence[nn.Module]) -> "Checkpoint":
        """The same weights, in memory that other weights in the models do not change.

        What `model.state_dict()` returns is the model's own memory.
        """
        if not isinstance(self.source, (Mapping, nn.Module)):
            return self
        state, shared = self.state(), _memory(models)
        if not any(_place(t) in shared for t in state.values()):
            return self
        return replace(self, source={n: t.detach().clone() for n, t in state.items()})


@dataclass(frozen=True)
class Named:
    """A checkpoint under a name, and the hash of its numbers."""

    name: str
    checkpoint: Checkpoint
    hash: str

    def load(self, model: nn.Module) -> dict[str, Tensor]:
        """Its tensors, in memory of their own.

        Raises:
            UsageError: it is of another model, or not what it was when the scan began.
        """
        state = self.checkpoint.apart([model]).check(model)
        if hash_of_tensors(sorted(state.items())) != self.hash:
            raise UsageError(
                f"The checkpoint {printable(self.name)} has changed since this scan began. Pass "
                "a copy that nobody writes to, and scan again: what has been scored is kept."
            )
        return state


def named(given: Any) -> dict[str, Checkpoint]:
    """Checkpoints by name, from a mapping or a list; a file of a list has the file's name.

    Raises:
        UsageError: it is something else or empty, or two have one name.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping) and not any(isinstance(v, Tensor) for v in given.values()):
        points = {name: Checkpoint(source, name) for name, source in given.items()}
        pairs = [(str(name), point) for name, point in points.items()]
    elif isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        pairs = [
            (Path(source).stem if isinstance(source, (str, PathLike)) else str(i),
             Checkpoint(source, i))
            for i, source in enumerate(given)
        ]  # fmt: skip
    else:
        raise UsageError(
            f"checkpoints is a {type(given).__name__}. Pass a list of state dicts, files, modules "
            "or functions that return one, or a mapping from names to such."
        )
    if not pairs:
        raise UsageError("checkpoints is empty. Pass at least one, or None for the model as it is.")
    found: dict[str, Checkpoint] = {}
    for name, point in ((storable(name), point) for name, point in pairs):
        if name in found or name in ("", "mean"):
            which = "Two checkpoints have" if name in found else "A checkpoint has"
            raise UsageError(
                f"{which} the name {printable(name)!r}, and the columns are called loss@NAME and "
                "norm@NAME, those of the means loss@mean and norm@mean. Pass a mapping from other "
                "names to the checkpoints."
            )
        found[name] = point
    return found


def ready(points: Mapping[str, Checkpoint], model: nn.Module) -> tuple[Named, ...]:
    """Checkpoints with their hashes, each looked at once.

    Raises:
        UsageError: one cannot be read, is of another model, or could not be put into this one.
    """
    if points:
        _check_state_is_the_models(model)
    found = []
    for name, point in points.items():
        state = point.check(model)
        found.append(Named(name, point, hash_of_tensors(sorted(state.items()))))
    return tuple(found)


def _check_state_is_the_models(model: nn.Module) -> None:
    """What is written into the state dict reaches the model."""
    memory = {_place(t) for t in (*model.parameters(), *model.buffers())}
    copies = [
        n for n, t in model.state_dict().items()
        if not _is_tensor(t) or _place(t) not in memory
    ]  # fmt: skip
    if copies:
        raise UsageError(
            f"The model's state_dict() has {names_list(copies)}, which no parameter or buffer of "
            "the model is, so weights cannot be put there. Scan once for each checkpoint, with the "
            "weights loaded, into folders of their own."
        )


def _read(path: Path, number: int | str) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(
            f"checkpoints[{number!r}], {path}, cannot be read: {type(error).__name__}: {error}. "
            "Pass a file that `torch.save(model.state_dict(), path)` or safetensors has written."
        ) from error


def put(model: nn.Module, state: State) -> None:
    """Weights into a model, in place."""
    own = model.state_dict()
    with torch.no_grad():
        for n, value in state.items():
            own[n].copy_(value)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what a model has."""
    return {n: t.detach().clone() for n, t in model.state_dict().items() if _is_tensor(t)}


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)  # a module may keep other things in its state


def _place(t: Tensor) -> int | None:
    """Where a tensor's memory begins; None if it has none of one piece."""
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return None  # sparse


def _memory(models: Sequence[nn.Module]) -> set[int | None]:
    """Where the memory of models begins."""
    return {_place(t) for model in models for t in model.state_dict().values() if _is_tensor(t)}


def of_its_own(J: GradientMatrix, models: Sequence[nn.Module]) -> GradientMatrix:
    """The same gradients, in tensors that other weights in the models do not change.

    A factor may hold a weight itself, where the model multiplies one with another.
    """
    shared = _memory(models)

    def own(t: Tensor) -> Tensor:
        return t.clone() if _place(t) in shared else t

    return J._map(lambda factor: factor._map(own))


@contextmanager
def weights_kept(models: Sequence[nn.Module]) -> Iterator[None]:
    """Afterwards the models have the weights that they had, also after an exception."""
    saved = [(model, weights(model)) for model in models]
    try:
        yield
    finally:
        for model, state in saved:
            put(model, state)
