"""Losses that depend on each other's examples, by one loop over the losses at the most."""

import warnings
from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import Made, assert_agrees, assert_rows_agree, made
from torch import Tensor, nn

import pergrad

B = 6


def batch_norms() -> Made:
    blocks: list[nn.Module] = []
    for _ in range(3):
        blocks += [nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(50, 3))
    x, y = torch.randn(B, 2, 5, 5), torch.arange(B) % 3
    return lambda: F.cross_entropy(model(x), y, reduction="none"), model


def dense_batch_norms() -> Made:
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 5, bias=False),
        nn.BatchNorm1d(5), nn.Linear(5, 2),
    )  # fmt: skip
    x = torch.randn(B, 4)
    return lambda: model(x).square().sum(1), model


class _Tokens(nn.Module):
    """Two attention layers over 2 sequences of 3 tokens, with tokens' losses."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 12) for _ in range(2))
        self.head = nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            q, k, v = block(x)[:, None].chunk(3, -1)
            scores = (q @ k.mT).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
            x = x + (scores.softmax(-1) @ v)[:, 0]
        return self.head(x)


def tokens() -> Made:
    model, ids = _Tokens(), torch.randint(7, (2, 3))
    return lambda: F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="none"), model


def contrast() -> Made:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(B, 4)

    def losses() -> Tensor:
        z = model(x)
        return F.cross_entropy(z @ z.T, torch.arange(B), reduction="none")

    return losses, model


def sparse_table() -> Made:
    table = nn.Embedding(9, 4, sparse=True)
    model = nn.Sequential(table, nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    ids = torch.arange(B) % 4
    return lambda: model(ids).square().sum(1), model


MODELS = (batch_norms, dense_batch_norms, tokens, contrast, sparse_table)
EACH = pytest.mark.parametrize("make", MODELS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@DTYPES
@EACH
@pytest.mark.parametrize("chunk_bytes", [None, 1, 3000])
def test_every_verb(make: Callable[[], Made], dtype: torch.dtype, chunk_bytes: int | None) -> None:
    losses, model = made(make, dtype)
    G = naive.loop_grads(losses(), model)
    norms = naive.norms(G)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    options: dict[str, Any] = {"on_mixing": "exact", "chunk_bytes": chunk_bytes}
    assert_agrees(pergrad.norms(losses(), model, **options), norms, norms, tolerance)
    found = pergrad.norms_by_parameter(losses(), model, **options)
    total = torch.stack([v.square() for v in found.values()]).sum(0).sqrt()
    assert_agrees(total, norms, norms, tolerance)
    J = pergrad.gradients(losses(), model, **options)
    assert_rows_agree(J.dense(), G, norms=norms, tolerance=tolerance)
    scale = norms[:, None] * norms[None]
    got = pergrad.gram(losses(), model, **options)
    assert_agrees(got, naive.gram(G), scale, tolerance)
    v = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    size = sum(p.numel() for p in model.parameters()) ** 0.5
    got = pergrad.dots(losses(), model, against=v, **options)
    assert_agrees(got, naive.matvec(G, v), norms * size, tolerance)
    got = pergrad.backward(losses(), model, weights=pergrad.clip(0.5), **options)
    assert_agrees(got, norms, norms, tolerance)
    w = (0.5 / norms).clamp(max=1)
    for name, p in model.named_parameters():
        rows = torch.stack([torch.autograd.grad(loss, p, retain_graph=True)[0].to_dense()
                            for loss in losses()])  # fmt: skip
        assert p.grad is not None
        want = torch.einsum("b,b...->...", w.to(rows.dtype), rows)
        assert_agrees(p.grad, want, float(norms.sum()), tolerance, name)


@EACH
def test_no_warning_of_what_was_asked_for(make: Callable[[], Made]) -> None:
    """Least of all one of a missing rule for an op that the user has never heard of."""
    losses, model = made(make)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pergrad.norms(losses(), model, on_mixing="exact")


@EACH
def test_the_price_before_it_is_paid(make: Callable[[], Made]) -> None:
    losses, model = made(make)
    told = str(pergrad.explain(losses(), model))
    if make is tokens:  # three of each sequence: losses of different sequences share a pass
        assert "cost 3 backward passes" in told
    else:
        assert f'with on_mixing="exact" the mixed parameters cost up to {B} ' in told


@EACH
def test_at_most_one_pass_for_each_loss(
    make: Callable[[], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain passes from the losses, and rows of batched ones; and two rows that are compared."""
    losses, model = made(make)
    real, rows = torch.autograd.grad, []

    def counted(outputs: Any, inputs: Any, seeds: Any = None, **more: Any) -> Any:
        grads = real(outputs, inputs, seeds, **more)
        batched = more.get("is_grads_batched")
        rows.append(next(len(g) for g in grads if g is not None) if batched else 1)
        return grads

    monkeypatch.setattr(torch.autograd, "grad", counted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pergrad.norms(losses(), model, on_mixing="exact", check_layout="never")
    # and one for the parameters above
    assert sum(rows) <= B + 3


def test_a_batched_pass_that_is_wrong_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, model = made(dense_batch_norms)
    norms = naive.norms(naive.loop_grads(losses(), model))
    real, batched = torch.autograd.grad, []

    def wrong(*args: Any, **more: Any) -> Any:
        grads = real(*args, **more)
        if more.get("is_grads_batched"):
            batched.append(len(grads))
            return tuple(2 * g for g in grads)
        return grads

    monkeypatch.setattr(torch.autograd, "grad", wrong)
    got = pergrad.norms(losses(), model, on_mixing="exact")
    assert batched
    assert_agrees(got, norms, norms)


@pytest.mark.parametrize(("size", "believed"), [(1e-17, True), (1e-12, False)])
@pytest.mark.parametrize("noisy", ["batched", "plain"])
def test_rounding_is_not_compared(
    size: float, believed: bool, noisy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One parameter holds nothing but noise of this size beside the others, in one of two ways."""
    losses, model = made(dense_batch_norms)
    bias = model[0].bias  # before a batch norm: its gradient is 0
    norms = naive.norms(naive.loop_grads(losses(), model))
    real, batched, plain = torch.autograd.grad, [], []

    def changed(outputs: Any, inputs: Any, seeds: Any = None, **more: Any) -> Any:
        grads = list(real(outputs, inputs, seeds, **more))
        k = next((k for k, p in enumerate(inputs) if p is bias), None)
        many = bool(more.get("is_grads_batched"))
        if k is not None:
            (batched if many else plain).append(len(inputs))
            noise = size * float(norms.max()) if many == (noisy == "batched") else 0.0
            grads[k] = torch.full_like(grads[k], noise)
        return tuple(grads)

    monkeypatch.setattr(torch.autograd, "grad", changed)
    got = pergrad.norms(losses(), model, on_mixing="exact", check_layout="never")
    assert_agrees(got, norms, norms, 1e-9)
    assert len(batched) == 1
    assert (len(plain) == 2) == believed  # else the loop goes on with one loss at a time


@pytest.mark.parametrize("wrong", [1e-3, float("nan"), float("inf")])
def test_a_wrong_value_beside_rounding_is_not_believed(
    wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain way to a bias before a batch norm gives rounding, the batched one more."""
    losses, model = made(dense_batch_norms)
    norms = naive.norms(naive.loop_grads(losses(), model))
    real, batched = torch.autograd.grad, []

    def changed(outputs: Any, inputs: Any, seeds: Any = None, **more: Any) -> Any:
        grads = list(real(outputs, inputs, seeds, **more))
        if more.get("is_grads_batched"):
            batched.append(len(grads))
            k = next(k for k, p in enumerate(inputs) if p is model[0].bias)
            grads[k] = torch.full_like(grads[k], wrong)
        return tuple(grads)

    monkeypatch.setattr(torch.autograd, "grad", changed)
    got = pergrad.norms(losses(), model, on_mixing="exact")
    assert batched
    assert_agrees(got, norms, norms)


def test_users_code_sees_no_batched_tensor() -> None:
    """A hook and a Function are called once for each loss, with that loss's gradient."""
    losses, model = made(dense_batch_norms)
    seen: list[Tensor] = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            seen.append(g.detach().clone())
            return g

    handle = model[3].register_forward_hook(lambda _m, _x, y: Noting.apply(y))
    want = naive.norms(naive.loop_grads(losses(), model))
    expected = list(seen)
    seen.clear()
    got = pergrad.norms(losses(), model, on_mixing="exact", check_layout="never")
    handle.remove()
    assert_agrees(got, want, want)
    for g in expected:
        assert any(torch.allclose(g, other) for other in seen if other.shape == g.shape)


@pytest.mark.parametrize("make", MODELS[:-1])  # torch differentiates no sparse gradient
def test_differentiable(make: Callable[[], Made]) -> None:
    losses, model = made(make)
    params = list(model.parameters())
    got = pergrad.norms(losses(), model, on_mixing="exact", create_graph=True).square().sum()
    rows = [torch.autograd.grad(loss, params, create_graph=True) for loss in losses()]
    want = torch.stack([sum(g.square().sum() for g in row) for row in rows]).sum()
    for mine, theirs in zip(
        torch.autograd.grad(got, params), torch.autograd.grad(want, params), strict=True
    ):
        assert_agrees(mine, theirs, float(theirs.norm() + want.detach()), 1e-9)
