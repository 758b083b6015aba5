"""Networks whose loss holds derivatives of their output."""

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, vmap

from ..registry import Problem, alive, architecture

POINTS = 4


def _network() -> nn.Module:
    return alive(
        nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 1))
        .double()
    )  # fmt: skip


def _points(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(POINTS, 2, dtype=torch.float64, generator=generator)


@architecture("physics-autograd", "By hand", quick=True)
def by_autograd() -> Problem:
    """Residual of a heat equation: derivatives by torch.autograd.grad(create_graph=True)."""
    model = _network()
    params = dict(model.named_parameters())

    def losses(number: int) -> Tensor:
        x = _points(number).requires_grad_()
        u = functional_call(model, params, (x,))
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du[:, 1].sum(), x, create_graph=True)
        return (du[:, 0] - 0.1 * ddu[:, 1]).square() + (u[:, 0] - x[:, 0].sin()).square()

    return Problem(params, losses)


@architecture("physics-torch-func", "By hand")
def by_func() -> Problem:
    """The same by torch.func: a function of one point, its gradient and Hessian, vmap."""
    model = _network()
    params = dict(model.named_parameters())

    def at(point: Tensor) -> Tensor:
        return functional_call(model, params, (point,))[0]

    def losses(number: int) -> Tensor:
        x = _points(number)
        first, second = vmap(grad(at))(x), vmap(hessian(at))(x)
        return (first[:, 0] - 0.1 * second[:, 1, 1]).square() + (vmap(at)(x) - 1).square()

    return Problem(params, losses)


@architecture("energy-and-forces", "By hand")
def forces() -> Problem:
    """An interatomic potential: energy per molecule, forces as its derivative by positions."""

    class Potential(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kinds = nn.Embedding(3, 4)
            self.pair = nn.Sequential(nn.Linear(9, 8), nn.SiLU(), nn.Linear(8, 1))

        def forward(self, kinds: Tensor, places: Tensor) -> Tensor:
            apart = (places[:, :, None] - places[:, None]).square().sum(-1, keepdim=True)
            count = places.shape[1]
            own = self.kinds(kinds)
            one = own[:, :, None].expand(-1, -1, count, -1)
            two = own[:, None].expand(-1, count, -1, -1)
            pairs = self.pair(torch.cat([one, two, torch.exp(-apart)], -1))
            return pairs.sum((1, 2, 3))

    model = alive(Potential().double())

    def losses(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        places = torch.randn(3, 5, 3, dtype=torch.float64, generator=generator).requires_grad_()
        energy = model(torch.randint(0, 3, (3, 5), generator=generator), places)
        (force,) = torch.autograd.grad(energy.sum(), places, create_graph=True)
        return energy.square() + force.square().sum((1, 2))

    return Problem(model, losses)


@architecture("implicit-siren", "By hand")
def siren() -> Problem:
    """Sine activations; one example is a whole signal, sampled at several points."""
    model = _network()

    def losses(number: int) -> Tensor:
        x = torch.stack([_points(3 * number + i) for i in range(3)])
        u = torch.sin(30 * model(torch.sin(x)))
        return (u[..., 0] - x[..., 0]).square().mean(1)

    return Problem(model, losses)
