"""Small jobs for the tests of scans, and what the naive loop says about them."""

import os
import sys
from typing import Any

import naive
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pergrad


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two layers and a dropout that would show if it were on."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3))
    return net.to(dtype)


def data(count: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64).to(dtype)
    return [(row, i % 3) for i, row in enumerate(x)]


def losses(net: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(net(x), y, reduction="none")


def job(count: int = 40, dtype: torch.dtype = torch.float64, **more: Any) -> pergrad.Job:
    return pergrad.Job(**{
        "model": model(dtype), "data": data(count, dtype), "losses": losses, **more
    })  # fmt: skip


class Listed:
    """A data set that does something at some of its items."""

    def __init__(self, items: list[Any], at: dict[int, Any]) -> None:
        self.items, self.at = items, at

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        found = self.at.get(i, self.items[i])
        if isinstance(found, BaseException):
            raise found
        return found


def reference(net: nn.Module, items: list[Any]) -> naive.Grads:
    """Gradients by one forward and backward pass for each example, in eval mode."""
    training = net.training
    net.eval()
    found = naive.alone_grads(
        lambda i: losses(net, (items[i][0][None], torch.tensor([items[i][1]]))), net, len(items)
    )
    net.train(training)
    return found


def numbers(table: Any, column: str) -> Tensor:
    return torch.tensor(table[column].to_pylist(), dtype=torch.float64)


def scan(job: pergrad.Job, out: Any, **more: Any) -> pergrad.Scores:
    """Without a bar."""
    return pergrad.scan(job, out, **{"progress": False, **more})


def environment() -> dict[str, str]:
    """Of a process that imports what this one can."""
    path = os.pathsep.join(place for place in sys.path if place)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
