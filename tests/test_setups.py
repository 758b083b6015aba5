"""Ways in which people run models: compiled, with parameters passed in, under other contexts."""

import naive
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import pergrad


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
Y = torch.tensor([0, 2, 1, 1, 0, 2])


def losses(call: nn.Module) -> Tensor:
    return F.cross_entropy(call(X), Y, reduction="none")


def test_a_compiled_model_is_one_op(model: nn.Module) -> None:
    """Exact by the fallback, which says what it costs and how to have rules instead."""
    compiled = torch.compile(model, backend="aot_eager")
    truth = naive.norms(naive.loop_grads(losses(model), model))
    values = losses(compiled)
    with pytest.warns(pergrad.FallbackWarning, match=r"CompiledFunction(.|\n)*force_eager"):
        norms = pergrad.norms(values, compiled)
    torch.testing.assert_close(norms, truth)
    with torch.compiler.set_stance("force_eager"):
        values = losses(compiled)
    assert pergrad.explain(values, compiled).exact_share == 1
    torch.testing.assert_close(pergrad.norms(values, compiled), truth)
    torch.compiler.reset()


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
