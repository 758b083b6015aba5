"""Ways in which people run models: compiled, with parameters passed in, under other contexts."""

from collections.abc import Callable
from functools import partial

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agrees
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import pergrad
from pergrad.graph import plan


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
Y = torch.tensor([0, 2, 1, 1, 0, 2])


def losses(call: nn.Module) -> Tensor:
    return F.cross_entropy(call(X), Y, reduction="none")


def test_a_compiled_model_has_rules(model: nn.Module) -> None:
    """Compiled or, for a while, not: the same numbers, without a warning."""
    compiled = torch.compile(model, backend="aot_eager")
    truth = naive.norms(naive.loop_grads(losses(model), model))
    values = losses(compiled)
    assert pergrad.explain(values, compiled, retain_graph=True).exact_share == 1
    torch.testing.assert_close(pergrad.norms(values, compiled), truth)
    with torch.compiler.set_stance("force_eager"):
        values = losses(compiled)
    assert pergrad.explain(values, compiled).exact_share == 1
    torch.testing.assert_close(pergrad.norms(values, compiled), truth)
    torch.compiler.reset()


def test_inside_a_compiled_step(model: nn.Module) -> None:
    """A whole step is compiled, the call in it is not: the graph ends before and begins behind."""
    truth = naive.norms(naive.loop_grads(losses(model), model))
    norms = torch.compiler.disable(pergrad.norms)

    @torch.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        values = F.cross_entropy(model(x), Y, reduction="none")
        return 2 * norms(values, model)

    torch.testing.assert_close(step(X), 2 * truth)
    torch.compiler.reset()


def test_derivatives_of_a_compiled_model(model: nn.Module) -> None:
    values = losses(torch.compile(model, backend="aot_eager"))
    with pytest.raises(pergrad.UnsupportedError, match=r"create_graph(.|\n)*force_eager"):
        pergrad.norms(values, model, create_graph=True)
    torch.compiler.reset()


def test_a_compiled_block_has_rules(model: nn.Module) -> None:
    """The layers around it keep their rules; what is compiled keeps its name or has a new one."""
    truth = naive.norms_by_parameter(naive.loop_grads(losses(model), model))
    model[0] = torch.compile(nn.Sequential(model[0]), backend="aot_eager")
    values = losses(model)
    parts = pergrad.norms_by_parameter(values, model, retain_graph=True)
    assert [name.replace("_orig_mod.0.", "") for name in parts] == list(truth)
    for got, want in zip(parts.values(), truth.values(), strict=True):
        torch.testing.assert_close(got, want)
    rows = pergrad.explain(values, model).rows
    assert {row.how for row in rows} == {"rule"}
    assert {row.op for row in rows} == {"CompiledFunction: mm", "CompiledFunction: sum", "addmm"}
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_function_is_one_op() -> None:
    @torch.jit.script
    def scripted(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).tanh().sigmoid() * 2

    w = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3))
    for _ in range(4):  # the first calls only watch
        values = scripted(X, w).sum(1)
    truth = naive.norms(naive.loop_grads(values, [w]))
    with pytest.warns(pergrad.FallbackWarning, match="differentiable_graph"):
        norms = pergrad.norms(values, [w])
    torch.testing.assert_close(norms, truth)


class Counted(nn.Module):
    """A block that counts its forward passes; drops some of its values."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(0.3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.inner(x)


def test_checkpointed_blocks_run_once_more() -> None:
    """Within one pass, as in a backward; the training step after it is the same."""
    torch.manual_seed(0)
    blocks = nn.ModuleList([Counted() for _ in range(3)])
    model = nn.ModuleList([blocks, nn.Linear(4, 3)]).double()

    def run() -> Tensor:
        torch.manual_seed(1)
        x = X
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return F.cross_entropy(model[1](x), Y, reduction="none")

    truth = naive.norms(naive.loop_grads(run(), model))
    pergrad.norms(run(), model)  # the first of its form also verifies its layout
    values = run()
    before = [block.calls for block in blocks]
    torch.testing.assert_close(pergrad.norms(values, model, retain_graph=True), truth)
    assert [block.calls for block in blocks] == [calls + 1 for calls in before]
    assert pergrad.explain(values, model).exact_share == 1
    values.mean().backward()
    after = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    run().mean().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(after, model.parameters(), strict=True))


def test_activations_kept_elsewhere(model: nn.Module) -> None:
    """Saved tensors that hooks pack and unpack, such as offloading."""
    with torch.autograd.graph.save_on_cpu():
        values = losses(model)
    truth = naive.norms(naive.loop_grads(values, model))
    torch.testing.assert_close(pergrad.norms(values, model), truth)


class Adapted(nn.Module):
    """A frozen layer with a trained low-rank addition, as LoRA makes it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 1.5 * self.lora_B(self.lora_A(self.dropout(x)))


def test_low_rank_adapters(model: nn.Module) -> None:
    model[0], model[2] = Adapted(model[0]), Adapted(model[2])
    model.double()
    values = losses(model)
    truth = naive.norms_by_parameter(naive.loop_grads(values, model))
    assert len(truth) == 4  # what is frozen has no gradient
    parts = pergrad.norms_by_parameter(values, model, retain_graph=True)
    for name, want in truth.items():
        torch.testing.assert_close(parts[name], want)
    assert pergrad.explain(values, model).exact_share == 1


def test_parametrised_weights() -> None:
    """In training mode: spectral norm takes a step of its power iteration in every forward."""
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(),
        parametrizations.orthogonal(nn.Linear(5, 5)), nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(5, 3)),
    ).double()  # fmt: skip
    prune.l1_unstructured(model[2], "bias", 0.4)
    values = losses(model)
    truth = naive.norms(naive.loop_grads(values, model))
    torch.testing.assert_close(pergrad.norms(values, model, retain_graph=True), truth)
    assert pergrad.explain(values, model).exact_share == 1


def test_losses_from_torch_func(model: nn.Module) -> None:
    """A function of one example, mapped over the batch; its gradient in the loss."""

    def one(x: Tensor, y: Tensor) -> Tensor:
        out = functional_call(model, dict(model.named_parameters()), (x,))
        return F.cross_entropy(out, y)

    def smooth(x: Tensor, y: Tensor) -> Tensor:
        return one(x, y) + torch.func.grad(one)(x, y).square().sum()

    for function in (one, smooth):
        values = torch.func.vmap(function)(X, Y)
        truth = naive.norms(naive.loop_grads(values, model))
        torch.testing.assert_close(pergrad.norms(values, model, retain_graph=True), truth)
        assert pergrad.explain(values, model).exact_share == 1


class Marked(Tensor):
    """A subclass that only adds to a tensor, as many libraries have."""


def test_subclasses_that_hold_their_own_numbers(model: nn.Module) -> None:
    truth = naive.norms(naive.loop_grads(losses(model), model))
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Marked))
    values = F.cross_entropy(model(X.as_subclass(Marked)), Y, reduction="none")
    assert type(values) is Marked
    torch.testing.assert_close(pergrad.norms(values, model).as_subclass(Tensor), truth)


def test_parameters_passed_in(model: nn.Module) -> None:
    """functional_call: names are those of the mapping; derived tensors lead on to the leaves."""
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    values = F.cross_entropy(
        functional_call(model, {n: 2 * p for n, p in params.items()}, (X,)), Y, reduction="none"
    )
    want = naive.loop_grads(values, params)
    J = pergrad.gradients(values, params)
    assert J.names == tuple(params)
    for name, got in J.dense().items():
        torch.testing.assert_close(got, want[name])


def test_two_batches_accumulate(model: nn.Module) -> None:
    """backward adds to .grad, as the batches of an accumulated step expect."""
    want = {n: 0 for n, _ in model.named_parameters()}
    for _ in range(2):
        for name, rows in naive.loop_grads(losses(model), model).items():
            want[name] = want[name] + rows.sum(0)
        pergrad.backward(losses(model), model)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name])


def test_two_versions_of_a_model(model: nn.Module) -> None:
    """Gradients of one batch at w1 and at w2; a step in between changes nothing in the first."""
    first = pergrad.gradients(losses(model), model)
    one = naive.flat(naive.loop_grads(losses(model), model))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    second = pergrad.gradients(losses(model), model)
    two = naive.flat(naive.loop_grads(losses(model), model))
    torch.testing.assert_close(first @ second.T, one @ two.T)
    torch.testing.assert_close(first.row_dots(second), (one * two).sum(1))


def selectively_checkpointed() -> tuple[Callable[[], Tensor], nn.Module]:
    """Products are kept, the rest is computed again: torch allows one backward pass."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(4, 8, dtype=torch.float64)

    def policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        kept = op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return (
        lambda: checkpoint(net, x, use_reentrant=False, context_fn=contexts).square().sum(1)
    ), net


@pytest.mark.parametrize("check", ["once", "always", "never"])
def test_selective_checkpoints(check: str) -> None:
    """Verification is a pass of its own, and leaves the one that torch allows."""
    forward, net = selectively_checkpointed()
    plan.clear()
    want = torch.stack(
        [naive.flat(naive.loop_grads(forward()[b][None], net))[0].norm() for b in range(4)]
    )
    assert_agrees(pergrad.norms(forward(), net, check_layout=check), want, want)
    # norms first, the user's own step afterwards
    losses = forward()
    assert_agrees(pergrad.norms(losses, net, retain_graph=True, check_layout=check), want, want)
    losses.sum().backward()
    sums = torch.autograd.grad(forward().sum(), list(net.parameters()))
    for p, g in zip(net.parameters(), sums, strict=True):
        assert torch.equal(p.grad, g)
    # and with nothing left
    losses = forward()
    losses.sum().backward(retain_graph=True)
    with pytest.raises(pergrad.UsageError, match=r"selective(.|\n)*before `backward`"):
        pergrad.norms(losses, net, check_layout=check)


class SomeNone(torch.autograd.Function):
    """Returns None among its outputs, and wants no zeros for those that nobody used."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[None, Tensor, None, Tensor]:
        ctx.set_materialize_grads(False)
        return None, 2 * x, None, x + 1

    @staticmethod
    def backward(ctx, _, g: Tensor | None, __, h: Tensor | None) -> Tensor | None:
        parts = [part for part in (None if g is None else 2 * g, h) if part is not None]
        return sum(parts) if parts else None


@pytest.mark.parametrize("used", [(1,), (3,), (1, 3)])
def test_a_function_that_returns_none_among_its_outputs(used: tuple[int, ...], model) -> None:
    outs = SomeNone.apply(model(X))
    losses = sum(outs[k].square().sum(1) for k in used)
    norms = naive.norms(naive.loop_grads(losses, model))
    assert_agrees(pergrad.norms(losses, model), norms, norms)
