"""A training run at several of its steps: weights put into a model for a while, Adam's moments.

Owns: reading checkpoints from modules, mappings and files; putting them into a model and back; what
step Adam would take for an example's gradient.
Does not know: scores, queries, files of results.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pergrad.errors import UsageError
from pergrad.inputs import names_list
from pergrad.matrix import GradientMatrix
from pergrad.scans.manifest import hash_of_tensors

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Weights, in memory or in a file, read when they are needed."""

    source: Any
    number: int

    def state(self) -> dict[str, Tensor]:
        """name -> tensor.

        Raises:
            UsageError: it is not a state dict, a module, or a file with one.
        """
        found = self.source
        if isinstance(found, (str, PathLike)):
            found = _read(Path(found), self.number)
        if isinstance(found, nn.Module):
            found = found.state_dict()
        if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
            inside = ""
            if isinstance(found, Mapping):
                inside = f" with {names_list([str(n) for n in found])}, not all of them tensors"
            raise UsageError(
                f"checkpoints[{self.number}] is a {type(found).__name__}{inside}. Pass a state "
                "dict (name -> tensor), a module, or a file with a state dict."
            )
        return dict(found)

    def check(self, model: nn.Module) -> dict[str, Tensor]:
        """Its tensors, which are those of the model by name and shape.

        Raises:
            UsageError: names or shapes differ.
        """
        state, own = self.state(), model.state_dict()
        missing = [n for n in own if n not in state]
        extra = [n for n in state if n not in own]
        if missing or extra:
            told = [f"it lacks {names_list(missing)}"] if missing else []
            told += [f"it has {names_list(extra)}, which the model has not"] if extra else []
            raise UsageError(
                f"checkpoints[{self.number}] is of another model: {'; '.join(told)}. Pass state "
                "dicts of this model, with the same names."
            )
        for n, value in state.items():
            if value.shape != own[n].shape:
                raise UsageError(
                    f"checkpoints[{self.number}] has shape {tuple(value.shape)} for `{n}`, and the "
                    f"model {tuple(own[n].shape)}. Pass state dicts of this model."
                )
        return state

    def put(self, model: nn.Module) -> None:
        """Into a model, in place."""
        _copy(model.state_dict(), self.check(model))

    def hash(self) -> str:
        """Of all its numbers."""
        return hash_of_tensors(sorted(self.state().items()))


def _read(path: Path, number: int) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(
            f"checkpoints[{number}], {path}, cannot be read: {type(error).__name__}: {error}. Pass "
            "a file that `torch.save(model.state_dict(), path)` or safetensors has written."
        ) from error


def _copy(own: State, state: State) -> None:
    with torch.no_grad():
        for n, value in state.items():
            own[n].copy_(value)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)  # a module may keep other things in its state


def of_its_own(J: GradientMatrix, models: Sequence[nn.Module]) -> GradientMatrix:
    """The same gradients, in tensors that other weights in the models do not change.

    A factor may hold a weight itself, where the model multiplies one with another.
    """
    shared = {
        t.untyped_storage().data_ptr()
        for model in models
        for t in model.state_dict().values() if _is_tensor(t)
    }  # fmt: skip

    def own(t: Tensor) -> Tensor:
        return t.clone() if t.untyped_storage().data_ptr() in shared else t

    return J._map(lambda factor: factor._map(own))


@contextmanager
def weights_kept(models: Sequence[nn.Module]) -> Iterator[None]:
    """Afterwards the models have the weights that they had, also after an exception."""
    saved = [
        (model, {n: t.detach().clone() for n, t in model.state_dict().items() if _is_tensor(t)})
        for model in models
    ]
    try:
        yield
    finally:
        for model, state in saved:
            _copy(model.state_dict(), state)


# --- Adam -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adam:
    """The moments of Adam (or AdamW) at a step, by parameter name."""

    step: int
    mean: dict[str, Tensor]
    square: dict[str, Tensor]
    betas: dict[str, tuple[float, float]]
    eps: dict[str, float]

    def update(self, G: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """name -> (B, *shape): the step, without learning rate, if the next gradient were G[b]."""
        found, t = {}, self.step + 1
        for n, g in G.items():
            b1, b2 = self.betas[n]
            mean = (b1 * self.mean[n].to(g) + (1 - b1) * g) / (1 - b1**t)
            square = (b2 * self.square[n].to(g) + (1 - b2) * g.square()) / (1 - b2**t)
            found[n] = mean / (square.sqrt() + self.eps[n])
        return found

    def hash(self) -> str:
        """Of all its numbers."""
        return hash_of_tensors([*self.mean.items(), *self.square.items()]) + f":{self.step}"


def adam_of(state: Any, model: nn.Module, params: Mapping[str, Tensor], number: int) -> Adam:
    """Adam's moments from an optimizer's state dict, whose parameters are numbered in their order.

    Raises:
        UsageError: it is something else, of other parameters, or they are at different steps.
    """
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
        raise UsageError(
            f"adam[{number}] is a {type(state).__name__} without `state` and `param_groups`. Pass "
            "`optimizer.state_dict()` of the Adam that trained the model."
        )
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    names = [n for group in state["param_groups"] for n in group.get("param_names", ())]
    if len(names) != len(numbers):
        everything = dict(model.named_parameters())
        trained = [n for n, p in everything.items() if p.requires_grad]
        fitting = [each for each in (list(everything), trained) if len(each) == len(numbers)]
        if not fitting:
            raise UsageError(
                f"adam[{number}] is about {len(numbers)} parameters, and the model has "
                f"{len(everything)}. Pass the state of an optimizer over `model.parameters()`."
            )
        names = fitting[0]
    by_name = dict(zip(names, numbers, strict=True))
    groups = {i: group for group in state["param_groups"] for i in group["params"]}
    mean, square, betas, eps, steps = {}, {}, {}, {}, {}
    for n, p in params.items():
        own = state["state"].get(by_name.get(n), {})
        if not {"step", "exp_avg", "exp_avg_sq"} <= set(own) or own["exp_avg"].shape != p.shape:
            raise UsageError(
                f"adam[{number}] has no moments of `{n}` in its shape {tuple(p.shape)}. Pass the "
                "`state_dict()` of the Adam that trained these parameters, after a step of it."
            )
        mean[n], square[n], steps[n] = own["exp_avg"], own["exp_avg_sq"], int(own["step"])
        group = groups[by_name[n]]
        betas[n], eps[n] = tuple(group["betas"]), float(group["eps"])
    if len({*steps.values()}) > 1:
        low, high = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
        raise UsageError(
            f"adam[{number}] is of several steps: `{low}` at {steps[low]}, `{high}` at "
            f"{steps[high]}. Pass the state of one step, that of the checkpoint."
        )
    return Adam(next(iter(steps.values())), mean, square, betas, eps)


def step_cosines(adam: Adam, G: Mapping[str, Tensor], K: Mapping[str, Tensor]) -> Tensor:
    """(B, Q): cosines between Adam's steps for G and K; 0 for a row that is 0."""
    steps = adam.update(G)
    flat = [torch.cat([x.reshape(len(x), -1).double() for x in each.values()], 1)
            for each in (steps, {n: K[n] for n in steps})]  # fmt: skip
    norms = flat[0].norm(dim=1)[:, None] * flat[1].norm(dim=1)[None]
    return torch.where(norms == 0, 0.0, flat[0] @ flat[1].mT / torch.where(norms == 0, 1.0, norms))
