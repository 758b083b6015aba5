"""Losses that a Python loop computes one by one: each use of a weight has one example's rows."""

import naive
import pytest
import torch
from helpers import assert_agrees, assert_rows_agree
from torch import Tensor, nn

import pergrad
from pergrad.factors import Correlation, Dense, Factor, Outer, Placed, Rows, Sum

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


class _Trees(nn.Module):
    """A cell at every node, as often as an example has nodes; words from a table at the leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3)
        self.cell = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(3, 2)

    def forward(self, words: list[int]) -> Tensor:
        h = self.table(torch.tensor(words)).sum(0)
        for word in words:
            h = self.cell(torch.cat([h, self.table(torch.tensor(word))])).tanh() * self.scale
        return self.head(h).square().sum()


WORDS = [[0, 1], [2], [1, 1, 3, 4, 0], [5, 2, 2], [3], [0, 4, 4, 1], [5, 5]]


def _layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def _convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2, stride=2, bias=False))


@DTYPES
@pytest.mark.parametrize(
    "kind", ["rows", "blocks", "trees", "some together", "pictures", "pictures of all sizes"]
)
def test_every_verb(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    built = {"trees": _Trees, "pictures": _convolution, "pictures of all sizes": _convolution}
    model = built.get(kind, _layers)().to(dtype)
    x = torch.randn(9, 4, dtype=dtype)
    pictures = torch.randn(9, 1, 11, 5, dtype=dtype)

    def losses() -> Tensor:
        if kind == "rows":
            return torch.stack([model(row).square().sum() for row in x])
        if kind == "blocks":  # of different lengths, in another order than the losses
            parts = [model(x[:n]).square().sum() for n in (5, 1, 9, 2, 3, 8, 7, 6)]
            return torch.stack([parts[i] for i in (3, 1, 0, 2, 7, 6, 5, 4)])
        if kind == "pictures":
            return torch.stack([model(picture).square().sum() for picture in pictures])
        if kind == "pictures of all sizes":
            return torch.stack(
                [model(p[:, : 3 + i]).square().sum() for i, p in enumerate(pictures)]
            )
        if kind == "some together":  # and all of them once more
            alone = torch.stack([model(row).square().sum() for row in x])
            return alone + model(x.sin()).sum(1)
        return torch.stack([model(words) for words in WORDS])

    G = naive.loop_grads(losses(), model)
    norms = naive.norms(G)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert_agrees(pergrad.norms(losses(), model), norms, norms, tolerance)
    assert_agrees(pergrad.gram(losses(), model), naive.gram(G), norms[:, None] * norms, tolerance)
    J = pergrad.gradients(losses(), model)
    assert_rows_agree(J.dense(), G, norms=norms, tolerance=tolerance)
    back = [2, 0]
    assert_rows_agree(
        J[back].dense(), {n: g[back] for n, g in G.items()}, norms=norms[back], tolerance=tolerance
    )
    c = torch.linspace(-1, 2, len(norms), dtype=dtype)
    pergrad.backward(losses(), model, weights=c)
    for name, p in model.named_parameters():
        want = naive.weighted_sum(G, c)[name]
        assert p.grad is not None
        assert_agrees(p.grad, want, float((norms * c.abs()).sum()), tolerance, name)
    got = pergrad.norms(losses(), model, create_graph=True).sum()
    loop = [torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            for loss in losses()]  # fmt: skip
    want_sum = torch.stack([sum(g.square().sum() for g in row).sqrt() for row in loop]).sum()
    for mine, theirs in zip(
        torch.autograd.grad(got, list(model.parameters()), allow_unused=True),
        torch.autograd.grad(want_sum, list(model.parameters()), allow_unused=True),
        strict=True,
    ):
        if theirs is not None:
            assert mine is not None
            assert_agrees(mine, theirs, float(theirs.norm() + want_sum.detach()), tolerance)


def _correlation(positions: int) -> Correlation:
    g, x = torch.randn(1, 5, positions), torch.randn(1, 1, positions + 2)
    return Correlation(g, x, kernel=(3,), stride=(1,), padding=(0,), dilation=(1,), shape=(5, 3))


def test_parts_of_other_examples_have_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of as many sizes as there are examples: no two of them become one."""
    torch.manual_seed(0)
    B = 12
    parts = [Placed(_correlation(2 + b), torch.tensor([b]), B) for b in range(B)]
    parts.append(Placed(_correlation(20), torch.tensor([3]), B))  # this one has one
    total, met = Sum(parts), []
    dot = Placed.dot

    def counted(self: Placed, other: Factor) -> Tensor:
        met.append((self, other))
        return dot(self, other)

    monkeypatch.setattr(Placed, "dot", counted)
    want = torch.stack([f.dense() for f in parts]).sum(0).square().sum((1, 2))
    torch.testing.assert_close(total.sq_norms(), want)
    assert len(met) == 1


def test_many_parts_become_few() -> None:
    """Each example with its own part: one factor, not as many as there are pairs to multiply."""
    torch.manual_seed(0)
    B, shape = 40, (5, 3)
    kinds = {
        "dense": lambda t: Dense(torch.randn(1, *shape)),
        "outer": lambda t: Outer(torch.randn(1, t, 5), torch.randn(1, t, 3)),
        "rows": lambda t: Rows(torch.randint(5, (1, t)), torch.randn(1, t, 3), shape),
        "correlation": lambda t: _correlation(4),
    }
    for make in kinds.values():
        order = torch.randperm(B).tolist()
        parts = [Placed(make(1 + b % 7), torch.tensor([b]), B) for b in order]
        parts += [Placed(make(2), torch.tensor([b]), B) for b in order[:9]]
        want = torch.stack([f.dense() for f in parts]).sum(0)
        total = Sum(parts)
        assert len(total.factors) <= 8
        torch.testing.assert_close(total.dense(), want)
        torch.testing.assert_close(total.sq_norms(), want.square().sum((1, 2)))
