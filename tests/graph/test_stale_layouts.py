"""What was remembered from one graph must not be believed of the next one.

Models with the same modules, ops, edges and shapes, but with examples in other places, one after
the other in one process. Everything is 4 wide (examples, positions, features), so that no shape
tells them apart. A wrong memory here is a wrong number without a sign of it.
"""

import itertools
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
import zoo
from helpers import assert_agrees
from torch import Tensor, nn

import pergrad
from pergrad.graph import plan

N = 4
Head = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _settled() -> Iterator[None]:
    with zoo.settled(0), warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        yield


def assert_right(losses: Tensor, params: object, *, may_refuse: bool = False) -> bool:
    """Norms and Gram are the loop's, or examples interact and that is said. Whether refused."""
    G = naive.loop_grads(losses, params)
    norms = naive.norms(G)
    square = norms[:, None] * norms[None]
    options: dict = {"retain_graph": True}
    try:
        got = pergrad.norms(losses, params, **options)
    except pergrad.MixedExamplesError:
        assert may_refuse, "refused, though every row belongs to one example"
        options["on_mixing"] = "exact"
        got = pergrad.norms(losses, params, **options)
    assert_agrees(got, norms, norms, what="norms")
    assert_agrees(pergrad.gram(losses, params, **options), naive.gram(G), square, what="gram")
    return "on_mixing" in options


def rows_are_shared(head: Head, h: Tensor) -> bool:
    """Whether some row h[i, j] feeds the losses of two examples."""
    h = h.detach().requires_grad_()
    losses = head(h)
    live = torch.stack([torch.autograd.grad(one, h, retain_graph=True)[0] for one in losses])
    return bool(((live != 0).any(-1).sum(0) > 1).any())


def run_all(heads: Iterable[Head], model: nn.Module | None = None) -> None:
    """Each head on a layer's output (4, 4, 4), forwards and backwards through the list."""
    model = nn.Linear(N, N) if model is None else model
    heads = list(heads)
    for head in [*heads, *reversed(heads)]:
        h = model(torch.randn(N, N, N))
        losses = head(h)
        assert losses.shape == (N,)
        assert_right(losses, model, may_refuse=rows_are_shared(head, h))


def total(dims: tuple[int, int]) -> Head:
    return lambda h: h.square().sum(dims)


OTHERS = ((1, 2), (0, 2), (0, 1))  # what to sum over, if the examples are dimension 0, 1, 2


# -- the same ops with other integers --------------------------------------------------------------


def test_summed_dimension() -> None:
    run_all(total(dims) for dims in OTHERS)
    run_all((lambda h, d=dims: h.mean(d, keepdim=True).flatten()) for dims in OTHERS)
    run_all((lambda h, d=dims: h.norm(dim=d)) for dims in OTHERS)
    run_all((lambda h, d=dims: h.logsumexp(d)) for dims in OTHERS)
    run_all((lambda h, d=d: h.sum(d).prod(0)) for d in range(3))
    run_all((lambda h, d=d: h.amax(d).sum(1)) for d in range(3))
    run_all((lambda h, d=d: h.var(d).sum(0)) for d in range(3))


def test_select() -> None:
    run_all(
        (lambda h, d=dim, i=i, s=s: h.select(d, i).square().sum(s))
        for dim, i, s in itertools.product(range(3), range(3), range(2))
    )


def test_slice() -> None:
    def sliced(h: Tensor, dim: int, start: int, side: int) -> Tensor:
        return h.narrow(dim, start, 1).squeeze(dim).square().sum(side)

    cases = itertools.product(range(3), (0, 2, 3), range(2))
    run_all((lambda h, c=c: sliced(h, *c)) for c in cases)
    run_all(
        [
            lambda h: h[::2].sum((0, 2)),
            lambda h: h[:, ::2].sum((1, 2)),
            lambda h: h[1::2].sum((0, 2)),
        ]
    )


def test_roll() -> None:
    run_all(
        (lambda h, k=k, d=d, o=o: h.roll(k, d).square().sum(o))
        for k, d, o in itertools.product((1, 2), range(3), OTHERS)
    )
    run_all([lambda h: h.roll(1).square().sum((1, 2)), lambda h: h.roll(4).square().sum((1, 2))])


def test_flip() -> None:
    run_all(
        (lambda h, d=d, o=o: h.flip(d).square().sum(o))
        for d, o in itertools.product(((0,), (1,), (2,), (0, 1)), OTHERS)
    )


def test_transpose_and_permute() -> None:
    for dims in itertools.permutations(range(3)):
        run_all((lambda h, p=dims, o=o: h.permute(p).square().sum(o)) for o in OTHERS)
    run_all((lambda h, p=p: h.permute(p).sum((1, 2))) for p in itertools.permutations(range(3)))
    run_all((lambda h, a=a: h.transpose(*a).sum((1, 2))) for a in ((0, 1), (0, 2), (1, 2)))


def test_view() -> None:
    run_all(
        [
            lambda h: h.view(4, 16).sum(1),
            lambda h: h.view(16, 4).sum(0),
            lambda h: h.view(4, 2, 8).sum((1, 2)),
            lambda h: h.view(2, 4, 8).sum((0, 2)),
            lambda h: h.view(8, 4, 2).sum((0, 2)),
            lambda h: h.view(2, 8, 4).sum((0, 1)),
            lambda h: h.view(8, 2, 4).sum((0, 1)),
            lambda h: h.transpose(0, 1).reshape(16, 4).view(4, 16).sum(1),
            lambda h: h.reshape(16, 4).view(4, 16).sum(1),
            lambda h: h.transpose(0, 2).reshape(16, 4).view(4, 16).sum(1),
            lambda h: h.view(2, 2, 4, 4).transpose(1, 2).reshape(4, 16).sum(1),
        ]
    )


def test_expand_and_repeat() -> None:
    run_all(
        [
            lambda h: h.repeat(2, 1, 1).view(2, 4, 16).square().sum((0, 2)),
            lambda h: h.repeat(2, 1, 1).view(4, 2, 16).square().sum((1, 2)),
            lambda h: h.repeat_interleave(2, 0).view(4, 2, 16).square().sum((1, 2)),
            lambda h: h.repeat_interleave(2, 0).view(2, 4, 16).square().sum((0, 2)),
            lambda h: h[None].expand(4, 4, 4, 4).square().sum((1, 2, 3)),
            lambda h: h[:, None].expand(4, 4, 4, 4).square().sum((1, 2, 3)),
        ]
    )


def test_cat_stack_and_split() -> None:
    run_all((lambda h, d=d: torch.stack([h, h.sin()], d).sum((1, 2, 3))[:4]
             if d else torch.stack([h, h.sin()], d).sum((0, 2, 3))) for d in range(4))  # fmt: skip
    run_all((lambda h, d=d: torch.cat([h, h.sin()], d).sum((1, 2))[:4]) for d in range(3))
    run_all((lambda h, d=d: torch.cat([h.sin(), h], d).sum((1, 2))[-4:]) for d in range(3))
    run_all(
        (lambda h, d=d, i=i: h.chunk(4, d)[i].squeeze(d).sum(0)) for d in range(3) for i in (0, 3)
    )
    run_all((lambda h, d=d, i=i: h.unbind(d)[i].sum(1)) for d in range(3) for i in (1, 2))
    run_all((lambda h, d=d: h.diagonal(0, *d).sum(0)) for d in ((0, 1), (1, 2), (0, 2)))
    run_all((lambda h, d=d: h.diagonal(0, *d).sum(1)) for d in ((0, 1), (1, 2), (0, 2)))


def test_along_a_dimension() -> None:
    """Ops that look the same and run along examples, positions or features."""
    for op in (
        torch.softmax, torch.cumsum, torch.log_softmax, torch.cumprod, torch.logcumsumexp,
        lambda h, d: h.sort(d).values, lambda h, d: h / h.norm(dim=d, keepdim=True),
        lambda h, d: h.topk(4, dim=d).values, lambda h, d: h - h.mean(d, keepdim=True),
        lambda h, d: h.unfold(d, 2, 2).flatten(2), lambda h, d: h.diff(dim=d),
        lambda h, d: F.glu(torch.cat([h, h], d), d), lambda h, d: h.renorm(2, d, 0.5),
    ):  # fmt: skip
        run_all(
            (lambda h, op=op, d=d, o=o: op(h, d).square().sum(o))
            for d, o in itertools.product((1, 2, 0), OTHERS)
            if op(torch.randn(N, N, N), d).square().sum(o).shape == (N,)
        )


def test_softmax_along_the_examples_is_refused_after_one_along_positions() -> None:
    model = nn.Linear(N, N)
    for dim, refused in ((1, False), (0, True), (2, False), (0, True)):
        losses = model(torch.randn(N, N, N)).softmax(dim).square().sum((1, 2))
        assert assert_right(losses, model, may_refuse=refused) == refused


def test_layer_norm_and_attention_along_other_dimensions() -> None:
    model = nn.ModuleList([nn.Linear(N, N), nn.LayerNorm(N), nn.Linear(N, N)])

    def forward(x: Tensor, turn: tuple[int, int], dims: tuple[int, int]) -> Tensor:
        h = model[1](model[0](x).transpose(*turn))
        return model[2](h).transpose(*turn).square().sum(dims)

    for turn, dims in [*itertools.product(((0, 1), (0, 0)), OTHERS[:2])] * 2:
        assert_right(forward(torch.randn(N, N, N), turn, dims), model)

    attention = nn.MultiheadAttention(N, 2)
    for batch_first in (True, False, True):
        attention.batch_first = batch_first
        x = torch.randn(N, N, N)
        out = attention(x, x, x)[0].square().sum((1, 2) if batch_first else (0, 2))
        assert_right(out, attention)


def test_ranks() -> None:
    """One layer on two, three and four dimensions, with a bias of another rank."""
    p = {"w": nn.Parameter(torch.randn(N, N)), "b": nn.Parameter(torch.randn(N))}
    for shape in ((4, 4), (4, 4, 4), (4, 2, 2, 4), (4, 1, 4), (4, 4), (4, 1, 1, 4)):
        for add in (lambda h: h + p["b"], lambda h: p["b"] + h, lambda h: h * p["b"]):
            losses = add(torch.randn(shape) @ p["w"]).square().flatten(1).sum(1)
            assert_right(losses, p)
    for shape in ((4,), (4, 4), (4, 4, 4), (1, 4), (4, 1), (1, 4, 1)):
        p = {"w": nn.Parameter(torch.randn(shape))}
        assert_right((torch.randn(N, N, N) * p["w"]).square().sum((1, 2)), p)
        assert_right((torch.randn(N, N, N) - p["w"]).square().sum((0, 2)), p)


def test_random_compositions() -> None:
    """Three rearrangements at random, then a sum that leaves one dimension."""
    ops: list[Head] = [
        lambda h: h.transpose(0, 1), lambda h: h.transpose(1, 2), lambda h: h.transpose(0, 2),
        lambda h: h.roll(1, 0), lambda h: h.roll(3, 1), lambda h: h.roll((1, 2), (0, 2)),
        lambda h: h.flip(0), lambda h: h.flip(1), lambda h: h.flip(0, 2),
        lambda h: h.reshape(16, 4).view(2, 4, 8).transpose(0, 1).reshape(4, 4, 4),
        lambda h: h[[2, 0, 3, 1]], lambda h: h[:, [2, 0, 3, 1]], lambda h: h[[0, 0, 3, 3]],
        lambda h: torch.cat([h[1:], h[:1]]), lambda h: torch.stack(h.unbind(1)),
        lambda h: h.permute(2, 0, 1), lambda h: torch.cat(h.split(2, 1)).view(4, 4, 4),
        lambda h: h.masked_fill(torch.eye(4, dtype=torch.bool)[:, :, None], 0.0), torch.tanh,
    ]  # fmt: skip
    model, draw = nn.Linear(N, N), random.Random(0)
    for _ in range(150):
        chosen, dims = [draw.choice(ops) for _ in range(3)], draw.choice(OTHERS)

        def head(h: Tensor, chosen: list[Head] = chosen, dims: tuple = dims) -> Tensor:
            for op in chosen:
                h = op(h)
            return h.square().sum(dims)

        h = model(torch.randn(N, N, N))
        assert_right(head(h), model, may_refuse=rows_are_shared(head, h))


# -- the same graph with other data in its indices -------------------------------------------------


PERMUTATIONS = [torch.tensor(p) for p in ([0, 1, 2, 3], [3, 1, 0, 2], [1, 2, 3, 0], [0, 1, 2, 3])]


@pytest.mark.parametrize(
    "head",
    [
        lambda h, p: h[p].square().sum((1, 2)),
        lambda h, p: h.square().sum((1, 2))[p],
        lambda h, p: h.index_select(0, p).square().sum((1, 2)),
        lambda h, p: h.square().sum((1, 2)).gather(0, p),
        lambda h, p: h.square().sum((1, 2)).take(p),
        lambda h, p: h.gather(0, p[:, None, None].expand(4, 4, 4)).square().sum((1, 2)),
        lambda h, p: torch.zeros_like(h).index_add(0, p, h).square().sum((1, 2)),
        lambda h, p: torch.zeros_like(h).index_copy(0, p, h).square().sum((1, 2)),
        lambda h, p: torch.zeros(4).scatter_add(0, p, h.square().sum((1, 2))),
        lambda h, p: torch.zeros(4).scatter(0, p, h.square().sum((1, 2))),
        lambda h, p: torch.zeros(4).scatter_reduce(0, p, h.square().sum((1, 2)), "sum"),
        lambda h, p: torch.ones(4).scatter_reduce(0, p, h.square().sum((1, 2)), "prod"),
        lambda h, p: torch.zeros(4).scatter_add(0, p.repeat(4), h.square().sum(2).flatten()),
        lambda h, p: torch.zeros_like(h).scatter_add(
            0, p[:, None, None].expand(4, 4, 4), h).square().sum((1, 2)),
        lambda h, p: torch.zeros(4, 4).scatter_add(1, p.repeat(4, 1), h.sum(2).T).square().sum(0),
        lambda h, p: torch.zeros(4).index_put((p,), h.square().sum((1, 2)), accumulate=True),
        lambda h, p: torch.zeros(4).index_add(0, p.repeat(4), h.square().sum(2).flatten()),
        lambda h, p: torch.zeros(4).index_add(0, p.repeat_interleave(4), h.sin().sum(2).flatten()),
        lambda h, p: h.take_along_dim(p[:, None, None], 0).square().sum((1, 2)),
        lambda h, p: torch.stack([h[i] for i in p.tolist()]).square().sum((1, 2)),
        lambda h, p: torch.stack([h[i].square().sum() for i in p.tolist()]),
        lambda h, p: F.one_hot(p, 4).double() @ h.square().sum((1, 2)),
        lambda h, p: (h.transpose(0, 2) @ F.one_hot(p, 4).double()).square().sum((0, 1)),
    ],
    ids=lambda _: "",
)  # fmt: skip
def test_indices(head: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The first permutation is the identity, which looks like a regular layout."""
    model = nn.Linear(N, N)
    for p in PERMUTATIONS:
        assert_right(head(model(torch.randn(N, N, N)), p), model)


class _Permuted(torch.autograd.Function):
    """Rows in an order of which the graph tells nothing."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.order = order
        return x[order]

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g).index_copy(0, ctx.order, g), None


@pytest.mark.parametrize("rows", [4, 20])
def test_measured_again(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the same is measured as before the plan is the same, and only there.

    Every pair of examples changes places in turn, more of them than one digit of a seed tells
    apart; rows without a gradient come alive, and others stop to be.
    """
    found = []
    find = plan.find_uses
    monkeypatch.setattr(plan, "find_uses", lambda *a: found.append(None) or find(*a))
    model, inner = nn.Linear(N, N), nn.Linear(N, N)
    plan.clear()

    def losses(order: Tensor, alive: Tensor | float = 1.0) -> Tensor:
        h = _Permuted.apply(model(torch.randn(rows, N)), order)
        return (inner(h * 1.0).square().sum(1)) * alive

    params = nn.ModuleList([model, inner])
    same = torch.arange(rows)
    assert_right(losses(same), params)
    counts = []
    for _ in range(3):
        pergrad.norms(losses(same), params)
        counts.append(len(found))
    assert counts == [counts[0]] * 3
    for i, j in itertools.combinations(range(rows), 2):
        order = same.clone()
        order[i], order[j] = j, i
        assert_right(losses(order), params)
    assert len(found) > counts[0]
    for alive in (0.0, 1.0, torch.arange(rows) % 2, (torch.arange(rows) + 1) % 2, 1.0):
        for order in (same, same.flip(0)):
            assert_right(losses(order, alive), params)


def test_sorting_of_examples() -> None:
    """Losses sorted by size: an order that changes with the batch."""
    model = nn.Linear(N, N)
    for x in (torch.arange(4.0)[:, None].expand(4, 4), torch.randn(4, 4), torch.randn(4, 4)):
        assert_right(model(x).square().sum(1).sort().values, model)
        assert_right(model(x).square().sum(1).topk(4).values, model)


def test_masks() -> None:
    """Boolean masks of the same size in other places."""
    model = nn.Linear(N, N)
    for rows in ([0, 1, 2, 3], [4, 0, 5, 9], [3, 2, 1, 0]):
        mask = torch.zeros(16, dtype=torch.bool)
        mask[rows] = True
        owner = torch.tensor([0, 1, 2, 3])
        chosen = model(torch.randn(N, N, N)).flatten(0, 1)[mask].square().sum(1)
        assert_right(torch.zeros(4).index_add(0, owner, chosen), model)
        x = torch.randn(N, N, N)
        kept = model(x) * mask.view(4, 4, 1)
        assert_right(kept.square().sum((1, 2)), model)
        assert_right(kept.square().sum((0, 2)), model)


def test_selections_by_a_mask() -> None:
    """The same number of elements chosen, and put, in other places."""
    model = nn.Linear(N, N)
    here = torch.arange(64).view(N, N, N) % 2 == 0
    for mask in (here, ~here, here.transpose(0, 2), here.roll(3), here):
        owner = torch.arange(N).repeat_interleave(N * N).view(N, N, N)[mask]
        chosen = model(torch.randn(N, N, N)).masked_select(mask)
        assert_right(torch.zeros(N).index_add(0, owner, chosen.square()), model)
        values = model(torch.randn(N, N, N)).flatten()[:32]
        put = torch.zeros(N, N, N).masked_scatter(mask, values)
        assert_right(put.sin().sum((1, 2)), model, may_refuse=True)
        assert_right(put.sin().sum((0, 2)), model, may_refuse=True)


LENGTHS = ([4, 2, 1, 1], [3, 3, 1, 1], [1, 4, 1, 2], [2, 2, 2, 2], [4, 2, 1, 1])


@pytest.mark.parametrize("kind", ["rows", nn.RNN, nn.GRU, nn.LSTM], ids=lambda k: str(k)[-5:])
def test_packed_lengths(kind: Any) -> None:
    """As many rows in all, of sequences of other lengths, in another order."""
    first = nn.Linear(N, N)
    cells = None if kind == "rows" else kind(N, N, 2, batch_first=True)
    params = [*first.parameters(), *(() if cells is None else cells.parameters())]
    for lengths in LENGTHS:
        packed = nn.utils.rnn.pack_padded_sequence(
            first(torch.randn(N, N, N)), torch.tensor(lengths), True, enforce_sorted=False
        )
        if cells is None:
            rows = packed._replace(data=packed.data.sin())
        else:
            rows, state = cells(packed)
            state = state[0] if isinstance(state, tuple) else state
            assert_right(state[-1].square().sum(1), params)
        out, _ = nn.utils.rnn.pad_packed_sequence(rows, batch_first=True, total_length=N)
        assert_right(out.square().sum((1, 2)), params)


def test_indices_that_are_written_to() -> None:
    """One index tensor throughout, with other numbers in it each time."""
    model, index = nn.Linear(N, N), torch.empty(N, dtype=torch.int64)
    mask = torch.empty(N, N, N, dtype=torch.bool)
    for p in (*PERMUTATIONS, *PERMUTATIONS):
        index.copy_(p)
        mask.copy_(F.one_hot(p, N)[:, None].expand(N, N, N))
        h = model(torch.randn(N, N, N))
        assert_right(torch.zeros(N).index_add(0, index, h.square().sum((1, 2))), model)
        chosen = model(torch.randn(N, N, N)).masked_select(mask).view(N, N)
        assert_right(chosen.square().sum(1), model)
        assert_right(chosen.sin().sum(0), model, may_refuse=True)


def test_a_plan_is_found_again_by_its_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only by them: of each graph some are remembered, for indices that are as they were."""
    looked: list[int] = []
    find_uses = plan.find_uses

    def counted(*args: Any) -> Any:
        looked.append(1)
        return find_uses(*args)

    monkeypatch.setattr(plan, "find_uses", counted)
    model = nn.Linear(N, N)

    def call(p: Tensor) -> int:
        looked.clear()
        each = model(torch.randn(N, N, N)).square().sum((1, 2))
        losses = torch.zeros(N).index_add(0, p, each)
        norms = naive.norms(naive.loop_grads(losses, model))
        assert_agrees(pergrad.norms(losses, model), norms, norms, what="norms")
        return len(looked)

    plan.clear()
    orders = PERMUTATIONS[:3]
    assert [call(p) for p in orders] == [1] * len(orders)
    assert [call(p.clone()) for p in orders] == [0] * len(orders)

    def columns(p: Tensor) -> int:
        """Indices beside a slice, of which nothing is saved."""
        looked.clear()
        losses = model(torch.randn(N, N))[:, p].cumsum(1).square().sum(1)
        norms = naive.norms(naive.loop_grads(losses, model))
        assert_agrees(pergrad.norms(losses, model), norms, norms, what="norms")
        return len(looked)

    assert [columns(p) for p in orders] == [1] * len(orders)
    assert [columns(p.clone()) for p in orders] == [0] * len(orders)
    assert [call(p.int()) for p in orders] == [1] * len(orders)  # another dtype: looked at anew
    for p in itertools.permutations(range(N)):
        call(torch.tensor(p))
    assert call(orders[0]) == 1  # forgotten: others came after it
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert [call(orders[0]) for _ in range(3)] == [1] * 3  # to read is to call a function
    assert call(orders[0]) == 0
    plan.clear()
    assert call(orders[0]) == 1


def test_documents_in_one_row() -> None:
    """Packed documents: the same number of tokens, other boundaries."""
    model = nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, 1))
    for owner in ([0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 1, 1, 2, 3, 3, 3], [3, 0, 2, 1, 3, 0, 2, 1]):
        each = model(torch.randn(1, 8, N)).square().flatten()
        assert_right(torch.zeros(4).index_add(0, torch.tensor(owner), each), model)


def test_routing_of_experts() -> None:
    """One mixture of experts on several batches; and on one batch with its tokens exchanged, so
    that every expert gets as many rows as before.
    """
    from zoo.routing import Experts

    model = Experts()
    x = torch.randn(N, N, 4)
    shuffled = x.flatten(0, 1)[torch.randperm(16)].view(N, N, 4)
    for batch in (x, shuffled, torch.randn(N, N, 4), x, x.flip(0), x.transpose(0, 1)):
        assert_right(model(batch).square().sum((1, 2)), model)
        assert_right(model(batch).square().sum((0, 2)), model)


class Turn(torch.autograd.Function):
    """Swaps two dimensions that only Python knows of."""

    dims = (0, 1)

    @staticmethod
    def forward(ctx, x):
        ctx.dims = Turn.dims
        return x.transpose(*Turn.dims).contiguous()

    @staticmethod
    def backward(ctx, g):
        return g.transpose(*ctx.dims)


def test_a_function_that_nobody_can_look_into(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(N, N)
    for dims in ((1, 1), (0, 1), (1, 2), (0, 1)):
        monkeypatch.setattr(Turn, "dims", dims)
        assert_right(Turn.apply(model(torch.randn(N, N, N))).square().sum((1, 2)), model)


# -- what a zero gradient does not say -------------------------------------------------------------


def one_cell(i: int, j: int) -> Tensor:
    mask = torch.zeros(N, N, 1)
    mask[i, j] = 1.0
    return mask


def test_one_live_cell_then_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """With T = B and one live cell on the diagonal, every layout explains what is seen."""
    for turn, dims in itertools.product(((1, 1), (0, 1)), OTHERS[:2]):
        monkeypatch.setattr(Turn, "dims", turn)
        model = nn.Linear(N, N)
        for i, j in ((0, 0), (1, 1), (1, 2), (2, 1), (0, 3), (3, 0)):
            for wrap in (lambda h: h, Turn.apply):
                h = wrap(model(torch.randn(N, N, N))) * one_cell(i, j)
                assert_right(h.square().sum(dims), model)
        full = Turn.apply(model(torch.randn(N, N, N)))
        assert_right(full.square().sum(dims), model)


def test_dead_rows_wake_up() -> None:
    """Units that are dead for some examples, then for others, then for none."""
    model = nn.Sequential(nn.Linear(N, N), nn.ReLU(), nn.Linear(N, N))
    for dead in ([0, 1, 2, 3], [0, 1, 2], [1, 3], [2], []):
        x = torch.randn(N, N, N)
        shift = torch.zeros(N, N, 1)
        shift.view(-1)[[5 * i for i in dead]] = -1e3
        for dims in OTHERS[:2]:
            assert_right(model[2](model[1](model[0](x) + shift)).square().sum(dims), model)


def test_losses_that_are_all_zero_first() -> None:
    model = nn.Linear(N, N)
    for factor in (0.0, 1.0, 0.0):
        for dims in OTHERS[:2]:
            assert_right((factor * model(torch.randn(N, N, N))).square().sum(dims), model)


@pytest.mark.parametrize("first", ["default", "exact"])
def test_a_batch_norm_wakes_up(first: str) -> None:
    """Zero-initialised gamma: below it nothing mixes, yet. A step later it does."""
    from zoo.mixing import ResidualBlock

    model, x = ResidualBlock(0.0), torch.randn(N, 1, 3, 3)

    def losses() -> Tensor:
        return zoo.loss(model(x))

    if first == "exact":
        assert_right(losses(), model, may_refuse=True)
    else:
        with pytest.raises(pergrad.MixedExamplesError):
            pergrad.norms(losses(), model)
    nn.init.constant_(model.bn2.weight, 0.5)
    assert assert_right(losses(), model, may_refuse=True)
    nn.init.zeros_(model.bn2.weight)
    assert_right(losses(), model, may_refuse=True)
    model.eval()
    assert not assert_right(losses(), model)
    model.train()
    assert assert_right(losses(), model, may_refuse=True)


def test_a_scalar_gate_wakes_up() -> None:
    """ReZero: x + alpha f(x) with alpha = 0 at first, where f is sequence-major inside."""
    p = nn.ModuleDict({"f": nn.MultiheadAttention(N, 2, batch_first=True), "g": nn.Linear(N, N)})
    p.register_parameter("alpha", nn.Parameter(torch.zeros(())))
    for alpha in (0.0, 0.5, 0.0, -1.0):
        p.alpha.data.fill_(alpha)
        x = torch.randn(N, N, N)
        h = p["g"](x)
        assert_right((h + p.alpha * p["f"](h, h, h)[0]).square().sum((1, 2)), p)


def test_a_gate_before_mixed_examples_wakes_up() -> None:
    """alpha * (h - h.mean(0)): harmless at alpha = 0, by what can be measured."""
    p = {"alpha": nn.Parameter(torch.zeros(())), "w": nn.Parameter(torch.randn(N, N))}
    for alpha in (0.0, 0.5, 0.0, 0.5):
        p["alpha"].data.fill_(alpha)
        h = torch.randn(N, N) @ p["w"]
        losses = (h + p["alpha"] * (h - h.mean(0)).sin()).square().sum(1)
        refused = assert_right(losses, p, may_refuse=True)
        assert refused or alpha == 0.0


# -- the same graph, asked for something else ------------------------------------------------------


def test_another_set_of_parameters() -> None:
    model = nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N))
    everything = dict(model.named_parameters())
    for dims in OTHERS[:2]:
        losses = model(torch.randn(N, N, N)).square().sum(dims)
        for names in (everything, ["0.weight"], ["2.weight"], ["4.bias", "0.bias"], everything):
            assert_right(losses, {n: everything[n] for n in names})
        swapped = {"0.weight": everything["2.weight"], "2.weight": everything["0.weight"]}
        assert_right(losses, swapped)


def test_frozen_and_thawed() -> None:
    model = nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N))
    for frozen in ((), ("0.weight",), ("2.weight", "2.bias"), ("0.weight", "0.bias"), ()):
        for name, p in model.named_parameters():
            p.requires_grad_(name not in frozen)
        for dims in OTHERS[:2]:
            assert_right(model(torch.randn(N, N, N)).square().sum(dims), model)


def test_tied_and_untied() -> None:
    a, b = nn.Linear(N, N, bias=False), nn.Linear(N, N, bias=False)
    own = b.weight
    for weight in (own, a.weight, own, a.weight):
        b.weight = weight
        losses = b(a(torch.randn(N, N, N)).tanh()).square().sum((1, 2))
        assert_right(losses, nn.ModuleList([a, b]))


def test_another_batch_size() -> None:
    model = nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N))
    for batch, positions in ((4, 4), (2, 8), (8, 2), (16, 1), (1, 16), (4, 4), (0, 4)):
        assert_right(model(torch.randn(batch, positions, N)).square().sum((1, 2)), model)
        assert_right(model(torch.randn(positions, batch, N)).square().sum((0, 2)), model)


def test_the_same_losses_several_times() -> None:
    """Nothing that one verb remembers changes the answer of the next."""
    model = nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N))
    losses = model(torch.randn(N, N, N)).square().sum((1, 2))
    for check in ("once", "always", "never", "once"):
        got = pergrad.norms(losses, model, retain_graph=True, check_layout=check)
        norms = naive.norms(naive.loop_grads(losses, model))
        assert_agrees(got, norms, norms)


# -- direct calls of single nodes ------------------------------------------------------------------


def test_reduction_of_broadcast_operands() -> None:
    """An op called on its own does not sum its result over broadcast dimensions."""
    shapes = ((4,), (1,), (), (4, 1), (1, 4, 1), (4, 4, 4), (1, 1, 4))
    ops: list[Callable[[Tensor, Tensor], Tensor]] = [
        torch.mul, torch.div, torch.sub, torch.atan2, torch.maximum, torch.hypot, torch.logaddexp,
        lambda x, w: w / (x.square() + 1), lambda x, w: torch.addcmul(x, x, w, value=0.3),
        lambda x, w: torch.addcdiv(w, x, x.square() + 1), lambda x, w: torch.lerp(x, w, 0.3),
        lambda x, w: torch.lerp(x, x.sin(), w), lambda x, w: torch.where(x > 0, w, x),
        lambda x, w: x.exp() ** w, lambda x, w: torch.clamp(x, max=w), lambda x, w: w.fmod(x),
    ]  # fmt: skip
    for op, shape in itertools.product(ops, shapes):
        p = {"w": nn.Parameter(torch.randn(shape))}
        for dims in OTHERS[:2]:
            assert_right(op(torch.randn(N, N, N), p["w"]).square().sum(dims), p)


def test_in_place_slices() -> None:
    p = {"w": nn.Parameter(torch.randn(N)), "s": nn.Parameter(torch.randn(()))}

    def filled(x: Tensor, where: object) -> Tensor:
        y = x.clone()
        y[where] = p["w"]
        y[..., 0] *= p["s"]
        y[where] += p["s"]
        return y.square()

    for where in (slice(0, 2), 1, (slice(None), 1), (slice(None), slice(0, 2)), slice(None)):
        for dims in OTHERS[:2]:
            assert_right(filled(torch.randn(N, N, N), where).sum(dims), p)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, float("inf")])
def test_distances(power: float) -> None:
    """torch.vmap over cdist's backward gives a wrong number."""
    p = {"c": nn.Parameter(torch.randn(5, N))}
    for batch in (1, 3, N):
        assert_right(torch.cdist(torch.randn(batch, N), p["c"], p=power).square().sum(1), p)
        x = torch.randn(batch, 3, N)
        assert_right(torch.cdist(x, p["c"], p=power).square().sum((1, 2)), p)


def test_a_parameter_whose_memory_was_exchanged_is_not_taken_for_another():
    """The graph says what it was in the forward pass; `.data` says what it is now."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, N, N + 1, generator=generator, dtype=torch.float64)

    def check(shape: tuple[int, ...], now: Tensor | None) -> None:
        p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        y = x + p
        losses = (y * y.detach()).flatten(1).sum(1)
        want = naive.norms(naive.loop_grads(losses, {"p": p}))
        if now is not None:
            p.data = now  # as those do who keep weights elsewhere between forward and backward
        assert_agrees(pergrad.norms(losses, {"p": p}), want, want)

    nothing = torch.empty(0, dtype=torch.float64)
    check((N, N + 1), nothing)
    check((N + 1,), nothing)
    check((1, N, N + 1), nothing)
    check((N, 1), torch.randn(1, N + 1, generator=generator, dtype=torch.float64))
    check((1, N + 1), None)
