"""Ops of torch's that hide what they do, asked alone whose each number below them is."""

import warnings
from collections.abc import Callable, Iterator

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agrees
from torch import Tensor, nn
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
)

import pergrad
from pergrad.graph import measure, plan

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
B, T, D = 4, 6, 4


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.manual_seed(0)
    plan.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        yield


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each pass over a whole graph that only measures."""
    made: list[None] = []
    real = measure._pass

    def counted(*args: object, **more: object) -> object:
        if len(args) == 4:  # a fifth is given by the check of what was derived
            made.append(None)
        return real(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "_pass", counted)
    return made


def agrees(losses: Callable[[], Tensor], params: nn.Module | list) -> None:
    norms = naive.norms(naive.loop_grads(losses(), params))
    tolerance = 1e-9 if norms.dtype == losses().dtype else 1e-4
    assert_agrees(pergrad.norms(losses(), params), norms, norms, tolerance)


def _step_by_step(h: Tensor, inner: nn.Module) -> Tensor:
    out = torch.zeros_like(h)
    for t in range(T):
        out[:, t] = inner(h[:, t] if t == 0 else h[:, t] + out[:, t - 1].clone())
    return out


def _scaled(h: Tensor, inner: nn.Module) -> Tensor:
    out = inner(h)
    out[:, 1:3] *= torch.randn(B, 2, D).to(h)
    out[:, 4] += 0.3 * out[:, 5].clone()
    return inner(out)


def _by_index(h: Tensor, inner: nn.Module) -> Tensor:
    out = h.clone()
    out[:, 1:][:, torch.randint(0, T - 1, (3,))] = inner(h[:, :3])
    out[:, 2:].masked_fill_(torch.rand(B, T - 2, 1) > 0.5, 0.0)
    return inner(out)


def _rows_elsewhere(h: Tensor, inner: nn.Module) -> Tensor:
    """Each example's row goes to another place, and comes back in the end."""
    order = torch.randperm(B)
    out = torch.zeros_like(h)
    out[:, 1:][order] = inner(h)[:, 1:]
    return inner(out)[order]


def _windows(h: Tensor, inner: nn.Module) -> Tensor:
    """That overlap, as those of sliding attention."""
    h = inner(h).contiguous()
    return inner(h.as_strided((B, T - 1, 2 * D), (T * D, D, 1)).reshape(B, -1, D))


def _alignment(h: Tensor, inner: nn.Module) -> Tensor:
    logits = inner(h).log_softmax(-1).transpose(0, 1)
    targets = torch.randint(1, D, (B, 2))
    return F.ctc_loss(logits, targets, torch.full((B,), T), torch.full((B,), 2), reduction="none")


@DTYPES
@pytest.mark.parametrize(
    "hides", [_step_by_step, _scaled, _by_index, _rows_elsewhere, _windows, _alignment]
)
def test_no_pass_is_made_to_measure(
    hides: Callable[[Tensor, nn.Module], Tensor], dtype: torch.dtype, passes: list[None]
) -> None:
    """Batch after batch, with other indices, masks and rows."""
    before, inner = nn.Linear(3, D).to(dtype), nn.Linear(D, D).to(dtype)
    seed = iter(range(100))
    for _ in range(6):
        x = torch.randn(B, T, 3, dtype=dtype)
        here = next(seed)

        def losses(x: Tensor = x, here: int = here) -> Tensor:
            torch.manual_seed(here)
            return (
                hides(before(x), inner).square().flatten(1).sum(1)
                if hides is not _alignment
                else hides(before(x), inner)
            )

        agrees(losses, nn.ModuleList([before, inner]))
    assert not passes


def test_many_examples_and_many_numbers(passes: list[None]) -> None:
    """More examples than a digit tells apart, and more numbers than are made at random."""
    net, inner = nn.Linear(3, 40).double(), nn.Linear(40, 2).double()
    x = torch.randn(70, 30, 3).double()

    def losses() -> Tensor:
        h = net(x)
        h[:, 3] = h[:, 4] * 2
        return inner(h).square().sum((1, 2))

    agrees(losses, nn.ModuleList([net, inner]))
    agrees(losses, nn.ModuleList([net, inner]))
    assert not passes


def test_rows_that_several_examples_share_are_not_taken_for_one_s() -> None:
    """An example's row is the mean of two, in the second batch alone."""
    net, inner = nn.Linear(3, D).double(), nn.Linear(D, D).double()
    params = nn.ModuleList([net, inner])
    x = torch.randn(B, 3).double()

    def losses(weights: Tensor) -> Tensor:
        h = torch.zeros(B, 2, D).double()
        h[:, 1] = net(x)
        mixed = h.clone()
        mixed[:, 1].addcmul_(h[:, 1].flip(0), weights)
        return inner(mixed).square().sum((1, 2))

    agrees(lambda: losses(torch.zeros(B, D).double()), params)
    with pytest.raises(pergrad.MixedExamplesError, match=r"on_mixing"):
        pergrad.norms(losses(torch.ones(B, D).double()), params)


class _Clipped(torch.autograd.Function):
    """In place on a view, so that the graph shows an op of torch's in its stead."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2.0)

    @staticmethod
    def backward(ctx, g):
        return 2 * g / g.norm().clamp_min(0.01)


def test_a_function_that_hides_behind_an_op_of_torch() -> None:
    net, inner = nn.Linear(3, D).double(), nn.Linear(D, D).double()

    def losses() -> Tensor:
        h = net(torch.randn(B, 2, 3).double())
        _Clipped.apply(h[:, 1])
        return inner(h).square().sum((1, 2))

    with pytest.raises(pergrad.MixedExamplesError, match=r"on_mixing"):
        pergrad.norms(losses(), nn.ModuleList([net, inner]))


@pytest.mark.parametrize("selective", [False, True])
def test_in_a_checkpointed_block(selective: bool) -> None:
    """What the hidden op has saved is computed again, and the user's own pass lacks nothing."""
    net, inner = nn.Linear(3, D).double(), nn.Linear(D, D).double()
    params = nn.ModuleList([net, inner])
    x, mask = torch.randn(B, T, 3).double(), torch.rand(T - 1) > 0.5

    def block(h: Tensor) -> Tensor:
        out = inner(h).tanh() * 1.0
        out[:, 1:][:, mask] = h[:, 1:][:, mask] * 2
        return out

    def losses() -> Tensor:
        policy = [torch.ops.aten.tanh.default, torch.ops.aten.index.Tensor]
        more = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)}
        h = checkpoint(block, net(x), use_reentrant=False, **(more if selective else {}))
        return h.square().sum((1, 2))

    params_ = list(params.parameters())
    alone = [torch.autograd.grad(losses()[b], params_) for b in range(B)]
    norms = torch.stack([torch.cat([g.flatten() for g in each]).norm() for each in alone])
    torch.testing.assert_close(pergrad.norms(losses(), params), norms)
    last = losses()
    pergrad.norms(last, params, retain_graph=True)
    last.sum().backward()
    for k, p in enumerate(params_):
        torch.testing.assert_close(p.grad, sum(each[k] for each in alone))


def test_while_the_users_own_pass_runs() -> None:
    net, inner = nn.Linear(3, D).double(), nn.Linear(D, D).double()
    params = nn.ModuleList([net, inner])
    for seed in (0, 1):

        def losses(seed: int = seed) -> Tensor:
            torch.manual_seed(seed)
            return _by_index(net(torch.randn(B, T, 3).double()), inner).square().sum((1, 2))

        own = losses()
        with pergrad.reading(own, params) as read:
            own.sum().backward()
        norms = naive.norms(naive.loop_grads(losses(), params))
        assert_agrees(read.norms, norms, norms, 1e-9)


def test_what_was_measured_takes_a_pass_less_where_it_holds(passes: list[None]) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    net, inner = nn.Linear(3, D).double(), nn.Linear(D, D).double()

    def losses() -> Tensor:
        return inner(Doubled.apply(net(torch.randn(B, 3).double())).tanh()).square().sum(1)

    params, counts = nn.ModuleList([net, inner]), []
    for _ in range(3):
        passes.clear()
        pergrad.norms(losses(), params)
        counts.append(len(passes))
    assert counts == [3, 2, 2]
