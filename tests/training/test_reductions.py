"""One loss per example from many values: against loops, gradients and norms too."""

import re

import naive
import pytest
import torch
from helpers import assert_agrees
from torch import Tensor, nn

import pergrad

HOW = ["mean", "sum", "root"]


def by_hand(values: list[float], how: str) -> float:
    if not values:
        return 0.0
    return sum(values) / {"mean": len(values), "sum": 1, "root": len(values) ** 0.5}[how]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("how", HOW)
def test_masked(how: str, dtype: torch.dtype) -> None:
    values = torch.randn(4, 3, 2, dtype=dtype)
    mask = torch.rand(4, 3, 2) > 0.4
    mask[2] = False
    want = [by_hand(values[b][mask[b]].double().tolist(), how) for b in range(4)]
    values[~mask] = float("nan")
    values.requires_grad_()
    for kind in (torch.bool, torch.long, dtype):
        got = pergrad.per_example(values, mask.to(kind), how)
        assert got.dtype == dtype
        tolerance = 1e-9 if dtype == torch.float64 else 1e-6
        assert_agrees(got, torch.tensor(want, dtype=torch.float64), 10.0, tolerance)
        (grad,) = torch.autograd.grad(got.sum(), values)
        assert torch.isfinite(grad).all()  # NaN where nothing counts reaches nobody
        assert not grad[~mask].any()


@pytest.mark.parametrize("how", HOW)
def test_packed(how: str) -> None:
    values = torch.randn(2, 7, dtype=torch.float64)
    ids = torch.tensor([[0, 0, 1, 1, 1, -1, 3], [3, 3, 4, -1, -1, 4, 4]])
    mask = torch.tensor([[1, 1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 1, 1, 1]])
    want = [by_hand(values[(ids == b) & (mask == 1)].tolist(), how) for b in range(5)]
    got = pergrad.per_example(values, mask, how, ids)
    assert_agrees(got, torch.tensor(want, dtype=torch.float64), 10.0)
    assert pergrad.per_example(values[:0], ids=ids[:0], how=how).shape == (0,)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
def test_norms_of_these_losses(packed: bool, how: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    x = torch.randn(4, 5, 3, dtype=dtype)
    ids = torch.tensor([0, 0, 2, 2, 2, 1, 1, 1, 1, -1, 3, 3, 0, 0, 0, 2, 2, 1, 3, 3]).reshape(4, 5)
    mask = torch.rand(4, 5) > 0.3

    def losses() -> Tensor:
        values = model(x).squeeze(-1).square()
        return pergrad.per_example(values, mask, how, ids if packed else None)

    want = naive.norms(naive.loop_grads(losses(), model))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert_agrees(pergrad.norms(losses(), model), want, want, tolerance)


def test_weights_between() -> None:
    """A mask of numbers weighs: a mean by those weights."""
    values, mask = torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 0.5]])
    assert_agrees(pergrad.per_example(values, mask), torch.tensor([2.5 / 1.5]), 1.0, 1e-6)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (lambda v: (v, None, "median"), r"how(.|\n)*root"),
        (lambda v: (v.long(),), r"int64(.|\n)*floating point"),
        (lambda v: (v.sum(),), r"scalar(.|\n)*reduction"),
        (lambda v: ([1.0],), r"list(.|\n)*floating point"),
        (lambda v: (v, torch.ones(2, 2)), r"mask(.|\n)*\(2, 2\)(.|\n)*mask\[:, 1:\]"),
        (lambda v: (v, None, "mean", torch.ones(2).long()), r"ids(.|\n)*one entry"),
        (lambda v: (v, None, "mean", torch.ones(2, 3)), r"ids(.|\n)*float32(.|\n)*number"),
    ],
)
def test_bad_input(arguments, match: str) -> None:
    with pytest.raises(pergrad.UsageError, match=re.compile(match)):
        pergrad.per_example(*arguments(torch.rand(2, 3)))
