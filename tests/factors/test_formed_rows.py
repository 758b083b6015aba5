"""Factors against rows that are formed: the same products, by any tiles, in any dtype, traced."""

import pytest
import torch
from torch import Tensor

from pergrad.factors import Correlation, Dense, Factor, Outer, Rows
from pergrad.factors.workspace import workspace


def made(kind: str, batch: int, dtype: torch.dtype, *, seed: int = 0) -> Factor:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator).to(dtype)

    if kind == "convolution":
        return Correlation(draw(batch, 4, 6, 6), draw(batch, 6, 6, 6), kernel=(3, 3), stride=(1, 1),
                           padding=(1, 1), dilation=(1, 1), groups=2)  # fmt: skip
    N, T, p, d = {
        "one position": (1, 1, 5, 7), "one position, wide": (1, 1, 9, 4), "positions": (1, 6, 5, 7),
        "few outputs": (1, 3, 1, 40), "groups": (3, 6, 5, 7), "groups, one position": (3, 1, 5, 7),
        "no positions": (1, 0, 5, 7),
    }[kind]  # fmt: skip
    return Outer(draw(batch, N, T, p), draw(batch, N, T, d))


KINDS = ["one position", "one position, wide", "positions", "few outputs", "groups",
         "groups, one position", "no positions", "convolution"]  # fmt: skip


@pytest.mark.parametrize("size", [None, 2000, 100], ids=["whole", "tiles", "rows"])
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_products_with_formed_rows(kind: str, batch: int, size: int | None) -> None:
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        f = made(kind, batch, dtype)
        for count in (0, 1, 4):
            h = Dense(torch.randn(count, *f.shape, dtype=torch.float64).to(dtype))
            with workspace(size):
                got = f.gram(h)
                turned = h.gram(f)
            want = f.dense().flatten(1) @ h.dense().flatten(1).mT
            assert got.shape == (batch, count)
            torch.testing.assert_close(got, want, rtol=near, atol=near * 100)
            torch.testing.assert_close(turned, want.mT, rtol=near, atol=near * 100)


@pytest.mark.parametrize("kind", ["one position", "positions", "convolution"])
def test_they_are_differentiated(kind: str) -> None:
    f = made(kind, 3, torch.float64)
    tensors = [t.requires_grad_() for t in f.tensors()]
    rows = torch.randn(2, *f.shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, dtype=torch.float64)
    got = torch.autograd.grad((f.gram(Dense(rows)) * weights).sum(), [*tensors, rows])
    plain = (f.dense().flatten(1) @ rows.flatten(1).mT * weights).sum()
    for one, two in zip(got, torch.autograd.grad(plain, [*tensors, rows]), strict=True):
        torch.testing.assert_close(one, two)


def test_a_parameter_that_is_not_the_matrix() -> None:
    """A transposed view of the weight: rows of the parameter are not rows of g' a."""
    f = Outer(torch.randn(3, 2, 4), torch.randn(3, 2, 6), (3, 8))
    h = Dense(torch.randn(2, 3, 8))
    want = f.dense().flatten(1) @ h.dense().flatten(1).mT
    torch.testing.assert_close(f.gram(h), want)


def test_what_meets_many_batches_is_formed_where_each_would_form_it() -> None:
    few, many = Outer(torch.randn(4, 1, 20), torch.randn(4, 1, 30)), Outer(
        torch.randn(4, 64, 20), torch.randn(4, 64, 30))  # fmt: skip
    assert few.met_by(16) is few  # one position: its products never form it
    table = Rows(torch.tensor([[1, 2], [0, 1]]), torch.randn(2, 2, 3), (5, 3))
    assert table.met_by(16) is table
    formed = many.met_by(16)
    assert isinstance(formed, Dense)
    assert torch.equal(formed.dense(), many.dense())
    images = Correlation(torch.randn(2, 4, 12, 12), torch.randn(2, 3, 12, 12), kernel=(3, 3),
                         stride=(1, 1), padding=(1, 1), dilation=(1, 1))  # fmt: skip
    assert isinstance(images.met_by(16), Dense)
    pixels = Correlation(torch.randn(2, 64, 1, 1), torch.randn(2, 32, 3, 3), kernel=(3, 3),
                         stride=(1, 1), padding=(0, 0), dilation=(1, 1))  # fmt: skip
    assert pixels.met_by(16) is pixels
