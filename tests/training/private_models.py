"""Small classifiers of four numbers; each op that private training must serve is in one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Last(nn.Module):
    """The last position of a recurrent layer's output."""

    def forward(self, found: Any) -> Tensor:
        return found[0][:, -1]


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.out = nn.MultiheadAttention(2, 1, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 2, 2)
        return self.out(self.heads(x, x, x)[0].flatten(1))


class _Text(nn.Module):
    """A language model's parts: a table, positions looked up once for the batch, a tied head."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(3, 4), nn.Embedding(4, 4)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        ids = (x > 0).long() + (x > 0.5).long()
        h = self.block(self.table(ids) + self.place(torch.arange(4, device=x.device)))
        return h.mean(1) @ self.table.weight.T


class _Scaled(nn.Module):
    """A parameter of one's own, once for each example and once for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(()))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x * self.scale.exp() + self.shift))


class _Sum(nn.Module):
    """x, and what a module makes of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class _Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x[:, :2], x[:, 2:])


class _Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(2, 4, mode="sum"), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.bag((x > 0).long()))


def _recurrent(kind: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (2, 2)), kind(2, 3, batch_first=True), _Last())


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def _convolutions() -> nn.Module:
    """By depth, transposed, and with instance norm."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2, padding=1),
        nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3),
    "two layers": _network,
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)),
    "group norm": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Linear(4, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    ),
    "lstm": lambda: _recurrent(nn.LSTM),
    "tied": _Tied,
    "attention": _Attention,
    "gelu": lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)),
    "no bias": lambda: nn.Linear(4, 3, bias=False),
    "gru": lambda: _recurrent(nn.GRU),
    "elman": lambda: _recurrent(nn.RNN),
    "rms norm": lambda: nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 3)),
    "residual": lambda: nn.Sequential(_Sum(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 3)),
    "text": lambda: _Text(nn.Linear(4, 4)),
    "transformer": lambda: _Text(
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, norm_first=True)
    ),
    "bag of words": _Bag,
    "bilinear": _Bilinear,
    "parameters of one's own": _Scaled,
    "pictures": _convolutions,
}
# These take numbers for words, and so have no gradient that is not finite.
READ_AS_WORDS = {"text", "transformer", "bag of words"}
