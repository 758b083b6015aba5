"""Curvature and influence of every model of the zoo, against dense algebra on the loop's gradients;
and the traps in which other implementations have fallen without a word.
"""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
import zoo
from helpers import assert_agrees
from torch import Tensor, nn
from torch.nn import functional as F

import pergrad
from pergrad.attribution.fit import Fit

EXACT = 1e-5  # of the largest score, in float64


@pytest.fixture(autouse=True)
def _fallbacks_are_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        yield


def dense_scores(fit: Fit, G: naive.Grads) -> Tensor:
    """(B, B): (1/N) G (F + damping)^-1 G', block by block with matrices that are formed.

    Each block's eigenvalues are computed from the loop's gradients, in the basis of the fit, which
    has to be orthonormal; so nothing but that basis is taken from the fit.
    """
    total = 0.0
    left = set(G)
    for c in fit.curved:
        left -= set(c.block.names)
        N, p, d = c.Lambda.shape
        eye = torch.eye(p * d, dtype=torch.float64).reshape(p * d, 1, p, d).expand(-1, N, -1, -1)
        Q = c.rotate(eye).flatten(2).transpose(0, 1)  # (N, m, m), columns of the basis
        assert_agrees(Q.mT @ Q, torch.eye(p * d).expand(N, -1, -1), 1.0)
        M = c.block.matrix({n: G[n] for n in c.block.names}).flatten(2)  # (B, N, m)
        assert M.square().sum() == pytest.approx(
            float(sum(G[n].square().sum() for n in c.block.names))
        )
        turned = torch.einsum("bnm,nmk->bnk", M, Q)
        values = turned.square().mean(0)
        assert_agrees(c.Lambda.flatten(1), values, float(values.max()) or 1.0, EXACT)
        added = fit.damping * float(values.mean()) or fit.damping
        total = total + torch.einsum("ank,nk,bnk->ab", turned, 1 / (values + added), turned)
    assert not left
    return total / len(next(iter(G.values())))


def whole(job: pergrad.Job, G: naive.Grads, tmp_path: Path, **options: Any) -> Fit:
    """All methods on one job, with the training examples as queries."""
    flat = naive.flat(G)
    dots = pergrad.influence(job, job.data, tmp_path / "dots", **options).scores
    assert_agrees(dots, flat @ flat.mT, float(flat.square().sum(1).max()) or 1.0, EXACT)
    fit = pergrad.curvature(job, tmp_path / "fit", labels="given", **options)
    want = dense_scores(fit, G)
    got = pergrad.influence(job, job.data, tmp_path / "f", curvature=fit, refine=0, **options)
    assert_agrees(got.scores, want, float(want.abs().max()) or 1.0, EXACT)
    return fit


SERVED = [
    c for c in zoo.CASES.values()
    if c.mixes == "no" and c.deterministic and max(c.batch) >= 3 and c.name != "permuted_losses"
]  # fmt: skip
# a fourth of them, for the time it takes, and those that were wrong once
ONCE = ("temperature", "cosine_classifier", "weights_summed", "gradient_as_a_loss")
CASES = [*SERVED[::4], *(c for c in SERVED if c.name in ONCE and c not in SERVED[::4])]


def test_there_are_many() -> None:
    assert len(CASES) >= 50


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_zoo(case: zoo.Case, tmp_path: Path) -> None:
    with zoo.settled(0):
        params, forward, data, *_ = case.build(3)
    model = params if isinstance(params, nn.Module) else nn.Module()
    rows = [tuple(d[i] for d in data) for i in range(3)]

    def losses(_: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        with zoo.settled(1):
            return forward(*batch)

    def collate(items: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return tuple(torch.stack(column) for column in zip(*items, strict=True))

    job = pergrad.Job(model, rows, losses, collate=collate, params=params)
    G = naive.loop_grads(losses(model, collate(rows)), params)
    whole(job, G, tmp_path, batch_size=3, mode="as is")


# --- traps ----------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """GPT-2's layer: a weight (inputs, outputs), and addmm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.reshape(*x.shape[:-1], -1)


class Language(nn.Module):
    """Tokens with padding, positions by `arange`, one block used twice, the head included."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4, padding_idx=0)
        self.places = nn.Embedding(6, 4)
        self.mix = Conv1D(4, 4)
        self.head = nn.Linear(4, 7, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for _ in range(2):
            x = x + self.mix(x).tanh()
        return self.head(x).mean(1)


class Aliased(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = self.first
        self.head = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 7))
    net[0].bias.requires_grad_(False)
    net[2].weight.requires_grad_(False)
    return net


def ids() -> Tensor:
    return torch.randint(7, (6,))


def vector() -> Tensor:
    return torch.randn(5)


def picture() -> Tensor:
    return torch.randn(4, 5, 5)


Blocks = dict[tuple[str, ...], str]
TRAPS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Blocks]] = {
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(54, 7)),
        picture, {("0.weight", "0.bias"): "outer", ("2.weight", "2.bias"): "outer"}),
    "circular": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(75, 7)),
        picture, {("0.weight", "0.bias"): "outer", ("2.weight", "2.bias"): "outer"}),
    "language": (
        Language, ids,
        {("tokens.weight",): "table", ("places.weight",): "diagonal",
         ("mix.weight", "mix.bias"): "outer", ("head.weight",): "outer"}),
    "aliased": (
        Aliased, vector,
        {("first.weight", "first.bias"): "outer", ("head.weight", "head.bias"): "outer"}),
    "frozen": (frozen, vector, {("0.weight",): "outer", ("2.bias",): "vector"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str, tmp_path: Path) -> None:
    """In blocks that include everything, and equal to dense algebra."""
    build, item, blocks = TRAPS[name]
    with zoo.settled(0):
        net, data = build(), [(item(), i % 7) for i in range(6)]

    def losses(m: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(m(batch[0]), batch[1], reduction="none")

    job = pergrad.Job(net, data, losses)
    G = naive.loop_grads(losses(net, torch.utils.data.default_collate(data)), net)
    fit = whole(job, G, tmp_path)
    assert {c.block.names: c.block.how for c in fit.curved} == blocks
    if name == "language":  # the padding's row has no gradient, and nothing is made of it
        assert float(fit.blocks["tokens.weight"].Lambda[0, 0].abs().max()) == 0
