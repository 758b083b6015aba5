"""A penalty on weights is no example's, though it have as many rows as there are examples."""

from collections.abc import Callable

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agrees
from torch import Tensor, nn

import pergrad

Penalty = Callable[[nn.Sequential], Tensor]


def anchor(model: nn.Sequential) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    weight = model[0].weight
    return torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)


PENALTIES: dict[str, Penalty] = {
    "squares": lambda m: m[0].weight.square().sum(),
    "sizes": lambda m: m[0].bias.abs().mean(),
    "squares of all": lambda m: sum(p.square().sum() for p in m.parameters()),
    "all in one": lambda m: torch.cat([p.flatten() for p in m.parameters()]).square().sum(),
    "distance": lambda m: (m[0].weight - anchor(m)).square().sum(),
    "distance, by a loss": lambda m: F.mse_loss(m[0].weight, anchor(m)),
    "distance, by row": lambda m: (m[0].weight - anchor(m)).square().sum(1).mean(),
    "rows of length 1": lambda m: (m[0].weight.square().sum(1) - 1).square().mean(),
    "orthogonal": lambda m: (
        (m[0].weight @ m[0].weight.T - torch.eye(6).to(m[0].weight)).square().sum()
    ),
    "of products": lambda m: (m[0].weight @ anchor(m).T - 1).square().mean(),
    "of products with a distance": lambda m: (
        ((m[0].weight - anchor(m)) @ anchor(m).T).square().sum()
    ),
    "of a constant times a weight": lambda m: (anchor(m) @ m[0].weight.T).square().mean(),
    "of a constant times a weight, by a loss": lambda m: F.smooth_l1_loss(
        anchor(m) @ m[0].weight.T, torch.eye(6).to(m[0].weight)
    ),
    "smooth": lambda m: (
        ((torch.eye(6) - torch.eye(6).roll(1, 0)).to(m[0].weight) @ m[0].weight).square().sum()
    ),
    "smooth, by a convolution": lambda m: (
        F.conv1d(m[0].weight[:, None], torch.tensor([[[1.0, -1.0]]]).to(m[0].weight)).abs().mean()
    ),
    "hinge": lambda m: (1 - m[0].weight).relu().sum(),
    "weighted": lambda m: (anchor(m) * m[0].weight.square()).sum(),
    "clamped": lambda m: m[0].weight.clamp(min=0.1).mean(),
    "norm": lambda m: m[0].weight.norm(),
}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def losses_of(model: nn.Module, examples: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (examples,), generator=generator)
    return F.cross_entropy(model(x.to(next(model.parameters()))), y, reduction="none")


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("examples", [1, 2, 3, 6])
@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_belongs_to_no_example(
    name: str, examples: int, dtype: torch.dtype, first: bool
) -> None:
    model = network(dtype)

    def loss_of() -> Tensor:
        own, penalty = losses_of(model, examples).mean(), 0.1 * PENALTIES[name](model)
        return penalty + own if first else own + penalty

    with pergrad.reading(loss := loss_of(), model, examples) as read:
        loss.backward()
    with pytest.raises(pergrad.UsageError, match=r"belongs to no example, pass rest=True"):
        _ = read.norms
    with pergrad.reading(loss := loss_of(), model, examples, rest=True) as read:
        loss.backward()
    plain = losses_of(model, examples) / examples
    want = naive.norms(naive.loop_grads(plain, model))
    assert_agrees(read.norms, want, want, 1e-9 if dtype == torch.float64 else 1e-5, name)


@pytest.mark.parametrize("name", PENALTIES)
def test_parts_leave_it_out(name: str) -> None:
    model = network()
    own = F.cross_entropy(model(torch.randn(6, 4).double()), torch.zeros(6).long())
    penalty = PENALTIES[name](model)
    with pytest.raises(pergrad.UsageError, match=r"belongs to no example, pass rest=True"):
        pergrad.parts(own + penalty, 6)
    parts = pergrad.parts(own + penalty, 6, rest=True)
    torch.testing.assert_close(parts.sum(), own)
    torch.testing.assert_close(parts.rest, penalty)


def test_a_penalty_beside_what_cannot_be_taken_apart() -> None:
    """It is not all that is left."""
    model = network()
    loss = losses_of(model, 6).mean().exp() + model[0].weight.square().sum()
    with pergrad.reading(loss, model, 6, rest=True) as read:
        loss.backward()
    with pytest.raises(pergrad.UsageError, match=r"`exp`(.|\n)*the losses \(B,\)"):
        _ = read.norms


def test_a_model_of_one_weight_beside_its_decay() -> None:
    """What is applied to data stays the examples' where nothing else could be."""
    model, x = nn.Linear(4, 1, bias=False).double(), torch.randn(6, 4).double()
    losses = lambda: (model(x)[:, 0] - 1).square()  # noqa: E731
    loss = losses().mean() + model.weight.square().sum()
    with pergrad.reading(loss, model, 6, rest=True) as read:
        loss.backward()
    want = naive.norms(naive.loop_grads(losses() / 6, model))
    assert_agrees(read.norms, want, want)
    hidden = model(x)
    loss = (hidden - 1).square().mean() + hidden.abs().mean()
    with pergrad.reading(loss, model, 6) as read:
        loss.backward()
    want = naive.norms(naive.loop_grads((losses() + model(x)[:, 0].abs()) / 6, model))
    assert_agrees(read.norms, want, want)


def test_summands_that_are_examples() -> None:
    """Two heads, two towers, an activation's size: each is applied to data."""
    model, tower, table = network(), network(), nn.Embedding(5, 3).double()
    x, ids = torch.randn(6, 4).double(), torch.randint(5, (6, 2))
    everything = nn.ModuleList([model, tower, table])

    def each() -> Tensor:
        hidden = model[:2](x)
        mean = model[2](hidden).square().mean(1) + tower(x).abs().sum(1)
        return mean + 0.1 * hidden.square().sum(1) + table(ids).square().sum((1, 2))

    hidden = model[:2](x)
    loss = (
        model[2](hidden).square().mean() + tower(x).abs().sum() / 6
        + (0.1 * hidden.square()).sum() / 6 + table(ids).square().sum() / 6
    )  # fmt: skip
    with pergrad.reading(loss, everything, 6) as read:
        loss.backward()
    want = naive.norms(naive.loop_grads(each() / 6, everything))
    assert_agrees(read.norms, want, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_penalty_at_fixed_probes(dtype: torch.dtype) -> None:
    """Inside the loss it is taken for the examples', as documented; behind the block it is not."""
    model = network().to(dtype)
    x, probes = torch.randn(6, 4, dtype=dtype), torch.randn(6, 4, dtype=dtype)

    def penalty(rows: Tensor) -> Tensor:
        return model(rows).square().mean(1)

    own = model(x).abs().mean(1)
    want = naive.norms(naive.loop_grads(own / 6, model))
    loss = own.mean()
    with pergrad.reading(loss, model, 6) as read:
        loss.backward()
    penalty(probes).mean().backward()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert_agrees(read.norms, want, want, tolerance)
    apart = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = model(x).abs().mean() + penalty(probes).mean()
    with pergrad.reading(loss, model, 6) as read:
        loss.backward()
    for p, grad in zip(model.parameters(), apart, strict=True):
        torch.testing.assert_close(p.grad, grad)
    mixed = (model(x).abs().mean(1) + penalty(probes)) / 6
    want = naive.norms(naive.loop_grads(mixed, model))
    assert_agrees(read.norms, want, want, tolerance)
    given = model(x).abs().mean(1)  # of losses that are given, their graph alone is read
    with pergrad.reading(given, model) as read:
        (given.mean() + penalty(probes).mean()).backward()
    want = naive.norms(naive.loop_grads(model(x).abs().mean(1), model))
    assert_agrees(read.norms, want, want, tolerance)
