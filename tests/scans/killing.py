"""A job whose data set kills the process that reads it, as often as it is told to. No test."""

import os
import signal
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import pergrad


class Examples(Dataset):
    """Random inputs. Reading number `at` sends a signal, `times` times in all.

    The signals are counted in a folder, since nobody who dies remembers.
    """

    def __init__(
        self,
        count: int,
        *,
        at: int = -1,
        times: int = 1,
        deaths: Path = Path(),
        signal: int = signal.SIGKILL,
        whom: int = 0,
    ) -> None:
        self.x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
        self.at, self.times, self.deaths = at, times, deaths
        self.signal, self.whom = signal, whom

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        if i == self.at and len(os.listdir(self.deaths)) < self.times:
            (self.deaths / str(len(os.listdir(self.deaths)))).touch()
            os.kill(self.whom or os.getpid(), self.signal)
        return self.x[i]


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1)


def job(data: Dataset, *, seed: int = 0, **more: object) -> pergrad.Job:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    return pergrad.Job(model=model, data=data, losses=losses, **more)
