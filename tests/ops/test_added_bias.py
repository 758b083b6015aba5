"""A bias added to what a product returns, in every way to write that."""

from collections.abc import Callable

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, assert_agrees, assert_rows_agree, without_kernels
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pergrad
from pergrad.graph import plan

B, T, W = 4, 6, 16


@pytest.fixture(autouse=True, params=["kernel", "torch"])
def by_kernel(request, monkeypatch):
    """Both with the compiled kernel and without."""
    plan.clear()
    if request.param == "torch":
        without_kernels(monkeypatch)
    yield
    plan.clear()


class Affine(nn.Module):
    """tanh(x) through a weight and a bias, put together as told, between two other layers."""

    def __init__(self, apply: Callable[..., Tensor], *, bias: tuple[int, ...] = (W,)) -> None:
        super().__init__()
        self.first = nn.Linear(W, W, bias=False)
        self.weight = nn.Parameter(torch.randn(W, W) / W**0.5)
        self.bias = nn.Parameter(torch.randn(bias))
        self.last = nn.Linear(W, W, bias=False)
        self.apply_ = apply

    def forward(self, x: Tensor) -> Tensor:
        y = self.apply_(torch.tanh(self.first(x)), self.weight, self.bias)
        return self.last(torch.tanh(y)).flatten(1).square().sum(1)


def losses_and_model(apply: Callable[..., Tensor], *, positions: int = T, **more: object):
    torch.manual_seed(0)
    model = Affine(apply, **more).double()
    x = torch.randn(B, positions, W, dtype=torch.float64)
    return (lambda: model(x)), model


def in_turns(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As attention does for `batch_first=True`: a linear layer over sequence-major data."""
    y = F.linear(x.transpose(0, 1), weight, bias)
    return torch.tanh(y.flatten(0, 1)).view(y.shape).transpose(0, 1)


SHARING = {
    "x @ w + b": lambda x, w, b: x @ w + b,
    "b + x @ w": lambda x, w, b: b + x @ w,
    "linear of a transpose": in_turns,
    "two dimensions": lambda x, w, b: ((x.reshape(-1, W) @ w) + b).reshape(x.shape),
    "in place": lambda x, w, b: (x @ w).add_(b),
}
ALONE = {
    "alpha": lambda x, w, b: torch.add(x @ w, b, alpha=2),
    "product subtracted": lambda x, w, b: b - x @ w,
    "product used twice": lambda x, w, b: (y := x @ w) + b + y.sin(),
    "repeated": lambda x, w, b: (x[:, :1] @ w).expand(x.shape) + b,
    "scaled between": lambda x, w, b: (x @ w) * 2 + b,
    "another shape": lambda x, w, b: ((x @ w).unflatten(-1, (4, 4)) + b.view(4, 4)).flatten(-2),
    "laid out anew": lambda x, w, b: (x.transpose(0, 1) @ w + b).transpose(0, 1),
}


@pytest.mark.parametrize("positions", [1, T])
@pytest.mark.parametrize("name", [*SHARING, *ALONE])
def test_every_number_is_that_of_the_loop(name, positions):
    losses, model = losses_and_model({**SHARING, **ALONE}[name], positions=positions)
    grads = naive.loop_grads(losses(), model)
    want = naive.norms(grads)
    assert_agrees(pergrad.norms(losses(), model), want, want)
    for p, norms in pergrad.norms_by_parameter(losses(), model).items():
        assert_agrees(norms, grads[p].flatten(1).norm(dim=1), want, what=p)
    assert_rows_agree(pergrad.gradients(losses(), model).dense(), grads, norms=want)
    model.zero_grad()
    assert_agrees(pergrad.backward(losses(), model, weights=pergrad.clip(1.0)), want, want)
    sums = naive.weighted_sum(grads, naive.clip_weights(grads, 1.0))
    for p, value in model.named_parameters():
        assert_agrees(value.grad, sums[p], want.sum(), what=p)
    along = {p: torch.ones_like(value) for p, value in model.named_parameters()}
    scale = want * torch.stack([x.norm() for x in along.values()]).norm()
    assert_agrees(pergrad.dots(losses(), model, against=along), naive.matvec(grads, along), scale)
    gram = pergrad.gram(losses(), model)
    assert_agrees(gram, naive.gram(grads), want[:, None] * want)
    again = pergrad.norms(losses(), model, create_graph=True)
    assert_agrees(again, want, want)


@pytest.mark.parametrize("bias", [(1,), (T, W), (B, 1, W), (1, W)])
def test_only_one_number_for_each_column_is_told(bias):
    losses, model = losses_and_model(lambda x, w, b: x @ w + b, bias=bias)
    want = naive.norms(naive.loop_grads(losses(), model))
    assert_agrees(pergrad.norms(losses(), model), want, want)


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_shares(batch_first):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(W, 2, batch_first=batch_first).double()
    with torch.no_grad():
        layer.in_proj_bias.normal_()
    x = torch.randn((B, T, W) if batch_first else (T, B, W), dtype=torch.float64)

    def losses() -> Tensor:
        return layer(x, x, x)[0].square().sum((1, 2) if batch_first else (0, 2))

    grads = naive.loop_grads(losses(), layer)
    for name, norms in pergrad.norms_by_parameter(losses(), layer).items():
        assert_agrees(norms, grads[name].flatten(1).norm(dim=1), naive.norms(grads), what=name)


def test_a_block_recomputed_shares_too():
    losses, model = losses_and_model(SHARING["x @ w + b"])
    want = naive.norms(naive.loop_grads(losses(), model))

    def again() -> Tensor:
        return checkpoint(losses, use_reentrant=False)

    assert_agrees(pergrad.norms(again(), model), want, want)


def test_a_first_layer_shares_too():
    torch.manual_seed(0)
    x = torch.randn(B, T, W, dtype=torch.float64)
    weight = torch.randn(W, W, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(W, dtype=torch.float64, requires_grad=True)
    params = {"weight": weight, "bias": bias}

    def losses() -> Tensor:
        return (x @ weight + bias).tanh().sum((1, 2))

    want = naive.norms(naive.loop_grads(losses(), params))
    assert_agrees(pergrad.norms(losses(), params), want, want)
    alone = {"bias": bias}
    want = naive.norms(naive.loop_grads(losses(), alone))
    assert_agrees(pergrad.norms(losses(), alone), want, want)


HOOKS = {
    "scales": lambda g: 2 * g,
    "turns": lambda g: g.transpose(-1, -2),
    "drops": torch.zeros_like,
    "looks": lambda g: None,
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_between_product_and_bias_counts_for_the_product_alone(name):
    def hooked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = x @ w
        y.register_hook(HOOKS[name])
        return y + b

    losses, model = losses_and_model(hooked, positions=W)  # a square: turned, it is as large
    want = naive.norms(naive.loop_grads(losses(), model))
    assert_agrees(pergrad.norms(losses(), model), want, want)


def test_a_hook_that_writes_over_the_gradient_is_an_error():
    def hooked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = x @ w

        def hook(g: Tensor) -> None:
            g.mul_(2)

        y.register_hook(hook)
        return y + b

    losses, model = losses_and_model(hooked)
    with pytest.raises(pergrad.UsageError, match=r"`weight` .*in place.* change a clone"):
        pergrad.norms(losses(), model)


def test_lower_precision_in_the_product_alone():
    """Under autocast the bias is added in float32 to a product in bfloat16: other cotangents."""
    torch.manual_seed(0)
    model = Affine(SHARING["x @ w + b"])
    x = torch.randn(B, T, W)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(x)
    grads = naive.loop_grads(losses, model)
    want = naive.norms_by_parameter(grads)["bias"]
    got = pergrad.norms_by_parameter(losses, model)["bias"]
    assert_agrees(got, want, want, 1e-2)


def test_explain_names_both():
    losses, model = losses_and_model(SHARING["x @ w + b"])
    rows = {row.parameter: row for row in pergrad.explain(losses(), model).rows}
    assert rows["bias"].op == "add"
    assert rows["weight"].op == "mm"
    assert {rows["bias"].how, rows["weight"].how} == {"rule"}
    report = pergrad.check(losses(), model)
    assert report.max_error < TOLERANCE
