"""Products with the whole curvature, and solving with them, against dense algebra."""

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import naive
import pytest
import torch
from attributing import BUILDERS, DTYPES, job, losses, tolerance
from helpers import assert_agrees
from torch import Tensor, nn

import pergrad
from pergrad.attribution import gauss_newton
from pergrad.attribution.batches import batches_of
from pergrad.attribution.gauss_newton import Curvature, Refining, inner, lengths
from pergrad.errors import UnsupportedError, UsageError


def dense_gauss_newton(task: pergrad.Job) -> Tensor:
    """(P, P), example by example: outputs by parameters, and softmax's second derivative."""
    total = 0.0
    for item in task.data:
        z = task.outputs(task.model, torch.utils.data.default_collate([item]))[0]
        weights = torch.ones(1) if z.dim() == 1 else task.weights(item[0][None])[0]
        for t, w in enumerate(weights.double()):
            row = z if z.dim() == 1 else z[t]
            J = naive.flat(naive.loop_grads(row, task.model))
            if task.likelihood == "categorical":
                p = row.detach().double().softmax(0)
                H = p.diag() - p[:, None] * p
            else:
                H = torch.eye(len(row), dtype=torch.float64)
            total = total + w * (J.mT @ H @ J)
    return total / len(task.data)


def directions(task: pergrad.Job, count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        n: torch.randn((count, *p.shape), generator=generator, dtype=torch.float64).to(p.dtype)
        for n, p in task.model.named_parameters()
    }


class Positions(nn.Module):
    """Three numbers at each of four positions, through attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(x, x, x, need_weights=False)[0])


WEIGHTS = torch.tensor([0.0, 0.5, 1.0, 2.0])


def positions(dtype: torch.dtype, likelihood: str) -> pergrad.Job:
    BUILDERS["positions"] = (Positions, lambda: torch.randn(4, 6, dtype=torch.float64))
    return job(
        "positions", dtype, 5, likelihood=likelihood,
        weights=lambda batch: WEIGHTS.expand(len(batch[0]), 4),
    )  # fmt: skip


@DTYPES
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", ["perceptron", "images", "tied", "categorical", "gaussian"])
def test_products_are_dense_ones(name: str, count: int, dtype: torch.dtype) -> None:
    """One direction goes by differentiated backward passes, four by gradients of each output."""
    inside = name in ("categorical", "gaussian")
    task = positions(dtype, name) if inside else job(name, dtype)
    want_matrix = dense_gauss_newton(task)
    V = directions(task, count)
    flat = torch.cat([v.flatten(1) for v in V.values()], 1).double()
    want = flat @ want_matrix
    for size in (3, 11):
        got = Curvature(batches_of(task, size, 0)).times(V)
        assert list(got) == list(V)
        mine = torch.cat([v.flatten(1) for v in got.values()], 1)
        assert mine.dtype == dtype
        scale = float(want_matrix.norm() * flat.norm(dim=1).max())
        assert_agrees(mine, want, scale, tolerance(dtype), name)


@DTYPES
def test_both_ways_are_one_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    task, products = job("tokens", dtype), []
    V = directions(task, 3)
    for passes in (0, 1000):
        monkeypatch.setattr(gauss_newton, "PASSES", passes)
        products.append(Curvature(batches_of(task, 4, 0)).times(V))
    for n, part in products[0].items():
        assert_agrees(part, products[1][n], float(part.norm()), tolerance(dtype), n)


@DTYPES
def test_the_empirical_product_is_the_loops(dtype: torch.dtype) -> None:
    task = job("images", dtype, outputs=None)
    G = naive.flat(
        naive.loop_grads(
            losses(task.model, torch.utils.data.default_collate(task.data)), task.model
        )
    )
    V = directions(task, 3)
    flat = torch.cat([v.flatten(1) for v in V.values()], 1).double()
    got = Curvature(batches_of(task, 4, 0), empirical=True).times(V)
    mine = torch.cat([v.flatten(1) for v in got.values()], 1)
    want = flat @ G.mT @ G / len(G)
    assert_agrees(mine, want, float(want.norm()), tolerance(dtype))


def test_the_hessian_is_that_of_the_loss() -> None:
    task = job("perceptron", count=2)
    batches = batches_of(task, 2, 0)
    outputs_ = gauss_newton.outputs_of(batches, batches.at(range(2)))
    z = outputs_.values.detach()
    eye = torch.eye(3, dtype=torch.float64).expand(2, 1, 3, 3)
    for b in range(2):
        y = torch.tensor(task.data[b][1])
        want = torch.autograd.functional.hessian(
            lambda row, y=y: nn.functional.cross_entropy(row, y), z[b, 0]
        )
        assert_agrees(outputs_.hessian(eye)[b, 0], want, 1.0)


def as_rows(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = torch.split(flat, [v[0].numel() for v in like.values()], 1)
    return {n: p.reshape(-1, *v.shape[1:]) for p, (n, v) in zip(parts, like.items(), strict=True)}


@DTYPES
def test_steps_lead_to_the_exact_solution(dtype: torch.dtype, tmp_path: Any) -> None:
    """The error falls at each step in the system's own norm, and the residual is the true one."""
    task = job("perceptron", dtype)
    fit = pergrad.curvature(task, tmp_path / "f").damped(1.0)
    curvature = Curvature(batches_of(task, 4, 0))
    G = directions(task, 3)
    for part in G.values():
        part[2] = 0  # a query without gradient
    flat = torch.cat([v.flatten(1) for v in G.values()], 1).double()
    added = torch.cat(
        [torch.full_like(v[0].double().flatten(), fit.added[n]) for n, v in G.items()]
    )
    A = dense_gauss_newton(task) + added.diag()
    want = torch.linalg.solve(A, flat.mT).mT
    now = Refining.begin(G, fit.solve_rows)
    errors = []
    for _ in range(40):
        X = torch.cat([v.flatten(1) for v in now.X.values()], 1).double()
        errors.append(torch.einsum("qp,pr,qr->q", X - want, A, X - want))
        left = torch.cat([v.flatten(1) for v in now.R.values()], 1)
        assert_agrees(left, flat - X @ A, float(flat.norm()), tolerance(dtype))
        now = Refining.of(now.tensors(), now.steps)
        now.step(curvature.times, fit.added, fit.solve_rows)
    assert now.steps == 40
    floor = 1e-20 if dtype == torch.float64 else 1e-9  # rounding, squared
    for before, after in pairwise(errors):
        assert (after[:2] <= before[:2] + floor * errors[0][:2]).all()
    assert errors[5][0] < 0.05 * errors[0][0]
    X = torch.cat([v.flatten(1) for v in now.X.values()], 1).double()
    assert_agrees(X[:2], want[:2], float(want.norm()), 1e-9 if dtype == torch.float64 else 1e-4)
    assert float(X[2].norm()) == 0
    assert_agrees(lengths(G), flat.norm(dim=1), 10.0, tolerance(dtype))
    assert_agrees(inner(G, G), flat.square().sum(1), 100.0, tolerance(dtype))


class Once(torch.autograd.Function):
    """A square whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


def test_what_cannot_be_differentiated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauss_newton, "PASSES", 0)
    task = job("perceptron", outputs=lambda m, b: Once.apply(m(b[0])))
    with pytest.raises(UnsupportedError, match=r"does not give: a part of it.*`refine=0`"):
        Curvature(batches_of(task, 4, 0)).times(directions(task, 1))
    partly = job("perceptron", outputs=lambda m, b: Once.apply(m(b[0])) + m(b[0]))
    with pytest.raises(UnsupportedError, match="a part of it was left out"):
        Curvature(batches_of(partly, 4, 0)).times(directions(task, 1))
    failing = job("perceptron", outputs=lambda m, b: Failing.apply(m(b[0])))
    with pytest.raises(RuntimeError, match="of the user's own"):
        Curvature(batches_of(failing, 4, 0)).times(directions(failing, 1))
    with pytest.raises(UsageError, match=r"pass `Job\(outputs="):
        Curvature(batches_of(job("perceptron", outputs=None), 4, 0)).times(directions(task, 1))


class Failing(torch.autograd.Function):
    """Raises in its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise RuntimeError("of the user's own")


def test_attention_takes_a_form_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauss_newton, "_twice_differentiable", nullcontext)
    attending = positions(torch.float32, "gaussian")
    with pytest.raises(UnsupportedError, match=r"not implemented.*`refine=0`"):
        Curvature(batches_of(attending, 4, 0)).times(directions(attending, 1))
