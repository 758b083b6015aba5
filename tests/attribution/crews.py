"""Calls of every kind for the tests of engines, and what makes two results the same. No test."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attributing import job, losses
from torch import Tensor, nn
from torch.utils.data import Dataset

import pergrad

COUNT = 11


def task(name: str = "perceptron") -> pergrad.Job:
    return job(name)


def queries(name: str = "perceptron") -> list[Any]:
    return job(name, torch.float64, COUNT + 3).data[COUNT:]


def margins(net: nn.Module, batch: Any) -> Tensor:
    z = net(batch[0])
    return z[:, 0] - z[:, 1]


def other_weights(model: nn.Module, scale: float) -> dict[str, Tensor]:
    return {n: scale * t for n, t in model.state_dict().items()}


def adam_of(own: pergrad.Job) -> dict[str, Any]:
    """The state of Adam after a step, made on a copy."""
    twin = job("perceptron").model
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2)
    batch = torch.utils.data.default_collate(own.data)
    losses(twin, batch).mean().backward()
    optimizer.step()
    return optimizer.state_dict()


def options_of(kind: str, own: pergrad.Job, fit: pergrad.Fit | None) -> dict[str, Any]:
    """Of `influence`, for a kind of it."""
    points = [other_weights(own.model, 0.5), other_weights(own.model, 1.5)]
    options: dict[str, dict[str, Any]] = {
        "dots": {},
        "cosines": {"cosine": True, "top": 3},
        "checkpoints": {"checkpoints": points, "rates": [0.1, 0.2]},
        "less": {"adam": adam_of(own)},
        "kernel": {"method": "kernel"},
        "solve": {"curvature": fit, "refine": 0},
        "terms": {"curvature": fit, "refine": 0, "terms": 2},
        "refined": {"curvature": fit, "refine": 2, "top": 4},
    }
    return options[kind]


KINDS = ("dots", "cosines", "checkpoints", "less", "kernel", "solve", "terms", "refined")


def measured(own: pergrad.Job) -> pergrad.Job:
    """The queries as a Job with a measurement."""
    return replace(own, data=queries(), losses=margins)


def assert_same(found: pergrad.Influence, alone: pergrad.Influence) -> None:
    """The scores of two folders, to rounding."""
    mine, other = found.table().to_pydict(), alone.table().to_pydict()
    assert mine["query"] == other["query"]
    assert mine["index"] == other["index"]
    np.testing.assert_allclose(mine["score"], other["score"], rtol=1e-9, atol=1e-12)
    assert found.manifest["settings"] == alone.manifest["settings"]
    if alone.residuals is not None:
        torch.testing.assert_close(found.residuals, alone.residuals, rtol=1e-7, atol=1e-12)


class Training:
    """A model whose last bias is the mean of what its subset has first.

    Ends its process for one subset and seed, `times` times in all, which a folder counts.
    """

    def __init__(self, at: tuple[int, int] = (-1, -1), deaths: Path = Path(), times: int = 1):
        self.at, self.deaths, self.times = at, deaths, times
        self.mine, self.data = os.getpid(), task().data

    def __call__(self, indices: list[int], seed: int) -> nn.Module:
        if (indices[0], seed) == self.at and os.getpid() != self.mine:
            count = len(os.listdir(self.deaths))
            if count < self.times:
                (self.deaths / str(count)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        model = task().model
        with torch.no_grad():
            model[2].bias += torch.stack([self.data[i][0] for i in indices]).mean(0)[:3]
            model[2].bias[seed] += 0.01 * seed
        return model


def scores() -> Tensor:
    """(Q, N), some."""
    return torch.randn(3, COUNT, generator=torch.Generator().manual_seed(5))


class Deadly(Dataset):
    """Ends the process that reads item `at`, `times` times in all, which a folder counts."""

    def __init__(self, items: list[Any], at: int, deaths: Path, times: int = 1) -> None:
        self.items, self.at, self.deaths, self.times = items, at, deaths, times
        self.mine = os.getpid()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        if i == self.at and os.getpid() != self.mine:
            count = len(os.listdir(self.deaths))
            if count < self.times:
                (self.deaths / str(count)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return self.items[i]
