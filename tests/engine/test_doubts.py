"""Norms that a Gram leaves in doubt: looked at once the device has come so far, and never left out.

On a CPU nothing is postponed; here everything is, as for a GPU.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from unittest import mock

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, assert_agrees, assert_rows_agree, only, without_kernels
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pergrad
from pergrad.engine import late_norms as doubts
from pergrad.engine import run as engine
from pergrad.engine.late_norms import Doubts
from pergrad.factors import Correlation, Outer, Rows
from pergrad.factors.guard import held_against
from pergrad.factors.rows import factor as rows
from pergrad.factors.workspace import limit, workspace
from pergrad.graph import nodes, plan

B, T, W = 4, 24, 16


@pytest.fixture(autouse=True)
def as_for_a_gpu(monkeypatch):
    plan.clear()
    without_kernels(monkeypatch)
    for module in (doubts, rows):
        monkeypatch.setattr(module, "reading_waits", lambda device: True)
    yield
    plan.clear()


@pytest.fixture
def grams():
    """Every norm is taken by a Gram."""
    with only("gram"):
        yield


class Cancelling(nn.Module):
    """Linear layers and a convolution; examples whose gradients nearly cancel over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(W, W)
        self.convolved = nn.Conv1d(W, W, 3)
        self.last = nn.Linear(W, 3)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        y = self.convolved(torch.tanh(self.first(x)).mT).mT
        return (self.last(torch.tanh(y)) * weights).sum((1, 2))


def cancelling(some: bool = True) -> tuple[Callable[[], Tensor], nn.Module]:
    """Of the four examples the second and the fourth have κ of a hundred thousand or so."""
    torch.manual_seed(0)
    model = Cancelling().double()
    x = torch.randn(B, T, W, dtype=torch.float64)
    signs = torch.randn(B, T - 2, 3, dtype=torch.float64)
    if some:
        # one input at all positions, and weights that add up to next to nothing
        x[1::2] = x[1::2, :1]
        signs[1::2] -= signs[1::2].mean(1, keepdim=True) - 1e-5
    return (lambda: model(x, signs)), model


@contextmanager
def corrections() -> Iterator[list[int]]:
    """How many examples are taken again, each time that some are."""
    found: list[int] = []
    copy = Tensor.index_copy

    def counted(self: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
        found.append(len(index))
        return copy(self, dim, index, source)

    with mock.patch.object(Tensor, "index_copy", counted):
        yield found


@pytest.mark.usefixtures("grams")
@pytest.mark.parametrize("chunk_bytes", [None, 1])
def test_doubtful_examples_are_taken_again(chunk_bytes):
    losses, model = cancelling()
    judged = naive.loop_grads(losses(), model)
    want = naive.norms(judged)
    with corrections() as corrected:
        got = pergrad.norms(losses(), model, chunk_bytes=chunk_bytes)
    # three weights and one bias; those of the other two are plain sums
    assert corrected == [2] * 4
    assert_agrees(got, want, want)
    by_parameter = pergrad.norms_by_parameter(losses(), model, chunk_bytes=chunk_bytes)
    for name, found in by_parameter.items():
        exact = naive.norms({name: judged[name]})
        assert_agrees(found, exact, want, what=name)
    J = pergrad.gradients(losses(), model)
    assert_agrees(J.norms(), want, want)
    for name, found in J.norms_by_parameter().items():
        assert_agrees(found, by_parameter[name], want, what=name)


@pytest.mark.usefixtures("grams")
def test_backward_weighs_by_the_norms_that_were_taken_again():
    losses, model = cancelling()
    judged = naive.loop_grads(losses(), model)
    want = naive.norms(judged)
    weights = pergrad.clip(0.1)(want)
    got = pergrad.backward(losses(), model, weights=pergrad.clip(0.1))
    assert_agrees(got, want, want)
    for name, p in model.named_parameters():
        total = torch.tensordot(weights, judged[name], 1)
        assert_agrees(p.grad, total, 0.1 * B, what=name)


@pytest.mark.usefixtures("grams")
def test_where_nobody_is_in_doubt_nothing_is_taken_again():
    losses, model = cancelling(some=False)
    want = naive.norms(naive.loop_grads(losses(), model))
    with corrections() as corrected:
        assert_agrees(pergrad.norms(losses(), model), want, want)
    assert not corrected


@pytest.mark.usefixtures("grams")
def test_norms_can_be_differentiated():
    losses, model = cancelling()
    judged = naive.live_rows(losses(), model).square().sum(1).sqrt()
    params = list(model.parameters())[:-1]  # the last bias moves no gradient
    want = torch.autograd.grad(judged[::2].sum(), params)
    live = pergrad.norms(losses(), model, create_graph=True)
    got = torch.autograd.grad(live[::2].sum(), params)
    for one, other in zip(got, want, strict=True):
        assert_agrees(one, other, float(other.norm()))


@pytest.mark.usefixtures("grams")
@pytest.mark.parametrize("some", [True, False])
def test_what_is_taken_again_must_not_have_been_overwritten(some):
    """A hook that looks on, and writes into a gradient that torch's pass is done with."""
    losses, model = cancelling(some)
    seen = []

    def watch(grads: tuple[Tensor, ...]) -> None:
        seen.extend(grads)

    def spoil(grads: tuple[Tensor, ...]) -> None:
        for one in seen:
            one.mul_(2)

    vector = losses()
    above_the_convolution(vector, watch, spoil)
    if some:
        with pytest.raises(pergrad.UsageError, match="Return a new tensor from that hook"):
            pergrad.norms(vector, model)
    else:
        want = naive.norms(naive.loop_grads(losses(), model))
        assert_agrees(pergrad.norms(vector, model), want, want)


def test_what_hooks_that_may_change_a_gradient_write_to_is_their_own():
    """They are given each example's gradient in memory that nobody reads later."""
    losses, model = cancelling(True)
    seen: list[Tensor] = []
    vector = losses()
    above_the_convolution(
        vector,
        lambda grads: seen.extend(grads),
        lambda _: [one.mul_(2) for one in seen][:0] or None,
    )
    want = naive.norms(naive.loop_grads(losses(), model))
    assert_agrees(pergrad.norms(vector, model), want, want)
    assert len(seen) == B


def above_the_convolution(losses: Tensor, first: Callable, second: Callable) -> None:
    """Two hooks on nodes: of the last layer's bias, and of the convolution further down."""
    last = losses.grad_fn.next_functions[0][0].next_functions[0][0]
    last.register_prehook(first)
    hidden = losses.grad_fn
    while hidden.name() != "ConvolutionBackward0":
        hidden = next(child for child, _ in hidden.next_functions if child is not None)
    hidden.register_prehook(second)


def test_little_is_held_for_later():
    """The oldest are looked at as soon as all together take more than the budget."""
    generator = torch.Generator().manual_seed(0)
    waiting = Doubts()
    factors = [
        Outer(*torch.randn(2, 3, 8, 4, generator=generator, dtype=torch.float64)) for _ in range(6)
    ]
    one = sum(t.numel() * t.element_size() for t in factors[0].tensors())
    got = [torch.zeros(3, dtype=torch.float64) for _ in factors]
    with only("gram"), workspace(2 * one):
        for i, factor in enumerate(factors):
            waiting.sq_norms(f"{i}", factor, got[i].add_)
            assert waiting.held == min(i + 1, 2) * one
        waiting.settle()
    assert waiting.held == 0
    for found, factor in zip(got, factors, strict=True):
        want = factor.dense().square().sum((1, 2))
        assert_agrees(found, want, want)


def test_what_is_not_a_number_stays_so():
    g, a = torch.ones(2, 3, 4, 5)
    a[1] = math.nan
    factor, total = Outer(g, a), torch.zeros(3)
    factor.g[2] = 1e30
    with only("gram"):
        waiting = Doubts()
        waiting.sq_norms("weight", factor, total.add_)
        assert total.tolist() == [400.0, 0.0, math.inf]
        waiting.settle()
    assert total[0] == 400
    assert total[1].isnan()
    assert total[2] == math.inf


@pytest.mark.parametrize("method", ["gram", "shift"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [None, 1, 2000])
def test_a_convolution_in_doubt(method, dtype, budget):
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(6, 4, 5, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(6, 4, 7, 7, generator=generator, dtype=torch.float64)
    g[1::2] -= g[1::2].mean((2, 3), keepdim=True) - 1e-4
    x[1::2] = x[1::2, :, :1, :1]
    one = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 2}
    factor = Correlation(g.to(dtype), x.to(dtype), kernel=(3, 3), **one)
    total, added, waiting = torch.zeros(6, dtype=factor.dtype), [], Doubts()

    def add(squares: Tensor) -> None:
        added.append(squares)
        total.add_(squares)

    with (
        workspace(budget),
        only(method),
    ):
        waiting.sq_norms("weight", factor, add)
        waiting.settle()
    want = factor.to(dtype=torch.float64).dense().square().flatten(1).sum(1)
    # the direct form itself loses digits of what nearly cancels
    assert_agrees(total, want, want, 1e-9 if dtype == torch.float64 else 1e-2)
    assert len(added) == 2


def test_norms_come_with_their_doubts():
    values, sizes = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1e9])
    norms = held_against(values, sizes, lambda rows: torch.full((len(rows),), 7.0))
    assert norms.values.masked_fill(norms.doubtful, 0).tolist() == [1.0, 0.0]
    assert norms.again(norms.doubtful.nonzero()[:, 0]).tolist() == [7.0]
    assert norms.settled().tolist() == [1.0, 7.0]
    assert held_against(values, None, norms.again).settled() is values


@pytest.mark.parametrize("shape", [(9, 5), (9,), (9, 2, 3), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [None, 1])
def test_rows_without_reading_a_number(shape, dtype, budget):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, shape[0], (6, 7), generator=generator)
    ids[0] = -1
    g = torch.randn(6, 7, *shape[1:], generator=generator).to(dtype)
    g[ids < 0] = math.nan  # padding adds nothing, whatever it is
    c = torch.randn(6, generator=generator)
    factor = Rows(ids, g, shape)
    with workspace(budget), Reads() as reads:
        got, summed = factor.sq_norms(), factor.weighted_sum(c)
    assert not reads.found
    dense = factor.dense().double()
    want = dense.flatten(1).square().sum(1)
    assert_agrees(got, want, want.clamp_min(1), 1e-5)
    assert_agrees(summed, torch.tensordot(c.double(), dense, 1), want.sum().sqrt() + 1, 1e-5)
    with workspace(budget):
        assert Rows(ids[:0], g[:0], shape).sq_norms().shape == (0,)


class Reads(TorchDispatchMode):
    """Ops whose result's value or size the CPU must know."""

    NAMES = frozenset({
        "_local_scalar_dense", "nonzero", "equal", "masked_select", "bincount", "_unique2",
        "unique_consecutive", "unique_dim", "repeat_interleave",
    })  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        masks = args[1] if name.strip("_").startswith("index") and len(args) > 1 else ()
        by_mask = isinstance(masks, (list, tuple)) and any(
            isinstance(t, Tensor) and t.dtype == torch.bool for t in masks
        )
        if name in self.NAMES or by_mask:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3))).square().sum(1)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, W)
        self.position = nn.Parameter(torch.randn(T, W))
        self.block = nn.TransformerEncoderLayer(W, 2, 32, 0.0, batch_first=True)
        self.head = nn.Linear(W, 11)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.block(self.embedding(ids) + self.position))
        return F.cross_entropy(logits.mT, ids, reduction="none").sum(1)


class Sliced(nn.Module):
    """A part of a parameter is used, and another one in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(3 * W, W))
        self.heads = nn.Parameter(torch.randn(4, W, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(F.linear(x, self.wide[W : 2 * W]))
        return torch.einsum("btw,hwd->bthd", y, self.heads).square().sum((1, 2, 3))


MODELS = {
    "sliced": (Sliced, lambda: torch.randn(B, T, W, dtype=torch.float64)),
    "convolutional": (Convolutional, lambda: torch.randn(B, 3, 8, 8, dtype=torch.float64)),
    "tokens": (Tokens, lambda: torch.randint(0, 11, (B, T))),
}


@pytest.mark.usefixtures("grams")
@pytest.mark.parametrize("verb", ["norms", "norms_by_parameter", "backward"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_pass_reads_nothing_but_whether_there_is_doubt(kind, verb):
    """And that once it is over, or as much is held as may be."""
    make, draw = MODELS[kind]
    torch.manual_seed(0)
    model, x = make().double(), draw()
    call = getattr(pergrad, verb)
    call(model(x), model)  # finds the plan
    losses = model(x)
    during: list[int] = []
    settle = Doubts.settle

    def settled(self: Doubts) -> None:
        during.append(sum(reads.found.values()))
        assert self.held > 0  # something waits
        assert not torch.is_grad_enabled()
        settle(self)

    with Reads() as reads, mock.patch.object(Doubts, "settle", settled):
        call(losses, model)
    assert during == [0]
    assert set(reads.found) == {"_local_scalar_dense"}


@pytest.mark.usefixtures("grams")
def test_a_thread_of_torchs_knows_the_callers_budget():
    """For a GPU, torch calls hooks in a thread of its own."""
    losses, model = cancelling(some=False)
    found: list[tuple[int, int]] = []
    gradients = nodes.gradients

    def elsewhere(*args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(gradients, *args, **kwargs).result()

    def emit(name: str, factor: object) -> None:
        found.append((threading.get_ident(), limit()))

    with workspace(12345), mock.patch.object(nodes, "gradients", elsewhere):
        engine.run(losses(), dict(model.named_parameters()), engine.Options(), emit)
    assert {budget for _, budget in found} == {12345}
    assert len({ident for ident, _ in found}) == 2  # what is served on the way, and afterwards


def test_uses_are_served_one_at_a_time():
    """Each GPU has a thread of its own in torch, and both come by."""
    losses, model = cancelling(some=False)
    hooks: list[Callable[..., None]] = []
    inside: list[str] = []
    most = []

    class Node:
        def __init__(self, node: Any) -> None:
            self.node = node

        def register_prehook(self, hook: Callable[..., None]) -> Any:
            hooks.append(hook)
            return self.node.register_prehook(lambda grads: None)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.node, name)

    def serve(self: Any, use: Any, cotangents: Any) -> None:
        inside.append(use.op)
        most.append(len(inside))
        time.sleep(0.02)
        inside.remove(use.op)

    def gradients(losses: Tensor, graph: Any, wanted: Any, *, number: list[int], **_: Any) -> Any:
        number.append(7)
        with ThreadPoolExecutor(len(hooks)) as pool:
            list(pool.map(lambda hook: hook((None,)), hooks))
        return (None,) * len(wanted)

    def planned(graph: Any, *args: Any) -> Any:
        found = plan.plan_of(graph, *args)
        graph.nodes[:] = map(Node, graph.nodes)
        return found

    with (
        mock.patch.object(engine, "plan_of", planned),
        mock.patch.object(engine, "_gradients", gradients),
        mock.patch.object(engine.Pass, "serve", serve),
        mock.patch.object(engine.Pass, "check_complete", return_value=None),
        mock.patch.object(engine.nodes, "pass_number", return_value=7),
    ):
        engine.run(losses(), dict(model.named_parameters()), engine.Options(), lambda *_: None)
    assert len(hooks) >= 2
    assert set(most) == {1}


def test_what_a_users_hook_sets_is_seen_by_the_user():
    losses, model = cancelling(some=False)
    seen: ContextVar[int] = ContextVar("seen", default=0)

    def count(grad: Tensor) -> None:
        seen.set(seen.get() + 1)

    model.last.weight.register_hook(count)
    pergrad.norms(losses(), model)
    assert seen.get() == B


def test_an_id_beyond_the_table_is_no_number_and_no_neighbours():
    ids = torch.tensor([[4, 0], [0, 1]])
    got = Rows(ids, torch.ones(2, 2, 3), (4, 3)).sq_norms()
    assert got[0].isnan()
    assert got[1] == 6
    empty = Rows(torch.full((2, 2), -1), torch.ones(2, 2, 3), (0, 3))
    assert empty.sq_norms().tolist() == [0, 0]
    assert empty.weighted_sum(torch.ones(2)).shape == (0, 3)
    infinite = Rows(torch.tensor([[-1, 1]]), torch.ones(1, 2, 3), (2, 3))
    assert infinite.weighted_sum(torch.tensor([math.inf])).tolist() == [[0.0] * 3, [math.inf] * 3]


def test_norms_and_rows_are_those_of_the_judge():
    """The models of this file, by every verb that takes norms."""
    for make, draw in MODELS.values():
        torch.manual_seed(0)
        model, x = make().double(), draw()
        judged = naive.loop_grads(model(x), model)
        want = naive.norms(judged)
        assert_agrees(pergrad.norms(model(x), model), want, want, TOLERANCE)
        assert_rows_agree(pergrad.gradients(model(x), model).dense(), judged, norms=want)
