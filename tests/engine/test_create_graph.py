"""create_graph=True: results are differentiable, and their derivatives are autograd's own."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pergrad

B = 3


def perceptron() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(B, 4), torch.randint(0, 3, (B,))
    return model, lambda: F.cross_entropy(model(x), y, reduction="none")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(9, 8)
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.scale = nn.Parameter(torch.randn(8))
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.norm, self.last = nn.LayerNorm(8), nn.RMSNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.token(ids) + self.position)
        h = h + self.scale * ((self.q(h) @ self.k(h).mT).softmax(-1) @ self.v(h))
        return F.linear(self.last(h), self.token.weight)  # tied


def transformer() -> tuple[nn.Module, Callable[[], Tensor]]:
    model, ids = Tiny(), torch.randint(0, 9, (B, 5))
    return model, lambda: F.cross_entropy(model(ids).mT, ids, reduction="none").mean(1)


def convolutional() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(),
                          nn.Conv2d(4, 2, 2, stride=2), nn.Flatten(), nn.Linear(18, 2))  # fmt: skip
    x = torch.randn(B, 2, 6, 6)
    return model, lambda: model(x).square().sum(1)


def computed_weight() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = parametrizations.weight_norm(nn.Linear(4, 3))
    x = torch.randn(B, 2, 4)
    return model, lambda: model(x).tanh().square().sum((1, 2))


BUILDERS = [perceptron, transformer, convolutional, computed_weight]


@pytest.fixture(params=BUILDERS, ids=lambda b: b.__name__)
def made(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[[], Tensor]]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield request.param()
    torch.set_default_dtype(before)


def rows(losses: Tensor, model: nn.Module) -> Tensor:
    """(B, P), attached to the graph."""
    return torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(
            loss, list(model.parameters()), create_graph=True, materialize_grads=True)])
        for loss in losses
    ])  # fmt: skip


def derivative(value: Tensor, model: nn.Module) -> Tensor:
    grads = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def test_of_the_mean_norm(made) -> None:
    model, losses = made
    want = derivative(rows(losses(), model).norm(dim=1).mean(), model)
    got = derivative(pergrad.norms(losses(), model, create_graph=True).mean(), model)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_of_norms_by_parameter(made) -> None:
    model, losses = made
    parts = pergrad.norms_by_parameter(losses(), model, create_graph=True)
    want = rows(losses(), model).square().sum()
    got = sum(part.square().sum() for part in parts.values())
    got, want = derivative(got, model), derivative(want, model)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_of_inner_products(made) -> None:
    model, losses = made
    w = torch.randn(B, B)
    J = rows(losses(), model)
    want = derivative((w * (J @ J.T)).sum(), model)
    gram = pergrad.gram(losses(), model, create_graph=True)
    torch.testing.assert_close(derivative((w * gram).sum(), model), want, rtol=1e-8, atol=1e-10)
    v = torch.randn(J.shape[1])
    want = derivative((rows(losses(), model) @ v).square().sum(), model)
    dots = pergrad.dots(losses(), model, against=v, create_graph=True)
    got = derivative(dots.square().sum(), model)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_of_a_matrix(made) -> None:
    model, losses = made
    J = pergrad.gradients(losses(), model, create_graph=True)
    want = derivative(rows(losses(), model)[0].square().sum(), model)
    got = derivative(J.norms()[0] ** 2, model)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    assert not J.detach().norms().requires_grad


def test_a_zero_gradient_has_a_derivative() -> None:
    model = nn.Linear(2, 1).double()
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    losses = (model(x) - model.bias).square().sum(1)
    norms = pergrad.norms(losses, model.weight, create_graph=True)
    assert norms[1] == 0
    assert torch.isfinite(derivative(norms.sum(), model)).all()
