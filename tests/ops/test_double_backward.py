"""Losses that contain gradients, by rule: gradient penalties, forces, scores; against the loop."""

import copy
from collections.abc import Callable

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agrees, assert_rows_agree
from torch import Tensor, nn

import pergrad

B = 4
# float64 as everywhere; in float32 the loop is in float64, and a rounding of 6e-8 goes through two
# backward passes of some hundred terms each.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


class Squares(nn.Module):
    """The energy of an example: what a critic or a potential returns, (B,)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out.flatten(1).square().sum(1)


def penalty(model: nn.Module, x: Tensor) -> Tensor:
    """(B,): the squared norm of the gradient with respect to the data (R1)."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return g.flatten(1).square().sum(1)


def forces(model: nn.Module, x: Tensor) -> Tensor:
    """(B,): errors of energies and of forces, -dE/dx."""
    x = x.clone().requires_grad_()
    energy = model(x)
    (g,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return (energy - 1).square() + (-g - x.detach().cos()).flatten(1).square().sum(1)


def agrees(
    model: nn.Module, losses: Callable[[nn.Module, Tensor], Tensor], x: Tensor, dtype: torch.dtype
) -> None:
    """Norms, Gram, rows and derivatives are those of the loop in float64, by rules alone."""
    twin = copy.deepcopy(model).double()
    values = losses(twin, x.double())
    want = naive.loop_grads(values, twin)
    rows, norms = naive.flat(want), naive.norms(want)
    mine, tolerance = model.to(dtype), TOLERANCES[dtype]
    assert bool((norms > 1e-3).all())

    def again() -> Tensor:
        return losses(mine, x.to(dtype))

    coverage = pergrad.explain(again(), mine)
    assert {row.how for row in coverage.rows} <= {"rule", "unreached"}, str(coverage)
    assert_agrees(pergrad.norms(again(), mine), norms, norms, tolerance)
    assert_agrees(pergrad.gram(again(), mine), rows @ rows.T, norms[:, None] * norms, tolerance)
    J = pergrad.gradients(again(), mine)
    assert_rows_agree(J.dense(), want, norms=norms, tolerance=tolerance)
    live = pergrad.norms(again(), mine, create_graph=True)
    params = list(mine.parameters())
    got = torch.autograd.grad(live.sum(), params, materialize_grads=True, allow_unused=True)
    loop = naive.live_rows(losses(twin, x.double()), twin).norm(dim=1).sum()
    second = torch.autograd.grad(
        loop, list(twin.parameters()), materialize_grads=True, allow_unused=True
    )
    size = torch.stack([g.norm() for g in second]).norm()
    for one, two in zip(got, second, strict=True):
        assert_agrees(one, two, size, 10 * tolerance)


CONVOLUTIONS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "grouped": {"groups": 2},
    "by channel": {"groups": 4},
    "dilated": {"dilation": 2, "padding": 1},
    "without bias": {"bias": False},
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("how", CONVOLUTIONS)
def test_convolutions(how: str, rank: int, transposed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d")
    model = Squares(
        kind(4, 4, 3, **CONVOLUTIONS[how]), nn.Tanh(), kind(4, 4, 2, **CONVOLUTIONS[how])
    )
    for losses in (penalty, forces):
        agrees(model, losses, torch.randn(B, 4, *[(7, 6, 5)[rank - 1]] * rank), dtype)


NORMS = {
    "batch norm 1d": (lambda: nn.BatchNorm1d(4).eval(), (4, 5)),
    "batch norm of rows": (lambda: nn.BatchNorm1d(4).eval(), (4,)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4).eval(), (4, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm(5), (4, 5)),
    "layer norm of images": (lambda: nn.LayerNorm((4, 3, 3)), (4, 3, 3)),
    "layer norm without shift": (lambda: nn.LayerNorm(5, bias=False), (5,)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "RMS norm": (lambda: nn.RMSNorm(5), (4, 5)),
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("losses", [penalty, forces])
@pytest.mark.parametrize("which", NORMS)
def test_norms(which: str, losses: Callable, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, shape = NORMS[which]
    norm = make()
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn(p.shape))
        for name, buffer in norm.named_buffers():
            if name != "num_batches_tracked":
                buffer.copy_(0.5 + torch.rand(buffer.shape))
    model = Squares(nn.Tanh(), norm, nn.Sigmoid())
    agrees(model, losses, torch.randn(B, *shape), dtype)


BETWEEN: dict[str, nn.Module] = {
    "leaky ReLU": nn.LeakyReLU(0.2), "ELU": nn.ELU(), "GELU": nn.GELU(), "SiLU": nn.SiLU(),
    "softplus": nn.Softplus(), "PReLU": nn.PReLU(4), "softmax": nn.Softmax(1), "GLU": nn.GLU(1),
    "log-softmax": nn.LogSoftmax(1), "average pooling": nn.AvgPool2d(2),
    "maximum pooling": nn.MaxPool2d(2), "adaptive pooling": nn.AdaptiveAvgPool2d(3),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"), "padding": nn.ReflectionPad2d(1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("which", BETWEEN)
def test_what_lies_between(which: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    last = nn.Conv2d(2 if which == "GLU" else 4, 3, 2)
    model = Squares(nn.Conv2d(2, 4, 3), copy.deepcopy(BETWEEN[which]), last, nn.Tanh())
    agrees(model, penalty, torch.randn(B, 2, 6, 6), dtype)


def test_parts_of_the_data_and_pairs_of_atoms() -> None:
    """Forces from distances: selections, slices and differences, differentiated twice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            apart = (x[:, :, None] - x[:, None]).square().sum(-1)
            near = torch.cat([apart[:, 0, 1:], apart[:, 1:3, 3], apart.diagonal(1, 1, 2)], 1)
            out: Tensor = self.net(near[..., None]).sum((1, 2))
            return out

    for dtype in TOLERANCES:
        agrees(Pairs(), forces, torch.randn(B, 5, 3), dtype)


def test_a_batch_norm_in_training_mode_mixes_in_its_gradient_too() -> None:
    torch.manual_seed(0)
    model = Squares(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh()).double()
    losses = penalty(model, torch.randn(B, 2, 5, 5).double())
    with pytest.raises(pergrad.MixedExamplesError, match=r"batch_norm(.|\n)*eval\(\)"):
        pergrad.norms(losses, model, retain_graph=True)
    want = naive.norms(naive.loop_grads(losses, model))
    got = pergrad.norms(losses, model, on_mixing="exact")
    assert_agrees(got, want, want)


def test_a_gradient_of_the_weights_is_not_taken_for_one_of_the_data() -> None:
    """A loss of a step on each task's own support: the kernel's gradient is differentiated."""
    torch.manual_seed(0)
    model = nn.Conv1d(2, 3, 2).double()
    support, x = torch.randn(B, 5, 2, 6).double(), torch.randn(B, 5, 2, 6).double()

    def losses() -> Tensor:
        rows = []
        for mine, new in zip(support, x, strict=True):
            loss = F.conv1d(mine, model.weight, model.bias).sin().sum()
            w, b = torch.autograd.grad(loss, [model.weight, model.bias], create_graph=True)
            adapted = F.conv1d(new, model.weight - 0.1 * w, model.bias - 0.1 * b)
            rows.append(adapted.square().sum())
        return torch.stack(rows)

    want = naive.loop_grads(losses(), model)
    norms = naive.norms(want)
    J = pergrad.gradients(losses(), model)
    assert_rows_agree(J.dense(), want, norms=norms)
    assert_agrees(pergrad.norms(losses(), model), norms, norms)
