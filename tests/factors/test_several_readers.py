"""Several uses of the same data, in one memory or in several: each has its own numbers."""

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agrees, without_kernels
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pergrad
from pergrad.graph import plan
from pergrad.kernels.fused import fused

B, T, W = 3, 12, 64


class Projections(nn.Module):
    """Several projections of one input, as in attention and in gated layers."""

    def __init__(self, readers: int, *, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(W, W)
        self.own = nn.ModuleList(nn.Linear(W, W + 8 * i, bias=bias) for i in range(readers))
        self.last = nn.Linear(sum(W + 8 * i for i in range(readers)), 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return self.last(torch.cat([torch.tanh(layer(y)) for layer in self.own], -1)).sum((1, 2))


@pytest.fixture(autouse=True, params=["kernel", "torch"])
def by_kernel(request, monkeypatch):
    """Both with the compiled kernel and without."""
    plan.clear()
    if request.param == "torch":
        without_kernels(monkeypatch)
    # on a machine without a compiler, which is tested too, both are torch's
    yield fused(torch.device("cpu"), torch.float32) is not None
    plan.clear()


def gram_cost(by_kernel: bool, width: int) -> int:
    """Multiply-adds of the norms of B Grams over T positions, both sides together of a width."""
    return B * T * (T + 16) * width // 2 if by_kernel else B * T * T * width


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("readers", [1, 2, 3])
def test_projections_of_one_input(readers, bias):
    torch.manual_seed(0)
    model = Projections(readers, bias=bias).double()
    x = torch.randn(B, T, W, dtype=torch.float64)
    want = naive.norms(naive.loop_grads(model(x), model))
    assert_agrees(pergrad.norms(model(x), model), want, want)


def test_every_verb_with_a_shared_input():
    torch.manual_seed(0)
    model = Projections(3, bias=True).double()
    x = torch.randn(B, T, W, dtype=torch.float64)
    grads = naive.loop_grads(model(x), model)
    want = naive.norms(grads)
    assert_agrees(pergrad.backward(model(x), model, weights=pergrad.clip(1.0)), want, want)
    assert_agrees(pergrad.gradients(model(x), model).norms(), want, want)
    for name, norms in pergrad.norms_by_parameter(model(x), model).items():
        assert_agrees(norms, grads[name].flatten(1).norm(dim=1), want, what=name)
    assert_agrees(pergrad.norms(model(x), model, create_graph=True), want, want)


def test_a_checkpointed_block():
    torch.manual_seed(0)
    model = Projections(3, bias=False).double()
    x = torch.randn(B, T, W, dtype=torch.float64)
    want = naive.norms(naive.loop_grads(model(x), model))

    def losses() -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    assert_agrees(pergrad.norms(losses(), model), want, want)


def test_other_memory():
    """Under autocast every projection reads a copy of its own; two slices are two inputs."""
    torch.manual_seed(0)
    model = Projections(2, bias=False)
    x = torch.randn(B, T, W)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.tanh(model.first(x)).float()
        losses = sum(layer(y).tanh().float().sum((1, 2)) for layer in model.own)
    grads = naive.loop_grads(losses, model)
    for name, norms in pergrad.norms_by_parameter(losses, model).items():
        want = grads[name].flatten(1).norm(dim=1)
        assert_agrees(norms, want, naive.norms(grads), 1e-2, what=name)

    first, second = nn.Linear(W, W), nn.Linear(W, W)
    table = nn.Parameter(torch.randn(2, B, T, W))
    both = nn.ParameterList([table, *first.parameters(), *second.parameters()])
    x = table * 2
    losses = (first(x[0]).tanh() + second(x[1]).tanh()).sum((1, 2))
    want = naive.norms(naive.loop_grads(losses, both))
    assert_agrees(pergrad.norms(losses, both), want, want, 1e-5)


def test_one_memory_with_other_numbers():
    """Saved tensors that come back changed, each in its own way, always in the same memory."""
    torch.manual_seed(0)
    model = Projections(3, bias=False).double()
    x = torch.randn(B, T, W, dtype=torch.float64)
    room = torch.empty(B * T, W, dtype=torch.float64)

    def losses() -> Tensor:
        packed: list[Tensor] = []

        def pack(saved: Tensor) -> int:
            packed.append(saved.clone())
            return len(packed)

        def unpack(number: int) -> Tensor:
            saved = packed[number - 1]
            return room.copy_(saved).mul_(1 + 0.1 * number) if saved.shape == room.shape else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return model(x)

    want = naive.norms(naive.loop_grads(losses(), model))
    plain = naive.norms(naive.loop_grads(model(x), model))
    assert ((want - plain).abs() > 0.1 * plain).all()
    for _ in range(2):  # plans, and measures; then goes by the plan
        assert_agrees(pergrad.norms(losses(), model), want, want)


def test_grouped_queries_are_formed_where_they_are_narrow(by_kernel):
    """Keys and values are narrow, so they are formed; the query has nobody to share with."""
    long = 512 if by_kernel else 384  # where three like the query would share
    projections = nn.ModuleList(nn.Linear(512, n, bias=False) for n in (512, 64, 64))
    scale = nn.Parameter(torch.ones(512))
    model = nn.ParameterList([scale, *(layer.weight for layer in projections)])

    def losses() -> Tensor:
        y = scale * torch.ones(2, long, 512)
        return sum(layer(y).tanh().sum((1, 2)) for layer in projections)

    rows = pergrad.explain(losses(), model).rows
    assert [row.method for row in rows if row.op == "mm"] == ["direct"] * 3


def test_data_read_in_rows_of_another_length_are_other_data(by_kernel):
    torch.manual_seed(0)
    first, second, third = nn.Linear(W, W), nn.Linear(W, W), nn.Linear(T * W, 5)
    model = nn.ModuleList([first, second, third]).double()
    x = torch.randn(B, T, W, dtype=torch.float64)

    def losses() -> Tensor:
        y = first(x).tanh()
        return second(y).tanh().sum((1, 2)) + third(y.reshape(B, T * W)).tanh().sum(1)

    want = naive.norms(naive.loop_grads(losses(), model))
    assert_agrees(pergrad.norms(losses(), model), want, want)
    costs = {row.parameter: row.cost for row in pergrad.explain(losses(), model).rows}
    assert costs["1.weight"] == gram_cost(by_kernel, 2 * W)


def test_a_reader_that_gets_no_gradient_keeps_nobody_waiting():
    """The losses reach one projection only in the graph's form: its cotangent is dead."""
    torch.manual_seed(0)
    model = Projections(2, bias=False).double()
    x = torch.randn(B, T, W, dtype=torch.float64)

    def losses() -> Tensor:
        y = torch.tanh(model.first(x))
        one, two = (layer(y) for layer in model.own)
        return one.tanh().sum((1, 2)) + F.relu(two * 0).sum((1, 2))

    want = naive.norms(naive.loop_grads(losses(), model))
    assert_agrees(pergrad.norms(losses(), model), want, want)


def test_explain_shows_the_cost(by_kernel):
    model = Projections(3, bias=False)
    table = pergrad.explain(model(torch.randn(B, T, W)), model)
    costs = {row.parameter: row.cost for row in table.rows}
    assert costs["own.0.weight"] == gram_cost(by_kernel, 2 * W)
