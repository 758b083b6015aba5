"""Several losses for each row of data, by a pass for each part of them in which no two meet."""

import warnings
from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import Made, assert_agrees, assert_rows_agree, made
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pergrad
from pergrad.engine import run as engine
from pergrad.graph import nodes

R, K = 4, 3  # rows of data, and losses for each


def _images() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, K),
    )  # fmt: skip
    return net, torch.randn(R, 1, 8, 8)


def outputs() -> Made:
    """A Jacobian's rows."""
    net, x = _images()
    return lambda: net(x).flatten(), net


def outputs_first() -> Made:
    """The same, all rows' first output first."""
    net, x = _images()
    return lambda: net(x).T.flatten(), net


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(6, 5) for _ in range(K))

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.body(x)
        return [head(z) for head in self.heads]


def heads() -> Made:
    net, x, y = _Heads(), torch.randn(R, 3), torch.arange(R)
    return lambda: torch.stack(
        [F.cross_entropy(z, y, reduction="none") for z in net(x)], 1
    ).flatten(), net


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(2))
        self.blocks = nn.ModuleList(nn.Linear(6, 18) for _ in range(2))
        self.head = nn.Linear(6, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            q, k, v = block(norm(x)).chunk(3, -1)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x)


def tokens() -> Made:
    """A loss for each of 3 tokens of 4 sequences."""
    net, ids = _Tokens(), torch.randint(7, (R, K))
    return lambda: F.cross_entropy(net(ids).flatten(0, 1), ids.flatten(), reduction="none"), net


MODELS = (outputs, outputs_first, heads, tokens)
EACH = pytest.mark.parametrize("make", MODELS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
EXACT: dict[str, Any] = {"on_mixing": "exact"}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many losses every backward pass from the losses, or row of a batched one, was for."""
    real, one_pass, seen = torch.autograd.grad, nodes.gradients, []

    def counted(outputs: Any, inputs: Any, seeds: Any = None, **more: Any) -> Any:
        seen.extend([1] * len(seeds) if more.get("is_grads_batched") else [1])
        return real(outputs, inputs, seeds, **more)

    def counted_pass(*args: Any, **more: Any) -> Any:
        seen.append(1)
        return one_pass(*args, **more)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    monkeypatch.setattr(nodes, "gradients", counted_pass)
    return seen


@DTYPES
@EACH
def test_every_verb(make: Callable[[], Made], dtype: torch.dtype) -> None:
    losses, model = made(make, dtype)
    G = naive.loop_grads(losses(), model)
    norms = naive.norms(G)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert_agrees(pergrad.norms(losses(), model, **EXACT), norms, norms, tolerance)
    J = pergrad.gradients(losses(), model, **EXACT)
    assert_rows_agree(J.dense(), G, norms=norms, tolerance=tolerance)
    assert_agrees(J.norms(), norms, norms, tolerance)
    order = torch.tensor([7, 0, 3, 3])
    assert_agrees(J[order].norms(), norms[order], norms[order], tolerance)
    scale = norms[:, None] * norms[None]
    want = naive.gram(G)
    assert_agrees(pergrad.gram(losses(), model, **EXACT), want, scale, tolerance)
    assert_agrees(J @ J.T, want, scale, tolerance)
    got = pergrad.dots(losses(), model, against=J, **EXACT)
    assert_agrees(got, want, scale, tolerance)
    v = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    size = sum(p.numel() for p in model.parameters()) ** 0.5
    got = pergrad.dots(losses(), model, against=v, **EXACT)
    assert_agrees(got, naive.matvec(G, v), norms * size, tolerance)
    moments = pergrad.second_moments(losses(), model, **EXACT)
    got = pergrad.backward(losses(), model, weights=pergrad.clip(0.5), **EXACT)
    assert_agrees(got, norms, norms, tolerance)
    w = (0.5 / norms).clamp(max=1)
    for name, p in model.named_parameters():
        assert p.grad is not None
        want = torch.einsum("b,b...->...", w, G[name])
        assert_agrees(p.grad, want, float(norms.sum()), tolerance, name)
        squares = G[name].square().sum(0)
        assert_agrees(moments[name], squares, float(norms.square().sum()), tolerance, name)


@EACH
def test_one_pass_for_each_loss_of_a_row(make: Callable[[], Made], passes: list[int]) -> None:
    losses, model = made(make)
    pergrad.norms(losses(), model, **EXACT)  # layouts are measured, and the parts found
    passes.clear()
    pergrad.norms(losses(), model, check_layout="once", **EXACT)
    assert len(passes) == K


@EACH
def test_no_warning_of_what_was_asked_for(make: Callable[[], Made]) -> None:
    losses, model = made(make)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pergrad.norms(losses(), model, **EXACT)


def test_a_warning_of_what_was_not() -> None:
    """It names the first place where losses meet, the price and how to do without."""
    losses, model = made(outputs)
    want = naive.norms(naive.loop_grads(losses(), model))
    told = r"3 losses depend on each row(.|\n)*`addmm` of module `6`(.|\n)*3 backward passes"
    with pytest.warns(
        pergrad.FallbackWarning, match=rf"{told}(.|\n)*`losses\.view\(4, 3\)\.sum\(1\)`"
    ) as caught:
        got = pergrad.norms(losses(), model)
    assert len(caught) == 1
    assert_agrees(got, want, want)
    losses, model = made(outputs_first)
    with pytest.warns(pergrad.FallbackWarning, match=r"`losses\.view\(3, 4\)\.sum\(0\)`"):
        pergrad.norms(losses(), model)


@pytest.mark.parametrize("make", [heads, tokens])
def test_the_refusal_names_the_price(make: Callable[[], Made]) -> None:
    losses, model = made(make)
    told = r"`losses\.view\(4, 3\)\.sum\(1\)`(.|\n)*on_mixing=\"exact\"(.|\n)*3 backward passes"
    with pytest.raises(pergrad.MixedExamplesError, match=told):
        pergrad.norms(losses(), model)


@EACH
def test_explain_names_the_price_and_what_to_do(make: Callable[[], Made]) -> None:
    losses, model = made(make)
    summed = "losses.view(3, 4).sum(0)" if make is outputs_first else "losses.view(4, 3).sum(1)"
    table = pergrad.explain(losses(), model)
    assert f"`{summed}`" in table.price
    assert "3 backward passes" in table.price
    assert str(table).endswith(table.price)
    assert ("on_mixing" in table.price) == (make in (heads, tokens))
    reduced = eval(summed, {"losses": losses()})
    assert not pergrad.explain(reduced, model).price


def test_explain_names_the_price_of_the_loop() -> None:
    """Where a hook wants to see each loss's gradient alone."""
    losses, model = made(outputs)
    model[0].weight.register_hook(lambda g: None)
    assert "one backward pass for each loss: 12 passes" in pergrad.explain(losses(), model).price


@EACH
def test_a_hook_is_called_once_for_each_loss(make: Callable[[], Made], passes: list[int]) -> None:
    """Never with the gradient of several: there are no parts, and one loop for all parameters."""
    losses, model = made(make)
    p = next(model.parameters())
    seen: list[Tensor] = []
    p.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    want = naive.norms(naive.loop_grads(losses(), model))
    seen.clear()
    passes.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = pergrad.norms(losses(), model, check_layout="never", **EXACT)
    assert_agrees(got, want, want)
    assert len(seen) == R * K
    assert len(passes) <= R * K + 1  # and one for the parameters above


def test_no_part_in_which_losses_meet() -> None:
    """Rows that a batch norm joins: no size is believed because it fits."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, K)).double()
    x = torch.randn(R, 3, dtype=torch.float64)
    losses = lambda: net(x).flatten()  # noqa: E731
    want = naive.norms(naive.loop_grads(losses(), net))
    for options in (EXACT, {}):
        assert_agrees(pergrad.norms(losses(), net, **options), want, want)


@pytest.mark.parametrize("size", [2, 6])
def test_weights_that_are_functions_of_parameters(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loss meets in them, and no data: one pass serves all, and nothing is said."""
    torch.manual_seed(1)
    net = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(3, size)), nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(size, size)), nn.Tanh(), nn.Linear(size, 3),
    ).double()  # fmt: skip
    x = torch.randn(2 * size, 3, dtype=torch.float64)
    twice = {name: 2 * p for name, p in net.named_parameters()}
    for forward in (
        lambda: net(x).sum(1),
        lambda: torch.func.functional_call(net, twice, (x,)).sum(1),
    ):
        losses = forward()
        want = naive.norms(naive.loop_grads(losses, net))
        for other in ("loop", "_by_parts"):
            monkeypatch.setattr(engine, other, None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_agrees(pergrad.norms(losses, net, retain_graph=True), want, want)
            assert not pergrad.explain(losses, net).price


def test_parts_of_another_batch_are_looked_at_again() -> None:
    """What was found for one form of graph is a guess: rows may be joined by what indices say."""
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, K))
    net.double()
    x = torch.randn(R, 3, dtype=torch.float64)
    for order in ([0, 1, 2, 3], [0, 0, 2, 3], [1, 1, 1, 1]):
        rows = torch.tensor(order)
        losses = lambda rows=rows: net(x)[rows].flatten()  # noqa: E731
        want = naive.norms(naive.loop_grads(losses(), net))
        assert_agrees(pergrad.norms(losses(), net, **EXACT), want, want)


def test_parts_of_two(passes: list[int]) -> None:
    """They take less time than a loop that takes many losses at once."""
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, K))
    x = torch.randn(2, 3)
    want = naive.norms(naive.loop_grads(net(x).flatten(), net))
    pergrad.norms(net(x).flatten(), net, **EXACT)
    passes.clear()
    assert_agrees(pergrad.norms(net(x).flatten(), net, **EXACT), want, want, 1e-4)
    assert len(passes) == K


@EACH
def test_differentiable(make: Callable[[], Made]) -> None:
    losses, model = made(make)
    params = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        got = pergrad.norms(losses(), model, create_graph=True, **EXACT).square().sum()
        rows = [torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
                for loss in losses()]  # fmt: skip
    want = torch.stack([g.square().sum() for row in rows for g in row if g is not None]).sum()
    mine = torch.autograd.grad(got, params, allow_unused=True)
    theirs = torch.autograd.grad(want, params, allow_unused=True)
    for p, one, other in zip(params, mine, theirs, strict=True):
        one, other = (torch.zeros_like(p) if g is None else g for g in (one, other))
        assert_agrees(one, other, float(other.norm() + want.detach()), 1e-9)


def test_the_graph_is_kept_on_request_only() -> None:
    losses, model = made(outputs)
    values = losses()
    first = pergrad.norms(values, model, retain_graph=True, **EXACT)
    assert torch.equal(pergrad.norms(values, model, **EXACT), first)
    with pytest.raises(RuntimeError, match=r"freed"):
        torch.autograd.grad(values.sum(), list(model.parameters()))
