"""Jobs of hard little models, for the tests of curvature and influence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pergrad

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-9 if dtype == torch.float64 else 2e-5


def losses(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


def outputs(net: nn.Module, batch: Any) -> Tensor:
    return net(batch[0])


class Tokens(nn.Module):
    """Embedding, norm, a layer over positions, a head that is the embedding again."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids))
        return self.head(torch.tanh(self.inner(x)).mean(1))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2, bias=False),
        nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(27, 3),
    )  # fmt: skip


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


BUILDERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "perceptron": (perceptron, lambda: torch.randn(6, dtype=torch.float64)),
    "images": (images, lambda: torch.randn(2, 4, 4, dtype=torch.float64)),
    "tokens": (lambda: Tokens(tied=False), lambda: torch.randint(5, (4,))),
    "tied": (lambda: Tokens(tied=True), lambda: torch.randint(5, (4,))),
}


def job(name: str, dtype: torch.dtype = torch.float64, count: int = 11, **more: Any) -> pergrad.Job:
    build, item = BUILDERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net, data = build().to(dtype), [(item(), i % 3) for i in range(count)]
    data = [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in data]
    return pergrad.Job(**{"model": net, "data": data, "losses": losses, "outputs": outputs, **more})
