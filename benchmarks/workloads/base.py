"""What a workload is.

Owns: the records `Step` (a model with a batch), `Workload` and `Target`, and their registry.

Does not know: who competes, how anything is timed, or any particular model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# What is asked of a step. The first is what `pergrad.norms` gives.
TASKS = {
    "norms": "norms of the per-example gradients",
    "gram": "inner products between the examples of the batch (B, B)",
    "cross": "inner products of the batch with 64 reference examples (B, 64); both sides computed",
    "direction": "inner product of each gradient with one fixed direction (B,)",
    "clip": "norms, and the sum of the gradients clipped to norm 1",
    "lengths": "norms of 60 batches of different lengths, none seen before",
}


@dataclass(frozen=True)
class Step:
    """A model, a batch, and how to get one loss per example."""

    model: nn.Module
    batch: tuple[Tensor, ...]
    loss: Callable[..., Tensor]  # (call the model, *batch) -> (B,)
    reference: tuple[Tensor, ...] | None = None  # the other side of "cross"

    def losses(self, batch: tuple[Tensor, ...] | None = None) -> Tensor:
        return self.loss(self.model, *(self.batch if batch is None else batch))

    def params(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def direction(self) -> dict[str, Tensor]:
        """The fixed direction of the task of that name: the same for everyone."""
        random = torch.Generator().manual_seed(1)
        return {name: torch.randn(p.shape, generator=random) for name, p in self.params().items()}

    def __len__(self) -> int:
        return len(self.batch[0])


@dataclass(frozen=True)
class Target:
    """A bound on what pergrad does with a workload, and whether README.md promises it."""

    measure: str  # see `report.measured`: "time", "memory", "vmap slower", ...
    bound: float
    claim: bool = False


@dataclass(frozen=True)
class Workload:
    """`build(tiny)` gives a step; tiny ones are for tests. `batches` serves the task "lengths"."""

    name: str
    title: str
    task: str
    build: Callable[[bool], Step]
    targets: tuple[Target, ...] = ()
    batches: Callable[[bool], list[tuple[Tensor, ...]]] | None = None
    without: dict[str, str] = field(default_factory=dict)  # contestant -> why it is left out


REGISTRY: dict[str, Workload] = {}


def register(workload: Workload) -> None:
    if workload.name in REGISTRY:
        raise ValueError(f"There are two workloads {workload.name}.")
    REGISTRY[workload.name] = workload


def chosen(words: list[str] | None) -> Iterator[Workload]:
    """Those whose name, or a part of it up to a hyphen, is among `words`; all for None."""
    for name, workload in REGISTRY.items():
        if words is None or any(name == w or name.startswith(f"{w}-") for w in words):
            yield workload
