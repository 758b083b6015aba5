"""torch's own backward of batch norm is wrong for some tensors: refused in every pass, by name.

What torch does is in findings/torch_batch_norm_*.sh. The same graph may come with tensors that lie
otherwise, so a plan that was remembered must not be believed of them.
"""

import itertools
from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agrees
from torch import Tensor, nn

import pergrad
from pergrad.graph import plan
from pergrad.ops import wrong_in_torch

Change = Callable[[Tensor], Tensor]
ORDER = r"torch's own backward of `native_batch_norm`(.|\n)*\.contiguous\("
VECTOR = r"native_batch_norm(.|\n)*do not lie dense(.|\n)*through `\.contiguous\(\)`"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def assert_right(losses: Tensor, params: list[Tensor], **options: Any) -> None:
    want = naive.norms(naive.loop_grads(losses, params))
    close = 1e-9 if losses.dtype is torch.float64 else 1e-4
    assert_agrees(pergrad.norms(losses, params, **options), want, want, close, what="norms")


@DTYPES
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("when", ["once", "always", "never"])
def test_in_a_graph_that_was_verified(dtype: torch.dtype, affine: bool, when: Any) -> None:
    """Examples along the height of one picture, which torch's backward takes for its width."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, affine=affine, dtype=dtype).eval()
    x, c = torch.randn(4, 5, 3, dtype=dtype), torch.randn(1, 3, 4, 5, dtype=dtype)
    w = torch.rand(3, 4, dtype=dtype, requires_grad=True)

    def losses(picture: Tensor) -> Tensor:
        return (norm(picture * w[None, :, :, None]) * c).sum((0, 1, 3))

    turned = x.permute(2, 0, 1)[None]
    plan.clear()
    for _ in range(2):
        assert_right(losses(turned.contiguous()), [w], check_layout=when)
    with pytest.raises(pergrad.UnsupportedError, match=ORDER):
        pergrad.norms(losses(turned), [w], check_layout=when)
    assert_right(losses(turned.contiguous()), [w], check_layout=when)


def _squeezed(dtype: torch.dtype) -> tuple[Callable[[Change], Tensor], nn.Module]:
    """Series as pictures one wide, whose channels go last afterwards: nothing odd about it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 2)).to(dtype).eval()
    x = torch.randn(4, 2, 5, 1, dtype=dtype)

    def losses(change: Change) -> Tensor:
        h = net[1](change(net[0](x)))
        return net[2](h.squeeze(-1).transpose(1, 2)).square().sum((1, 2))

    return losses, net


VERBS: dict[str, Callable[[Tensor, nn.Module], object]] = {
    "norms": pergrad.norms,
    "gram": pergrad.gram,
    "backward": pergrad.backward,
    "gradients": lambda losses, net: pergrad.gradients(losses, net).norms(),
    "create_graph": lambda losses, net: pergrad.norms(losses, net, create_graph=True),
}


@DTYPES
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb(dtype: torch.dtype, verb: str, frozen: bool) -> None:
    losses, net = _squeezed(dtype)
    net[1].requires_grad_(not frozen)
    with pytest.raises(pergrad.UnsupportedError, match=ORDER + "memory_format=torch.channels_last"):
        VERBS[verb](losses(lambda h: h), net)
    mended = losses(lambda h: h.contiguous(memory_format=torch.channels_last))
    assert_right(mended, [p for p in net.parameters() if p.requires_grad])


@pytest.mark.parametrize("frozen", [False, True])
def test_in_a_pass_of_the_users(frozen: bool) -> None:
    """Which goes on, whatever is wrong."""
    losses, net = _squeezed(torch.float64)
    net[1].requires_grad_(not frozen)
    values = losses(lambda h: h)
    with pergrad.reading(values, net) as reading:
        values.sum().backward()
    with pytest.raises(pergrad.UnsupportedError, match=ORDER):
        _ = reading.norms
    assert net[0].weight.grad is not None


def test_what_torch_does() -> None:
    """If this fails, torch's backward is right now: `wrong_in_torch` has to ask for versions."""
    losses, net = _squeezed(torch.float64)
    wrong, right = (
        naive.norms(naive.loop_grads(losses(change), net))
        for change in (lambda h: h, lambda h: h.contiguous(memory_format=torch.channels_last))
    )
    assert ((wrong - right).abs() > 0.1 * right).any()


@DTYPES
@pytest.mark.parametrize("which", ["weight", "running_mean", "running_var"])
@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 1), (5, 3, 4, 2)], ids=str)
def test_vectors_in_a_table(dtype: torch.dtype, which: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dims = list(range(1, len(shape)))
    data = torch.randn(shape, dtype=dtype)
    if len(shape) == 4:
        data = data.contiguous(memory_format=torch.channels_last)
    scale = torch.ones(shape[2:], dtype=dtype, requires_grad=True)
    table = {
        name: torch.rand(3, 2, dtype=dtype) + 0.5
        for name in ("weight", "running_mean", "running_var")
    }
    table["weight"].requires_grad_()

    def losses(dense: bool) -> Tensor:
        one = {k: t[:, 0].contiguous() for k, t in table.items()}
        if not dense:
            one[which] = table[which][:, 0]
        out = F.batch_norm(data * scale, one["running_mean"], one["running_var"], one["weight"])
        return out.square().sum(dims)

    params = [scale, table["weight"]]
    plan.clear()
    assert_right(losses(True), params)
    with pytest.raises(pergrad.UnsupportedError, match=VECTOR) as told:
        pergrad.norms(losses(False), params)
    assert f"({which})" in str(told.value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 3, 4, 2), (2, 3, 4, 1), (2, 3, 1, 4), (5, 3), (2, 3, 2, 1, 2)], ids=str
)
def test_neither_too_often_nor_too_seldom(shape: tuple[int, ...], training: bool) -> None:
    """In all orders of the dimensions of input and gradient: said if, and only if, it is wrong."""
    torch.manual_seed(0)
    mean, var, weight = torch.randn(3), torch.rand(3) + 0.5, torch.rand(3) + 0.5
    mean, var, weight = mean.double(), var.double(), weight.double()
    over = [d for d in range(len(shape)) if d != 1]
    column = [1, -1] + [1] * (len(shape) - 2)
    orders = list(itertools.permutations(range(len(shape))))
    orders = orders if len(orders) < 25 else orders[:: len(orders) // 12]
    found = 0
    for one, two in itertools.product(orders, orders):
        x, g = (
            torch.randn([shape[d] for d in order], dtype=torch.float64).permute(
                [order.index(d) for d in range(len(shape))]
            )
            for order in (one, two)
        )
        x.requires_grad_()
        out = F.batch_norm(x, mean.clone(), var.clone(), weight, None, training)
        (got,) = torch.autograd.grad(out, x, g, retain_graph=True)
        m, v = (
            (x.mean(over, keepdim=True), x.var(over, unbiased=False, keepdim=True))
            if training
            else (mean.view(column), var.view(column))
        )
        right = (x - m) / (v + 1e-5).sqrt() * weight.view(column)
        (want,) = torch.autograd.grad(right, x, g)
        told = wrong_in_torch._batch_norm("native_batch_norm", out.grad_fn, g)
        assert (told is not None) == (not torch.allclose(got, want)), (one, two, told)
        found += told is not None
    assert found or len(shape) == 2 or 1 not in shape[1:] + shape[:1]
