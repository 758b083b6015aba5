"""Squared norms that a use tells without a factor are those of its factor, and of the loop."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests import naive
from tests.helpers import assert_agrees
from torch import Tensor, nn

import pergrad
from pergrad.engine import pass_

B = 5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}  # of norms, whose terms are some hundred


def assert_norms(found: Tensor, rows: naive.Grads) -> None:
    """Those of the loop, to the rounding of the dtype."""
    want = naive.norms({name: g.double() for name, g in rows.items()})
    assert_agrees(found, want, want, TOLERANCE[found.dtype])


class Free(nn.Module):
    """Products in other forms than `nn.Linear`'s."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn((1, 3) if form == "bias (1, 3)" else 3))
        self.wide = nn.Parameter(torch.randn(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        W, b = self.weight, self.bias
        if self.form == "mm":
            return x @ W
        if self.form == "viewed":
            return x @ W.view(2, 2, 3).reshape(4, 3)
        if self.form == "on the left":
            return (W.T @ x.T).T
        if self.form == "alpha":
            return torch.addmm(b, x, W, alpha=2)
        if self.form == "beta":
            return torch.addmm(b, x, W, beta=3)
        if self.form == "one number":
            return torch.addmm(self.wide, x, W)
        if self.form == "tied":
            return torch.addmm(b, x, W) + torch.addmm(b, x.square(), W)
        if self.form == "a function of a parameter":
            return torch.addmm(b, x, W.tanh())
        return torch.addmm(b, x, W)


FORMS = {  # form -> how many uses tell their norms at once
    "mm": 1, "viewed": 1, "addmm": 1, "bias (1, 3)": 1, "on the left": 0, "alpha": 0, "beta": 0,
    "one number": 0, "tied": 0, "a function of a parameter": 0,
}  # fmt: skip


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What uses told at once."""
    found: list[Any] = []
    whole = pass_.Pass._tell

    def tell(self: Any, use: Any, squares: dict[int, Tensor], to: Any) -> None:
        found.append(squares)
        whole(self, use, squares, to)

    monkeypatch.setattr(pass_.Pass, "_tell", tell)
    return found


def read(losses: Tensor, model: nn.Module) -> Tensor:
    """Norms in the user's own pass."""
    with pergrad.reading(losses, model) as found:
        losses.mean().backward(retain_graph=True)
    return found.norms


def verb(losses: Tensor, model: nn.Module) -> Tensor:
    return pergrad.norms(losses, model, retain_graph=True)


WAYS = [verb, read]


def by_factors(way: Callable[..., Tensor], *given: Any) -> Tensor:
    """The same where every use has to give factors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pass_, "_at_once", lambda *_: None)
        return way(*given)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_product(
    form: str, dtype: torch.dtype, way: Callable[..., Tensor], told: list[Any]
) -> None:
    torch.manual_seed(0)
    model = Free(form).to(dtype)
    losses = model(torch.randn(B, 4, dtype=dtype)).square().sum(1)
    found = way(losses, model)
    assert len(told) == FORMS[form]
    assert_norms(found, naive.loop_grads(losses, model))
    assert torch.equal(found, by_factors(way, losses, model))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_a_perceptron(way: Callable[..., Tensor], batch: int, told: list[Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    losses = model(torch.randn(batch, 4)).square().sum(1)
    found = way(losses, model)
    assert len(told) == 2
    rows = naive.loop_grads(losses, model)
    assert_norms(found, rows)
    by_name = pergrad.norms_by_parameter(losses, model, retain_graph=True)
    assert list(by_name) == list(rows)
    for name, norms in by_name.items():
        assert_norms(norms, {name: rows[name]})
    assert torch.equal(found, by_factors(way, losses, model))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [3, 70])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_sizes_that_float32_cannot_square(
    way: Callable[..., Tensor], batch: int, scale: float, told: list[Any]
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    x = torch.randn(batch, 4)
    losses = model(x).sum(1) * torch.tensor([scale] + [1.0] * (batch - 1))
    found = way(losses, model)
    assert not told
    assert_norms(found, naive.loop_grads(losses, model))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_stays_with_its_example(way: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    x = torch.randn(B, 4)
    x[1] = float("nan")

    def loss_of(b: int) -> Tensor:
        return model(x[b]).sum()

    found = way(model(x).sum(1), model)
    assert found.isnan().tolist() == [False, True, False, False, False]
    keep = [0, 2, 3, 4]
    rows = naive.alone_grads(loss_of, model, B)  # in the loop 0 times NaN is NaN
    assert_norms(found[keep], {name: g[keep] for name, g in rows.items()})


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_are_not_examples(way: Callable[..., Tensor], told: list[Any]) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2), torch.randn(B, 3, 4)
    for losses in (model(x).square().sum((1, 2)), model(x[:, 0])[torch.tensor([2, 0, 1])].sum(1)):
        assert_norms(way(losses, model), naive.loop_grads(losses, model))
    assert not told


def test_a_hook_on_a_parameter_sees_every_gradient(told: list[Any]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    handle = model.weight.register_hook(lambda g: 2 * g)
    losses = model(torch.randn(B, 4)).square().sum(1)
    assert_norms(verb(losses, model), naive.loop_grads(losses, model))
    handle.remove()
    assert not told


def test_what_an_op_saved_in_half_precision_goes_to_the_rule(told: list[Any]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2).to(torch.bfloat16)
    losses = model(torch.randn(B, 4, dtype=torch.bfloat16)).float().square().sum(1)
    assert pergrad.norms(losses, model, retain_graph=True).isfinite().all()
    assert not told


def test_norms_that_are_differentiated_have_factors(told: list[Any]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    losses = model(torch.randn(B, 4)).square().sum(1)
    assert pergrad.norms(losses, model, create_graph=True).requires_grad
    assert not told
