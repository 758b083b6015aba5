"""Losses that share rows of data: one rule call for the cotangents of all parts, op by op."""

from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import Made, assert_agrees, assert_rows_agree, made
from torch import Tensor, nn

import pergrad
from pergrad.engine import run as engine
from pergrad.engine.together import Together
from pergrad.graph import nodes

R, K, T = 4, 3, 5  # rows of data, losses for each, positions
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
EXACT: dict[str, Any] = {"on_mixing": "exact"}


def _of(body: nn.Module, x: Tensor) -> Made:
    return lambda: body(x).flatten(), body


def linear() -> Made:
    return _of(nn.Sequential(nn.Linear(3, 6, bias=False), nn.Tanh(), nn.Linear(6, K)),
               torch.randn(R, 3))  # fmt: skip


class _Positions(nn.Module):
    """Several positions for each row; example-major, or with the positions first."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.a, self.b, self.first = nn.Linear(3, 6), nn.Linear(6, K), first

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))).mean(0 if self.first else 1)


def positions() -> Made:
    return _of(_Positions(first=False), torch.randn(R, T, 3))


def positions_first() -> Made:
    return _of(_Positions(first=True), torch.randn(T, R, 3))


def positions_all_first_outputs_first() -> Made:
    net, x = _Positions(first=True), torch.randn(T, R, 3)
    return lambda: net(x).T.flatten(), net


def _convolutions(*layers: nn.Module, size: int = 8) -> Made:
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(K))
    x = torch.randn(R, 4, size, size)
    net(x)
    return _of(net, x)


def convolutions() -> Made:
    return _convolutions(
        nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.Tanh(), nn.ConvTranspose2d(6, 4, 3, bias=False)
    )


def group_norm() -> Made:
    return _convolutions(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.ReLU())


def batch_norm() -> Made:
    losses, net = _convolutions(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Tanh())
    net.eval()
    return losses, net


class _Norms(nn.Module):
    def __init__(self, *, one_row: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((R, 6)) if one_row else nn.LayerNorm(6)
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x))))


def layer_norm() -> Made:
    return _of(_Norms(one_row=False), torch.randn(R, 3))


def layer_norm_over_everything() -> Made:
    return _of(_Norms(one_row=True), torch.randn(R, 3))


class _Table(nn.Module):
    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.table, self.b = nn.Embedding(7, 6, **more), nn.Linear(6, K)

    def forward(self, ids: Tensor) -> Tensor:
        return self.b(torch.tanh(self.table(ids)).mean(1))


def table() -> Made:
    return _of(_Table(padding_idx=2), torch.randint(7, (R, T)))


def table_by_frequency() -> Made:
    return _of(_Table(scale_grad_by_freq=True), torch.randint(3, (R, T)))


class _Added(nn.Module):
    """What is added: the same for all rows, one for each row, by column; and a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, K)
        self.same, self.each = nn.Parameter(torch.randn(1, 6)), nn.Parameter(torch.randn(R, 6))
        self.column, self.scale = nn.Parameter(torch.randn(R, 1)), nn.Parameter(torch.randn(6))
        self.number = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.a(x) + self.same) - self.each + self.column
        return self.b(z * self.scale + self.number)


def added() -> Made:
    return _of(_Added(), torch.randn(R, 3))


class _BiasByRow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.bias = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(R, 6))
        self.b = nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(torch.addmm(self.bias, x, self.w)))


def bias_by_row() -> Made:
    return _of(_BiasByRow(), torch.randn(R, 3))


class _WeightOnTheLeft(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 3)), nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.w @ x).T)


def weight_on_the_left() -> Made:
    return _of(_WeightOnTheLeft(), torch.randn(3, R))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


def tied() -> Made:
    return _of(_Tied(), torch.randn(R, 6))


def fallback() -> Made:
    """A layer without a rule."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Bilinear(4, 4, 6), nn.Tanh(), nn.Linear(6, K))
    x = torch.randn(R, 3)
    return lambda: net[3](net[2](net[1](net[0](x), net[0](x)))).flatten(), net


def recurrent() -> Made:
    cells, head = nn.GRU(3, 5, batch_first=True), nn.Linear(5, K)
    x = torch.randn(R, T, 3)
    return lambda: head(cells(x)[0][:, -1]).flatten(), nn.ModuleList([cells, head])


def the_parameter_itself() -> Made:
    """A weight whose own gradient lies apart by row."""
    w, head, x = nn.Parameter(torch.randn(R, 6)), nn.Linear(6, K), torch.randn(R, 6)
    return lambda: head(torch.tanh(w * x)).flatten(), nn.ParameterList([w, *head.parameters()])


MODELS = (
    linear, positions, positions_first, positions_all_first_outputs_first, convolutions, group_norm,
    batch_norm, layer_norm, layer_norm_over_everything, table, table_by_frequency, added,
    bias_by_row, weight_on_the_left, tied, fallback, recurrent, the_parameter_itself,
)  # fmt: skip
EACH = pytest.mark.parametrize("make", MODELS)


@DTYPES
@EACH
@pytest.mark.filterwarnings("ignore::pergrad.FallbackWarning")
def test_against_the_loop(make: Callable[[], Made], dtype: torch.dtype) -> None:
    losses, model = made(make, dtype)
    G = naive.loop_grads(losses(), model)
    norms = naive.norms(G)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for _ in range(2):  # found, and remembered
        assert_agrees(pergrad.norms(losses(), model, **EXACT), norms, norms, tolerance)
    J = pergrad.gradients(losses(), model, **EXACT)
    assert_rows_agree(J.dense(), G, norms=norms, tolerance=tolerance)
    # room for the cotangents of few parts
    got = pergrad.norms(losses(), model, chunk_bytes=5000, **EXACT)
    assert_agrees(got, norms, norms, tolerance)
    weights = torch.linspace(-1, 1, R * K, dtype=dtype)
    pergrad.backward(losses(), model, weights=weights, **EXACT)
    for name, p in model.named_parameters():
        want = torch.einsum("b,b...->...", weights.double(), G[name])
        assert p.grad is not None
        assert_agrees(p.grad, want, float(norms.sum()), tolerance, name)


@pytest.mark.parametrize("make", [linear, convolutions, table])
def test_one_serving_for_all_parts(
    make: Callable[[], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = Together.serve

    def counted(self: Together, use: Any, cotangents: Any) -> None:
        seen.append(len(self.of))
        real(self, use, cotangents)

    monkeypatch.setattr(Together, "serve", counted)
    losses, model = made(make)
    pergrad.norms(losses(), model, **EXACT)
    assert set(seen) == {K}
    assert engine.Together is Together


@pytest.mark.filterwarnings("ignore::pergrad.FallbackWarning")
def test_a_row_that_is_not_a_number_is_alone_with_it() -> None:
    _, model = made(linear)
    x = torch.randn(R, 3, dtype=next(model.parameters()).dtype)
    x[1, 0] = torch.nan
    got = pergrad.norms(model(x).flatten(), model, **EXACT).view(R, K)
    want = naive.norms(naive.loop_grads(model(x.nan_to_num()).flatten(), model)).view(R, K)
    assert got[1].isnan().all()
    others = torch.arange(R) != 1
    assert_agrees(got[others], want[others], want[others], 1e-4)


def test_a_graph_that_looks_the_same_with_other_indices() -> None:
    """Rows in another order: what was remembered of the parts is for their graphs alone."""
    body, head, x = nn.Linear(3, 6), nn.Linear(6, K), torch.randn(R, 3)
    model = nn.ModuleList([body, head])
    for seed in range(6):
        order = torch.randint(R, (R,), generator=torch.Generator().manual_seed(seed))

        def losses(order: Tensor = order) -> Tensor:
            return head(torch.tanh(body(x))[order]).flatten()

        want = naive.norms(naive.loop_grads(losses(), model))
        assert_agrees(pergrad.norms(losses(), model, **EXACT), want, want, 1e-4)


def test_nothing_is_kept_of_the_graph() -> None:
    losses, model = made(linear)
    for _ in range(2):
        before = losses()
        node = nodes.get_gradient_edge(before).node
        pergrad.norms(before, model, **EXACT)
        with pytest.raises(RuntimeError, match="second time"):
            before.sum().backward()
        del before, node


def test_cut_where_checkpointed() -> None:
    """What a block computes again is good for one pass."""
    from torch.utils.checkpoint import checkpoint

    body = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
    head, x = nn.Linear(6, K), torch.randn(R, 3)
    model = nn.ModuleList([body, head])

    def losses() -> Tensor:
        return head(checkpoint(body, x, use_reentrant=False)).flatten()

    want = naive.norms(naive.loop_grads(head(body(x)).flatten(), model))
    for _ in range(2):
        assert_agrees(pergrad.norms(losses(), model, **EXACT), want, want, 1e-4)


def test_heads_of_which_a_part_uses_one() -> None:
    body, heads = nn.Linear(3, 6), nn.ModuleList(nn.Linear(6, 5) for _ in range(K))
    model, x, y = nn.ModuleList([body, heads]), torch.randn(R, 3), torch.arange(R)

    def losses() -> Tensor:
        z = torch.tanh(body(x))
        each = [F.cross_entropy(head(z), y, reduction="none") for head in heads]
        return torch.stack(each, 1).flatten()

    G = naive.loop_grads(losses(), model)
    J = pergrad.gradients(losses(), model, **EXACT)
    assert_rows_agree(J.dense(), G, norms=naive.norms(G), tolerance=1e-4)
