"""The naive loop: a forward and backward pass for every example on its own."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from workloads import Step

Batch = tuple[Tensor, ...]
Gradients = dict[str, Tensor]


def gradients(step: Step, batch: Batch) -> Iterator[Gradients]:
    params = step.params()
    for i in range(len(batch[0])):
        losses = step.losses(tuple(t[i : i + 1] for t in batch))
        grads = torch.autograd.grad(
            losses[0], list(params.values()), allow_unused=True, materialize_grads=True
        )
        yield dict(zip(params, grads, strict=True))


def norm(grads: Gradients) -> Tensor:
    return torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()


def norms(step: Step) -> Callable[[Batch], Tensor]:
    return lambda batch: torch.stack([norm(grads) for grads in gradients(step, batch)])


lengths = norms


def flat(step: Step, batch: Batch) -> Tensor:
    """(B, P)."""
    rows = [torch.cat([g.flatten() for g in grads.values()]) for grads in gradients(step, batch)]
    return torch.stack(rows)


def gram(step: Step) -> Callable[[Batch], Tensor]:
    def run(batch: Batch) -> Tensor:
        J = flat(step, batch)
        return J @ J.T

    return run


def cross(step: Step) -> Callable[[Batch], Tensor]:
    return lambda batch: flat(step, batch) @ flat(step, step.reference).T


def direction(step: Step) -> Callable[[Batch], Tensor]:
    v = {name: t.to(p.dtype) for (name, t), p in zip(
        step.direction().items(), step.params().values(), strict=True)}  # fmt: skip

    def run(batch: Batch) -> Tensor:
        return torch.stack(
            [
                torch.stack([(g * v[name]).sum() for name, g in grads.items()]).sum()
                for grads in gradients(step, batch)
            ]
        )

    return run


def clip(step: Step) -> Callable[[Batch], tuple[Tensor, dict[str, Any]]]:
    def run(batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        found, total = [], {name: torch.zeros_like(p) for name, p in step.params().items()}
        for grads in gradients(step, batch):
            found.append(norm(grads))
            weight = (1.0 / found[-1]).clamp_max(1.0)
            for name, g in grads.items():
                total[name].add_(g * weight)
        return torch.stack(found), total

    return run
