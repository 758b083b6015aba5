"""What cannot be had raises, names the place and says what to do: never a partial number."""

import naive
import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import pergrad
from pergrad.engine import pass_ as serving
from pergrad.graph import nodes, ops, plan
from pergrad.graph.layout import Layout


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)  # now and then all hidden units are dead
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def losses(model: nn.Module) -> Tensor:
    return model(torch.ones(5, 3) + torch.arange(5.0)[:, None]).square().sum(1)


def test_reentrant_checkpoint(model: nn.Module) -> None:
    x = torch.ones(5, 3, requires_grad=True)
    values = checkpoint(model, x, use_reentrant=True).square().sum(1)
    with pytest.raises(pergrad.UnsupportedError, match=r"re-entrant(.|\n)*use_reentrant=False"):
        pergrad.norms(values, model)


def test_parameters_that_are_shells(model: nn.Module) -> None:
    shell = nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    with pytest.raises(pergrad.UnsupportedError, match=r"`shell` is a(.|\n)*ordinary tensors"):
        pergrad.norms(losses(model), {"shell": shell})


class TooFew(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, w):
        ctx.save_for_backward(w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        (w,) = ctx.saved_tensors
        return g * w


def test_a_function_that_returns_too_few_gradients() -> None:
    x, w = torch.ones(4, 3), nn.Parameter(torch.ones(3))
    with (
        pytest.warns(pergrad.FallbackWarning),
        pytest.raises((pergrad.UnsupportedError, RuntimeError), match=r"TooFew(.|\n)*gradient"),
    ):
        pergrad.norms(TooFew.apply(x, 2.0, w).sum(1), [w])


@pytest.mark.parametrize("read", [nodes.saved, nodes.attribute])
def test_a_field_that_this_torch_does_not_save(read, model: nn.Module) -> None:
    with pytest.raises(pergrad.UnsupportedError, match=r"does not save `strange`(.|\n)*version"):
        read(losses(model).grad_fn, "strange")


@pytest.mark.parametrize("field", ["mat1", "alpha", "beta"])
def test_a_release_of_torch_that_saves_something_else(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field that has another name there is not taken for one that was left out."""
    plan.clear()
    w, b, x = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2)), torch.ones(5, 3)
    values = torch.addmm(b, x, w, alpha=2, beta=3).square().sum(1)

    def other(node: object, name: str, *default: object) -> object:
        if name == f"_saved_{field}":
            if default:
                return default[0]
            raise AttributeError(name)
        return getattr(node, name, *default)

    for module in (nodes.reading, nodes.unpacking):
        monkeypatch.setattr(module, "getattr", other, raising=False)
    with pytest.raises(pergrad.UnsupportedError, match=rf"does not save `{field}`(.|\n)*version"):
        pergrad.norms(values, [w, b])


def test_inside_a_transform_of_torch_func(model: nn.Module) -> None:
    x, params = torch.randn(5, 3), dict(model.named_parameters())

    def total(params: dict) -> Tensor:
        values = torch.func.functional_call(model, params, (x,)).square().sum(1)
        return pergrad.norms(values, params).sum()

    with pytest.raises(pergrad.UsageError, match=r"torch\.func(.|\n)*outside(.|\n)*create_graph"):
        torch.func.grad(total)(params)
    with pytest.raises(pergrad.UsageError, match=r"torch\.func(.|\n)*outside(.|\n)*create_graph"):
        torch.func.vmap(lambda row: pergrad.norms(model(row).square(), model))(x)


def test_a_renamed_number_is_no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sum_dim` without `dim` must not be taken for a sum over everything."""
    read = nodes.attribute
    monkeypatch.setattr(nodes, "attribute", lambda node, field: read(node, field + "_renamed"))
    w, x = torch.ones(3, requires_grad=True), torch.ones(4, 3)
    with pytest.raises(pergrad.UnsupportedError, match=r"`dim_renamed` with SumBackward1"):
        pergrad.norms((w * x).sin().sum(1), [w])


class Bare:
    """A node of a release of torch that keeps no metadata."""

    def name(self) -> str:
        return "BareBackward0"


@pytest.mark.parametrize("read", [nodes.metas, nodes.outline])
def test_a_torch_without_metadata(read) -> None:
    with pytest.raises(pergrad.UnsupportedError, match=r"`_input_metadata`(.|\n)*version"):
        read(Bare())


def test_a_use_that_the_pass_misses(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    serve = serving.Pass.serve

    def forgetful(self, use, cotangents):
        if use.site is not self.plan.sites[0]:
            serve(self, use, cotangents)

    monkeypatch.setattr(serving.Pass, "serve", forgetful)
    with pytest.raises(pergrad.UnsupportedError, match=r"did not come by(.|\n)*`2\.weight`"):
        pergrad.norms(losses(model), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_backward_of_torchs_that_is_wrong(dtype: torch.dtype) -> None:
    """Its batch norm's, of one picture that lies permuted (findings/torch_batch_norm_*.sh).

    The message names the op and the remedy, which is one for torch's own gradients as well.
    """
    torch.manual_seed(0)
    x, c = torch.randn(5, 6, 3, dtype=dtype), torch.randn(1, 3, 5, 6, dtype=dtype)
    w = torch.randn(5, 6, 1, dtype=dtype, requires_grad=True)

    def losses(picture: Tensor) -> Tensor:
        return (nn.functional.batch_norm(picture, None, None, training=True) * c).sum((0, 2, 3))

    plan.clear()
    match = r"torch's own(.|\n)*`native_batch_norm`(.|\n)*parameter `w`(.|\n)*\.contiguous\(\)"
    with pytest.raises(pergrad.UnsupportedError, match=match):
        pergrad.norms(losses((x * w).permute(2, 0, 1)[None]), {"w": w})
    mended = losses((x * w).permute(2, 0, 1)[None].contiguous())
    want = naive.norms(naive.loop_grads(mended, [w]))
    close = 1e-12 if dtype is torch.float64 else 1e-5
    torch.testing.assert_close(pergrad.norms(mended, [w]), want.to(dtype), rtol=close, atol=close)


@pytest.mark.parametrize("when", ["once", "always"])
def test_a_derived_layout_that_does_not_hold(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Were a transfer function wrong, no number would come of it."""

    def wrong(op: ops.Op, out: Layout) -> list:
        return [Layout(out.shape, out.owner.flip(0))]

    monkeypatch.setattr(ops.declared("relu"), "owners", wrong)
    plan.clear()
    with pytest.raises(
        pergrad.UnsupportedError, match=r"does not follow the examples(.|\n)*report"
    ):
        pergrad.norms(losses(model), model, check_layout=when)
    plan.clear()


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


def test_an_unknown_layout_that_may_not_be_measured(model: nn.Module) -> None:
    x = torch.randn(5, 3)
    values = model[2](Same.apply(model[0](x))).sum(1)
    with pytest.raises(pergrad.UsageError, match=r"`0\.(weight|bias)`(.|\n)*check_layout=\"once\""):
        pergrad.norms(values, model, check_layout="never")
    assert pergrad.norms(model(x).sum(1), model, check_layout="never").shape == (5,)


class Hidden(torch.autograd.Function):
    """A block that runs its own backward, as reversible layers do."""

    @staticmethod
    def forward(ctx, block, x):
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.block(x)
        torch.autograd.backward(y, g)
        return None, x.grad


@pytest.mark.parametrize("before", [None, 2.0])
@pytest.mark.parametrize("verb", [pergrad.norms, pergrad.gram, pergrad.gradients, pergrad.explain])
def test_parameters_that_bypass_the_graph(verb, before: float | None) -> None:
    first, block, last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
    model = nn.ModuleList([first, block, last])
    for p in model.parameters():
        p.grad = None if before is None else torch.full_like(p, before)
    values = last(Hidden.apply(block, first(torch.randn(4, 3)))).square().sum(1)
    with pytest.raises(pergrad.UnsupportedError, match=r"hides 2 parameters(.|\n)*`1\.weight`"):
        verb(values, model)
    for p in model.parameters():
        assert p.grad is None if before is None else bool((p.grad == before).all())


@pytest.mark.parametrize("served_by", ["weight", "input"])
def test_memory_that_is_taken_away(model: nn.Module, served_by: str) -> None:
    """torch would read it all the same, and end the process."""
    plan.clear()
    hidden = model[0](torch.randn(5, 3))
    values = (hidden * model[2].weight[0].exp()).tanh() @ torch.randn(4, 2)
    values = torch.nn.functional.linear(values, model[2].weight[:, :2]).sum(1)
    storage = (model[2].weight if served_by == "weight" else hidden).untyped_storage()
    storage.resize_(0)
    with pytest.raises(pergrad.UnsupportedError, match=r"`\w+` needs has been freed(.|\n)*keep"):
        pergrad.norms(values, model)
