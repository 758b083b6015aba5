"""A job whose data set kills the process that reads it, as often as it is told to. No test."""

import os
import signal
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import pergrad


class Examples(Dataset):
    """Random inputs; reading number `at` kills the process, `times` times in all.

    The deaths are counted in a folder, since nobody who dies remembers.
    """

    def __init__(self, count: int, *, at: int = -1, times: int = 0, deaths: Path | None = None):
        self.x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
        self.at, self.times, self.deaths = at, times, deaths

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        if i == self.at:
            dead = len(os.listdir(self.deaths))
            if dead < self.times:
                (self.deaths / str(dead)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return self.x[i]


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1)


def job(data: Dataset, **more: object) -> pergrad.Job:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    return pergrad.Job(model=model, data=data, losses=losses, **more)
