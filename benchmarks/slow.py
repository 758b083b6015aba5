"""The kinds of models at which per-example gradients are slow, one small model each.

Owns: the models, their batches and the options that they are called with.
Does not know: how time is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = tuple[Callable[[], Tensor], list[nn.Parameter]]


@dataclass(frozen=True)
class Kind:
    """One kind of model; `build(tiny)` gives its losses and parameters."""

    title: str
    build: Callable[[bool], Step]
    options: dict[str, Any]


KINDS: dict[str, Kind] = {}


def kind(title: str, **options: Any) -> Callable[[Callable[[bool], Step]], Callable[[bool], Step]]:
    """Register a function of `tiny` under its own name."""

    def add(build: Callable[[bool], Step]) -> Callable[[bool], Step]:
        KINDS[build.__name__] = Kind(title, build, options)
        return build

    return add


def _of(*modules: nn.Module) -> list[nn.Parameter]:
    return [p for module in modules for p in module.parameters()]


@kind("a Python loop over examples")
def python_loop(tiny: bool) -> Step:
    examples = 4 if tiny else 128
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))
    x = torch.randn(examples, 20)
    return lambda: torch.stack([net(row).square().sum() for row in x]), _of(net)


def _packed(cell: Any, tiny: bool) -> Step:
    examples, longest = (4, 5) if tiny else (32, 40)
    table, cells, head = nn.Embedding(200, 32), cell(32, 64, 2, batch_first=True), nn.Linear(64, 5)
    ids = torch.randint(200, (examples, longest))
    targets, lengths = torch.randint(5, (examples,)), torch.randint(2, longest + 1, (examples,))

    def losses() -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            table(ids), lengths, batch_first=True, enforce_sorted=False
        )
        state = cells(packed)[1]
        last = (state[0] if isinstance(state, tuple) else state)[-1]
        return F.cross_entropy(head(last), targets, reduction="none")

    return losses, _of(table, cells, head)


@kind("packed sequences, `GRU`")
def packed_gru(tiny: bool) -> Step:
    return _packed(nn.GRU, tiny)


@kind("packed sequences, `LSTM`")
def packed_lstm(tiny: bool) -> Step:
    return _packed(nn.LSTM, tiny)


@kind("packed sequences, `RNN`")
def packed_rnn(tiny: bool) -> Step:
    return _packed(nn.RNN, tiny)


@kind("a fused `LSTM` of two layers")
def lstm(tiny: bool) -> Step:
    examples, length = (4, 5) if tiny else (32, 40)
    cells, head = nn.LSTM(32, 64, 2, batch_first=True), nn.Linear(64, 5)
    x, y = torch.randn(examples, length, 32), torch.randint(5, (examples,))
    return lambda: F.cross_entropy(head(cells(x)[0][:, -1]), y, reduction="none"), _of(cells, head)


@kind("400 steps of an `RNNCell`")
def long_cell(tiny: bool) -> Step:
    steps = 5 if tiny else 400
    cell, x = nn.RNNCell(16, 32), torch.randn(8, steps, 16)

    def losses() -> Tensor:
        h = torch.zeros(8, 32)
        for t in range(steps):
            h = cell(x[:, t], h)
        return h.square().sum(1)

    return losses, _of(cell)


@kind("rows chosen by a mask, measured at every call")
def masked_select(tiny: bool) -> Step:
    examples = 8 if tiny else 4096
    first, second, x = nn.Linear(64, 64), nn.Linear(64, 8), torch.randn(examples, 64)
    every = torch.ones(examples, 64, dtype=torch.bool)

    def losses() -> Tensor:
        chosen = first(x).masked_select(every)
        return second(torch.zeros(examples, 64).masked_scatter(every, chosen)).square().sum(1)

    return losses, _of(first, second)


@kind("2,000 ragged examples in 20,000 rows")
def ragged(tiny: bool) -> Step:
    examples, rows = (5, 20) if tiny else (2000, 20_000)
    first, second, x = nn.Linear(16, 16), nn.Linear(16, 1), torch.randn(rows, 16)
    own = torch.arange(rows).remainder(examples)[torch.randperm(rows)]

    def losses() -> Tensor:
        values = second(first(x).tanh()).square()[:, 0]
        return torch.zeros(examples).index_add(0, own, values)

    return losses, _of(first, second)


@kind("a gradient penalty through convolutions")
def gradient_penalty(tiny: bool) -> Step:
    examples = 3 if tiny else 32
    critic = nn.Sequential(
        nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 4, 2, 1), nn.Flatten(),
        nn.Linear(64 * 64, 1),
    )  # fmt: skip
    x = torch.randn(examples, 3, 32, 32, requires_grad=True)

    def losses() -> Tensor:
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return (g.flatten(1).norm(dim=1) - 1).square()

    return losses, _of(critic)


@kind("5 losses for each of 8 images", on_mixing="exact")
def several_losses(tiny: bool) -> Step:
    images = 4 if tiny else 8
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    x = torch.randn(images, 3, 32, 32)
    return lambda: net(x).flatten(), _of(net)


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(8, after) for _ in range(2))
        self.short = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.first(x)).relu()
        return (self.short(x) + self.norms[1](self.second(y))).relu()


@kind("3 losses for each of 2 images, ResNet-18", on_mixing="exact")
def several_losses_resnet(tiny: bool) -> Step:
    widths = (8, 16) if tiny else (64, 64, 64, 128, 128, 256, 256, 512, 512)
    size = 8 if tiny else 64
    blocks: list[nn.Module] = [nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)]
    for before, after in pairwise(widths):
        blocks.append(_Residual(before, after, 1 + (after > before)))
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3))
    x = torch.randn(2, 3, size, size)
    return lambda: net(x).flatten(), _of(net)


@kind("4 heads over 64 rows", on_mixing="exact")
def several_heads(tiny: bool) -> Step:
    rows = 4 if tiny else 64
    body = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh())
    heads = nn.ModuleList(nn.Linear(256, 10) for _ in range(4))
    x, y = torch.randn(rows, 64), torch.randint(10, (rows,))

    def losses() -> Tensor:
        z = body(x)
        each = [F.cross_entropy(head(z), y, reduction="none") for head in heads]
        return torch.stack(each, 1).flatten()

    return losses, _of(body, heads)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.up = nn.Linear(width, width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


@kind("a loss for each of 2 x 16 tokens", on_mixing="exact")
def tokens(tiny: bool) -> Step:
    length, width = (4, 16) if tiny else (16, 128)
    table, head = nn.Embedding(500, width), nn.Linear(width, 500)
    blocks = nn.Sequential(_Block(width), _Block(width))
    ids = torch.randint(500, (2, length))

    def losses() -> Tensor:
        z = head(blocks(table(ids)))
        return F.cross_entropy(z.flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="none")

    return losses, _of(table, blocks, head)


@kind("nine batch norms in training mode, 32 images", on_mixing="exact")
def batch_norms(tiny: bool) -> Step:
    images, depth, size = (3, 1, 4) if tiny else (32, 9, 16)
    blocks: list[nn.Module] = []
    for n in range(depth):
        blocks += [
            nn.Conv2d(16 if n else 3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        ]  # fmt: skip
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    x, y = torch.randn(images, 3, size, size), torch.randint(10, (images,))
    return lambda: F.cross_entropy(net(x), y, reduction="none"), _of(net)
