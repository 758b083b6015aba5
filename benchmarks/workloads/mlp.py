"""A multilayer perceptron: one position per example, so a norm costs next to nothing."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from workloads.base import Step, Target, Workload, register


def mlp(examples: int, tiny: bool = False) -> Step:
    torch.manual_seed(0)
    inputs, width = (8, 16) if tiny else (256, 512)
    examples = 5 if tiny else examples
    model = nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )

    def loss(call: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (call(x) - y).square().sum(1)

    def draw(count: int) -> tuple[Tensor, ...]:
        return torch.randn(count, inputs), torch.randn(count, 1)

    return Step(model, draw(examples), loss, draw(4 if tiny else 64))


register(
    Workload(
        "W1-mlp",
        "perceptron 256-512-512-1, B=1024, squared error",
        "norms",
        lambda tiny: mlp(1024, tiny),
        (
            Target("time", 0.75, claim=True),
            Target("memory", 1.10, claim=True),
            Target("time", 0.70),
            Target("memory", 1.05),
        ),
    )
)
