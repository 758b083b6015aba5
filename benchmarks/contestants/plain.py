"""The unit: a forward and backward pass of the mean loss, without an optimizer."""

from collections.abc import Callable
from typing import Any

from workloads import Step


def step_of(step: Step) -> Callable[..., None]:
    def run(batch: tuple[Any, ...]) -> None:
        step.model.zero_grad(set_to_none=True)
        step.losses(batch).mean().backward()

    return run


norms = gram = cross = direction = clip = lengths = step_of
