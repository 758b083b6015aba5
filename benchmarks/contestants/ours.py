"""pergrad's verbs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

import pergrad
from workloads import Step

Batch = tuple[Tensor, ...]


def norms(step: Step) -> Callable[[Batch], Tensor]:
    def run(batch: Batch) -> Tensor:
        step.model.zero_grad(set_to_none=True)
        return pergrad.norms(step.losses(batch), step.model)

    return run


lengths = norms


def gram(step: Step) -> Callable[[Batch], Tensor]:
    def run(batch: Batch) -> Tensor:
        step.model.zero_grad(set_to_none=True)
        return pergrad.gram(step.losses(batch), step.model)

    return run


def cross(step: Step) -> Callable[[Batch], Tensor]:
    def run(batch: Batch) -> Tensor:
        step.model.zero_grad(set_to_none=True)
        others = pergrad.gradients(step.losses(step.reference), step.model)
        return pergrad.dots(step.losses(batch), step.model, against=others)

    return run


def direction(step: Step) -> Callable[[Batch], Tensor]:
    v = step.direction()

    def run(batch: Batch) -> Tensor:
        step.model.zero_grad(set_to_none=True)
        return pergrad.dots(step.losses(batch), step.model, against=v)

    return run


def clip(step: Step) -> Callable[[Batch], tuple[Tensor, dict[str, Any]]]:
    def run(batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        step.model.zero_grad(set_to_none=True)
        found = pergrad.backward(step.losses(batch), step.model, weights=pergrad.clip(1.0))
        return found, {name: p.grad for name, p in step.params().items()}

    return run
