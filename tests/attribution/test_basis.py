"""Scores in the curvature's basis are those of the dense solve, with any number of positions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from attributing import losses, outputs
from torch import Tensor, nn

import pergrad
from pergrad.attribution.basis import Solved
from pergrad.factors import Dense, Outer


@pytest.mark.parametrize("sizes", [(7, 3), (3, 7), (1, 4)])
@pytest.mark.parametrize("positions", [1, 2])
def test_outer_products_with_formed_rows(sizes: tuple[int, int], positions: int) -> None:
    torch.manual_seed(0)
    p, d = sizes
    f = Outer(torch.randn(5, positions, p).double(), torch.randn(5, positions, d).double())
    h = Dense(torch.randn(4, p, d).double())
    want = f.dense().flatten(1) @ h.dense().flatten(1).T
    torch.testing.assert_close(f.gram(h), want)
    torch.testing.assert_close(h.gram(f), want.T)
    torch.testing.assert_close(f.gram(Dense(h.dense().float())), want, rtol=1e-5, atol=1e-5)


class Bags(nn.Module):
    """Words (B, T, 3) to classes; zeros are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        there = (x != 0).any(2, keepdim=True)
        return self.head((torch.tanh(self.inner(x)) * there).sum(1))


@pytest.mark.parametrize("long", ["queries", "later queries", "examples"])
def test_one_position_and_more(long: str, tmp_path: Path) -> None:
    """A layer that sees one position of some batches and several of others."""

    def bags(count: int, *lengths: int) -> list[Any]:
        random = torch.Generator().manual_seed(len(lengths))
        return [(torch.randn(lengths[i % len(lengths)], 3, generator=random).double(), i % 3)
                for i in range(count)]  # fmt: skip

    short, mixed = bags(6, 1), bags(6, 1, 1, 2)
    torch.manual_seed(0)
    net = Bags().double()

    def padded(items: list[Any]) -> tuple[Tensor, Tensor]:
        rows = nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True)
        return rows, torch.tensor([y for _, y in items])

    data, queries = (mixed, short) if long == "examples" else (short, mixed)
    job = pergrad.Job(net, data, losses, outputs=outputs, collate=padded)
    fit = pergrad.curvature(job, tmp_path / "fit", batch_size=2)
    size = {"queries": 6, "later queries": 2, "examples": 2}[long]
    found = pergrad.influence(job, queries, tmp_path / "found", curvature=fit, refine=0,
                              batch_size=size).scores  # fmt: skip
    G = torch.cat([pergrad.gradients(losses(net, padded([i])), net).flat() for i in data])
    J = pergrad.gradients(losses(net, padded(queries)), net)
    solved = J.precondition(fit).flat()
    torch.testing.assert_close(found, solved @ G.T / len(data))


def test_a_layer_of_one_position_is_never_rotated_as_a_matrix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    data = [(torch.randn(5).double(), i % 3) for i in range(7)]
    job = pergrad.Job(net, data, losses, outputs=outputs)
    fit = pergrad.curvature(job, tmp_path)
    batch = torch.utils.data.default_collate(data)
    J = pergrad.gradients(losses(net, batch), net)
    solved = Solved(fit, [J[:3], J[3:]])
    assert set(solved.inside) == {"0.weight", "3.weight"}
    assert set(solved.outside) == {"2.weight", "2.bias"}
    torch.testing.assert_close(solved.against(J), J @ J.precondition(fit).T)


def test_a_product_that_is_too_large_names_both(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Linear(1, 1, bias=False)

    def steep(net: nn.Module, batch: Any) -> Tensor:
        return net(batch[0])[:, 0] * batch[1]

    data = [(torch.ones(1), 1e25), (torch.ones(1), 1.0)]
    with pytest.raises(pergrad.UsageError, match=r"Query 0 .* too large .* with that of example 0"):
        pergrad.influence(pergrad.Job(net, data, steep), data, tmp_path / "found")
