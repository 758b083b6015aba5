"""Thresholds that follow the norms, layers clipped one by one, weights as a number."""

import naive
import pytest
import torch
from helpers import assert_agrees
from torch import Tensor, nn

import pergrad


class Tied(nn.Module):
    """A table read twice, and a layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.inner(self.table(ids))) @ self.table.weight.T


def set_up(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Tied().to(dtype)
    ids = torch.randint(7, (5, 3))
    return model, model(ids).square().flatten(1).mean(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_by_layer(dtype: torch.dtype) -> None:
    model, losses = set_up(dtype)
    G = naive.loop_grads(losses, model)
    layers = {"table": ["table.weight"], "inner": ["inner.weight", "inner.bias"]}
    limit = 0.5 * float(naive.norms(G).median())
    got = pergrad.backward(losses, model, weights=pergrad.clip(limit, by="layer"))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    want = naive.norms(G)
    assert_agrees(got, want, want, tolerance)
    total = torch.zeros(5, dtype=torch.float64)
    for names in layers.values():
        own = {name: G[name] for name in names}
        c = naive.clip_weights(own, limit / 2**0.5)
        assert (c < 1).any()
        total += (c * naive.norms(own)).square()
        for name, part in naive.weighted_sum(own, c).items():
            assert_agrees(model.get_parameter(name).grad, part, want.sum(), tolerance, name)
    assert (total.sqrt() <= limit * (1 + 1e-9)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_number(dtype: torch.dtype) -> None:
    model, losses = set_up(dtype)
    G = naive.loop_grads(losses, model)
    pergrad.backward(losses, model, weights=1 / 5)
    want = naive.weighted_sum(G, torch.full((5,), 1 / 5, dtype=torch.float64))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6
    for name, part in want.items():
        assert_agrees(model.get_parameter(name).grad, part, naive.norms(G).sum(), tolerance, name)


def test_the_quantile_follows() -> None:
    weigh = pergrad.clip(quantile=0.5)
    first = torch.tensor([1.0, 2.0, 3.0])
    assert_agrees(weigh(first), torch.tensor([1.0, 1.0, 2 / 3]), 1.0, 1e-6)
    assert float(weigh.threshold) == 2.0
    second = torch.tensor([10.0, 20.0])
    assert_agrees(weigh(second), torch.tensor([0.3, 0.15]), 1.0, 1e-6)  # of all five: 3
    assert float(weigh.threshold) == 3.0
    weigh(torch.full((1024,), 5.0))
    assert float(weigh.threshold) == 5.0  # the oldest are forgotten


def test_a_norm_that_is_none_does_not_count() -> None:
    weigh = pergrad.clip(quantile=0.5)
    weights = weigh(torch.tensor([1.0, float("nan"), 3.0, 0.0]))
    assert float(weigh.threshold) == 1.0
    assert weights[1].isnan()
    assert weights[3] == 1
    assert weigh(torch.zeros(0)).shape == (0,)


def test_no_example_gives_zeros() -> None:
    """What an optimizer's step takes, as after `losses.sum().backward()`: not None."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    unused = nn.Linear(1, 1)
    params = dict(nn.ModuleDict({"model": model, "unused": unused}).named_parameters())
    norms = pergrad.backward(model(torch.zeros(0, 3)).squeeze(1), params)
    assert norms.shape == (0,)
    for name, p in params.items():
        if name.startswith("unused"):
            assert p.grad is None
        else:
            assert torch.equal(p.grad, torch.zeros_like(p))
    model[0].weight.grad.fill_(3.0)
    pergrad.backward(model(torch.zeros(0, 3)).squeeze(1), params)
    assert bool((model[0].weight.grad == 3.0).all())  # zeros are added


@pytest.mark.parametrize("by", [None, "layer"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_mean_is_the_sum_through_their_number(dtype: torch.dtype, by: str | None) -> None:
    model, losses = set_up(dtype)
    parameters = list(model.parameters())
    limit = 0.5 * float(pergrad.norms(losses, model, retain_graph=True).median())
    pergrad.backward(losses, model, weights=pergrad.clip(limit, by=by), retain_graph=True)
    sums = [p.grad for p in parameters]
    model.zero_grad()
    pergrad.backward(losses, model, weights=pergrad.clip(limit, by=by, mean=True))
    for p, whole in zip(parameters, sums, strict=True):
        assert_agrees(p.grad, whole / 5, whole.norm(), 4 * torch.finfo(dtype).eps)
    assert len(pergrad.clip(1.0, mean=True)(torch.ones(0))) == 0


def test_a_clip_where_it_does_not_go() -> None:
    model, losses = set_up(torch.float64)
    for name in ("clip", "max_norm", "clip_norm"):
        with pytest.raises(pergrad.UsageError, match=r"weights=pergrad\.clip\(1\.0\)"):
            pergrad.backward(losses, model, **{name: 1.0})
    with pytest.raises(pergrad.UsageError, match=r"weights=\.\.\."):
        pergrad.backward(losses, model, weight=1.0)
    with pytest.raises(pergrad.UsageError, match=r"retain_grap\. Did you mean `retain_graph`\?"):
        pergrad.norms(losses, model, retain_grap=True)
    want = pergrad.backward(losses, model, pergrad.clip(1.0), retain_graph=True)
    by_position = [p.grad for p in model.parameters()]
    model.zero_grad()
    assert torch.equal(want, pergrad.backward(losses, model, weights=pergrad.clip(1.0)))
    for p, grad in zip(model.parameters(), by_position, strict=True):
        assert torch.equal(p.grad, grad)


def test_a_clip_prints_as_it_is_typed() -> None:
    for text in (
        "pergrad.clip(1.0)",
        "pergrad.clip(quantile=0.5)",
        'pergrad.clip(2.0, by="layer", mean=True)',
    ):
        assert repr(eval(text)) == text


def test_mean_is_yes_or_no() -> None:
    with pytest.raises(pergrad.UsageError, match=r"`mean` is 8; pass True for the mean"):
        pergrad.clip(1.0, mean=8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weight_zero_leaves_out_what_is_not_finite(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    x = torch.randn(4, 3, dtype=dtype)
    x[2] = float("nan")
    others = torch.tensor([0, 1, 3])
    pergrad.backward(
        model(x).square().sum(1), model, weights=lambda norms: norms.isfinite().to(norms.dtype)
    )
    G = naive.loop_grads(model(x[others]).square().sum(1), model)
    want = naive.weighted_sum(G, torch.ones(3, dtype=torch.float64))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6
    for name, part in want.items():
        assert_agrees(model.get_parameter(name).grad, part, naive.norms(G).sum(), tolerance, name)
    model.zero_grad()
    pergrad.backward(
        model(x).square().sum(1), model, weights=torch.tensor([1.0, 1, 0, 1]).to(dtype)
    )
    assert model.weight.grad.isnan().all()  # as in a plain pass: only a function sees norms
