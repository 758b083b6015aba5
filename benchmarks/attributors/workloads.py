"""Three models with training examples and queries, all drawn from a seed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from workloads.gpt import GPT, next_token, tokens


@dataclass(frozen=True)
class Workload:
    """A model, its data, and how many examples go through it at once, whoever asks."""

    title: str
    model: nn.Module
    data: TensorDataset
    queries: TensorDataset
    batch: int
    losses: Callable[[nn.Module, Tensor, Tensor], Tensor]  # (B,)

    @property
    def layers(self) -> list[str]:
        """The layers that all libraries serve: linear ones and convolutions."""
        kinds = (nn.Linear, nn.Conv2d)
        return [name for name, module in self.model.named_modules() if isinstance(module, kinds)]


def classified(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One cross entropy for each example."""
    return F.cross_entropy(model(x), y, reduction="none")


def perceptron(tiny: bool) -> Workload:
    """256-512-512-10."""
    N, Q, width = (12, 4, 16) if tiny else (2000, 64, 512)
    model = nn.Sequential(
        nn.Linear(256, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    data, queries = (TensorDataset(torch.randn(n, 256), torch.randint(10, (n,))) for n in (N, Q))
    return Workload(f"perceptron 256-512-512-10, {N} x {Q}", model, data, queries, 500, classified)


def cnn(tiny: bool) -> Workload:
    """Three convolutions and a linear layer, on 32 x 32 pixels."""
    N, Q, wide = (6, 3, 4) if tiny else (64, 16, 32)
    model = nn.Sequential(
        nn.Conv2d(3, wide, 3, padding=1), nn.ReLU(),
        nn.Conv2d(wide, 2 * wide, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(2 * wide, 4 * wide, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * wide, 10),
    )  # fmt: skip
    data, queries = (
        TensorDataset(torch.randn(n, 3, 32, 32), torch.randint(10, (n,))) for n in (N, Q)
    )
    title = f"CNN of three convolutions, 32 x 32 pixels, {N} x {Q}"
    return Workload(title, model, data, queries, 32, classified)


def gpt(tiny: bool) -> Workload:
    """Two blocks of width 256 and a head of 1000 tokens."""
    N, Q, T, width, words = (4, 2, 8, 16, 20) if tiny else (128, 16, 128, 256, 1000)
    model = GPT(words, width, 2, 4, T)
    data, queries = (TensorDataset(*tokens(n, T, words)) for n in (N, Q))
    title = f"GPT of two blocks, width {width}, T={T}, {N} x {Q}"
    return Workload(title, model, data, queries, 16, next_token)


WORKLOADS = {"perceptron": perceptron, "cnn": cnn, "gpt": gpt}


def build(name: str, tiny: bool = False) -> Workload:
    """A workload, the same in every process."""
    torch.manual_seed(0)
    return WORKLOADS[name](tiny)
