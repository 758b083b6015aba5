"""Adam's moments at a step of a training run, and the step that it would take for an example.

Owns: reading an optimizer's state dict, and cosines between Adam's steps.
Does not know: weights, scores, queries, files of results.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pergrad.errors import UsageError
from pergrad.scans.tensors import hash_of_tensors


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
