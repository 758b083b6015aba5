"""A curvature's inverse as a few Kronecker products, against the exact solve."""

from pathlib import Path
from typing import Any

import pytest
import torch
from attributing import job, losses, outputs
from torch import nn

import pergrad
from pergrad import UsageError
from pergrad.factors import Dense, Outer


class Conv1D(nn.Module):
    """GPT-2's: the weight is (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(40, 30) / 6),
            nn.Parameter(torch.randn(30)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


def wide(other: bool = False) -> pergrad.Job:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = Conv1D() if other else nn.Linear(40, 30)
        net = nn.Sequential(first, nn.Tanh(), nn.LayerNorm(30), nn.Linear(30, 3)).double()
        data = [(torch.randn(40).double(), i % 3) for i in range(30)]
    return pergrad.Job(net, data, losses, outputs=outputs)


def rows(some: pergrad.Job) -> pergrad.GradientMatrix:
    batch = torch.utils.data.default_collate([some.data[i] for i in range(6)])
    return pergrad.gradients(losses(some.model, batch), some.model)


@pytest.mark.parametrize("other", [False, True])
def test_all_terms_are_the_inverse(other: bool, tmp_path: Path) -> None:
    """With as many terms as a side is wide nothing is left out; what is worth it stays factors."""
    some = wide(other)
    fit = pergrad.curvature(some, tmp_path / "fit")
    J = rows(some)
    want = J.precondition(fit).dense()
    for terms, near in ((16, 0.05), (31, 1e-8)):
        inverse = fit.in_terms(terms)
        inverse._worth = lambda c, f: isinstance(f, Outer)  # type: ignore[method-assign]
        found = J.precondition(inverse)
        kinds = {n: type(f) for n, f in found._factors.items()}
        assert kinds["0.weight"] is Outer
        assert kinds["0.bias"] is Dense
        for n, part in found.dense().items():
            assert float((part - want[n]).norm() / want[n].norm()) < near, (terms, n)
    assert inverse.off < 1e-10
    torch.testing.assert_close(found @ J.T, J.precondition(fit) @ J.T)


@pytest.mark.parametrize("name", ["images", "tokens", "tied", "perceptron"])
def test_what_is_no_outer_product_is_solved_exactly(name: str, tmp_path: Path) -> None:
    some = job(name)
    fit = pergrad.curvature(some, tmp_path / "fit")
    batch = torch.utils.data.default_collate([some.data[i] for i in range(4)])
    J = pergrad.gradients(losses(some.model, batch), some.model)
    want = J.precondition(fit).dense()
    for n, part in J.precondition(fit.in_terms(8)).dense().items():  # no side is wide enough
        torch.testing.assert_close(part, want[n])


def by_hand(some: pergrad.Job, fit: pergrad.Fit, queries: Any) -> torch.Tensor:
    """The scores with the first layer's inverse in eight terms, weighted by the means of Lambda."""
    every, asked = (torch.utils.data.default_collate(list(d)) for d in (some.data, queries))
    G, K = (
        pergrad.gradients(losses(some.model, batch), some.model).dense() for batch in (every, asked)
    )
    c = fit.blocks["0.weight"]
    L = c.Lambda[0]
    rows, columns = ((m / m.max()).clamp_min(1e-4) for m in (L.mean(1), L.mean(0)))
    weighted = rows[:, None] / (L + 0.1 * L.mean()) * columns
    u, s, v = torch.linalg.svd(weighted, full_matrices=False)
    D = (u[:, :8] * s[:8]) @ v[:8] / rows[:, None] / columns
    for rows in (G, K):
        rows["both"] = torch.cat([rows.pop("0.weight"), rows.pop("0.bias")[..., None]], 2)
    solved = fit.solve({n: K["both"][..., :-1] if n == "0.weight" else K["both"][..., -1]
                        if n == "0.bias" else K[n] for n in fit.shapes})  # fmt: skip
    left, right = c.left[0], c.right[0]
    solved["both"] = left @ (D * (left.mT @ K["both"] @ right)) @ right.mT
    return sum(
        torch.einsum("q...,b...->qb", solved[n].flatten(1), G[n].flatten(1)) for n in G
    ) / len(some)  # fmt: skip


def test_influence_in_terms(tmp_path: Path) -> None:
    some = wide()
    fit = pergrad.curvature(some, tmp_path / "fit")
    ask: Any = {"curvature": fit, "refine": 0}
    exact = pergrad.influence(some, some.data[:5], tmp_path / "exact", **ask).scores
    found = pergrad.influence(some, some.data[:5], tmp_path / "found", terms=8, **ask)
    assert 0.001 < float((found.scores - exact).norm() / exact.norm()) < 0.1
    torch.testing.assert_close(found.scores, by_hand(some, fit, some.data[:5]))
    assert "inverse approximated by 8 terms" in found.unit
    assert found.manifest["settings"]["terms"] == 8
    with pytest.raises(pergrad.StoreError, match="terms was 8 and is null"):
        pergrad.influence(some, some.data[:5], tmp_path / "found", **ask)
    assert "inverse in 8 terms, scores off by" in repr(fit.in_terms(8))


def test_terms_that_are_none(tmp_path: Path) -> None:
    some = wide()
    fit = pergrad.curvature(some, tmp_path / "fit")
    for terms in (0, True, 2.0):
        with pytest.raises(UsageError, match="pass a positive number of Kronecker products"):
            fit.in_terms(terms)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"terms is -1; pass a positive number"):
        pergrad.influence(some, some.data, tmp_path, curvature=fit, refine=0, terms=-1)
    with pytest.raises(UsageError, match=r"none is given: pass curvature="):
        pergrad.influence(some, some.data, tmp_path, terms=8)
    with pytest.raises(UsageError, match="pass refine=0, or leave out terms"):
        pergrad.influence(some, some.data, tmp_path, curvature=fit, terms=8)
