"""Half precision: as right as autograd's own per-example gradients in the same precision."""

import copy

import naive
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pergrad
from pergrad.factors import Outer

B = 32


class Small(nn.Module):
    """A transformer block from plain ops, with an embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(17, 16)
        self.position = nn.Parameter(0.5 * torch.randn(1, 6, 16))
        self.norm, self.last = nn.LayerNorm(16), nn.RMSNorm(16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.token(ids) + self.position
        n = self.norm(h)
        h = h + (self.q(n) @ self.k(n).mT / 4).softmax(-1) @ self.v(n)
        h = h + self.down(F.gelu(self.up(h)))
        return F.linear(self.last(h), self.token.weight)


def perceptron() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
                          nn.Linear(32, 5))  # fmt: skip
    return model, (torch.randn(B, 16), torch.randint(0, 5, (B,)))


def transformer() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    ids = torch.randint(0, 17, (B, 6))
    return Small(), (ids, ids.roll(-1, 1))


def convolutional() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(),
                          nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(72, 5))  # fmt: skip
    return model, (torch.randn(B, 2, 8, 8), torch.randint(0, 5, (B,)))


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    if out.dim() == 3:
        return F.cross_entropy(out.transpose(1, 2), y, reduction="none").mean(1)
    return F.cross_entropy(out, y, reduction="none")


@pytest.mark.parametrize("pure", [False, True], ids=["autocast", "pure"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("build", [perceptron, transformer, convolutional])
def test_as_right_as_autograd(build, dtype: torch.dtype, pure: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, (x, y) = build()
    exact = copy.deepcopy(model).double()
    x64 = x.double() if x.is_floating_point() else x
    truth = naive.norms(naive.loop_grads(losses(exact, x64, y), exact))
    if pure:
        model = model.to(dtype)
        x = x.to(dtype) if x.is_floating_point() else x
    with torch.autocast("cpu", dtype=dtype, enabled=not pure):
        values = losses(model, x, y)
    theirs = (naive.norms(naive.loop_grads(values, model)) - truth).abs() / truth
    norms = pergrad.norms(values, model)
    assert norms.dtype == torch.float32
    ours = (norms.double() - truth).abs() / truth
    # Both errors come from the same half-precision cotangents; what is added on top is summed in
    # another order, so that single examples may go either way by a fraction of the error.
    assert ours.max() <= 1.1 * theirs.max()
    assert ours.mean() <= 1.1 * theirs.mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_results_are_float32(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 3).to(dtype)
    x = torch.randn(5, 4, dtype=dtype)

    def values() -> Tensor:
        return model(x).square().sum(1)

    assert pergrad.gram(values(), model).dtype == torch.float32
    J = pergrad.gradients(values(), model)
    assert J.dtype == torch.float32
    assert (J @ J.T).dtype == (J @ torch.ones(15)).dtype == J.flat().dtype == torch.float32
    assert all(v.dtype == torch.float32 for v in (J.T @ torch.ones(5)).values())
    norms = pergrad.backward(values(), model)
    assert norms.dtype == torch.float32
    assert model.weight.grad.dtype == dtype


def test_a_call_under_autocast_is_the_call_outside() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), torch.randn(7, 9, 64)
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    c = torch.rand(7)

    def values() -> Tensor:
        return model(x).square().mean((1, 2))

    def numbers() -> dict[str, Tensor]:
        found = {name: verb(values(), model) for name, verb in (
            ("norms", pergrad.norms), ("gram", pergrad.gram),
        )}  # fmt: skip
        J = pergrad.gradients(values(), model)
        model.zero_grad()
        found["of backward"] = pergrad.backward(values(), model, weights=c)
        found |= {f".grad of {name}": p.grad for name, p in model.named_parameters()}
        found |= {f"sum by {name}": value for name, value in (J.T @ c).items()}
        return found | {
            "dots": pergrad.dots(values(), model, against=v), "J @ v": J @ v, "J Jᵀ": J @ J.T,
            "differentiable": pergrad.norms(values(), model, create_graph=True).detach(),
        }  # fmt: skip

    outside = numbers()
    forward = model.forward

    def exactly(*inputs: Tensor) -> Tensor:  # the forward pass outside, all else inside
        with torch.autocast("cpu", enabled=False):
            return forward(*inputs)

    model.forward = exactly
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = numbers()
        assert torch.is_autocast_enabled("cpu")
    for name, value in outside.items():
        assert torch.equal(inside[name], value), name


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_squares_of_numbers_whose_squares_leave_the_range(size: float) -> None:
    """(g ⊗ a)² where g² is 0 or infinite in float32 and a makes up for it; and where a is zero."""
    g = torch.tensor([[1.0, -2.0], [3.0, 0.5]]) * size
    a = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]]) / size
    f = Outer(g[:, None], a[:, None])
    got = f.second_moment(torch.tensor([0.5, 2.0]))
    rows = (g[:, :, None].double() * a[:, None]).square()
    want = torch.einsum("b,bij->ij", torch.tensor([0.5, 2.0]).double(), rows)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


def test_second_moments_refuse_weights_that_do_not_fit() -> None:
    model = nn.Linear(2, 1)
    losses = model(torch.ones(3, 2)).squeeze(1)
    with pytest.raises(pergrad.UsageError, match="one weight per example"):
        pergrad.second_moments(losses, model, torch.ones(2))
    with pytest.raises(pergrad.UsageError, match="one weight per example"):
        pergrad.gradients(losses, model).second_moment(torch.ones(2))
