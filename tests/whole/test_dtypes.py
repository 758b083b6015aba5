"""The zoo in float32 and bfloat16, and parameters of several dtypes: what no float64 test sees.

In half precision the judge is autograd itself: its own per-example gradients in the same precision
are off by some error against float64, and norms may be off by no more.
"""

import copy
import warnings
from collections.abc import Iterator

import naive
import pytest
import torch
import zoo
from helpers import assert_agrees
from torch import Tensor, nn

import pergrad

# The rounding of float32 (1.2e-7) times the sums and cancellations of small models: measured over
# the zoo at most 80 times that. What a float64 test calls agreement is far below.
RELATIVE = 128 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _fallbacks_are_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        yield


def single(case: zoo.Case, batch: int) -> tuple[object, Tensor]:
    """The same case built in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        params, forward, data, *_ = case.build(batch)
        return params, forward(*data)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("case", zoo.CASES.values(), ids=str)
def test_single_precision(case: zoo.Case) -> None:
    """Other nodes than in float64: fused recurrent layers, attention, fields of EmbeddingBag."""
    params, losses = single(case, max(case.batch))
    keep = {"retain_graph": True, **case.options}
    assert losses.dtype == torch.float32
    G = naive.loop_grads(losses, params)
    norms = naive.norms(G)
    got = pergrad.norms(losses, params, **keep)
    assert got.dtype == torch.float32
    assert_agrees(got, norms, norms, RELATIVE, "norms")
    gram = pergrad.gram(losses, params, **keep)
    assert_agrees(gram, naive.gram(G), norms[:, None] * norms, RELATIVE, "gram")
    J = pergrad.gradients(losses, params, **keep)
    assert_agrees(J.flat(), naive.flat(G), norms[:, None], RELATIVE, "flat")
    squares = pergrad.second_moments(losses, params, **keep)
    for n, g in G.items():
        assert_agrees(squares[n], g.double().square().sum(0), norms.square().sum(), RELATIVE, n)
    if not all(p.is_leaf for p in naive.named(params).values()):
        return  # nothing has a .grad
    weights = torch.linspace(1.0, -2.0, len(losses))
    pergrad.backward(losses, params, weights=weights, **case.options)
    want = naive.weighted_sum(G, weights)
    for n, p in naive.named(params).items():
        grad = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
        assert_agrees(grad, want[n], (weights.abs() * norms).sum(), RELATIVE, n)


def test_parameters_of_several_dtypes() -> None:
    """A float32 parameter cast to float64, and the other way round."""
    p = {
        "a": nn.Parameter(torch.randn(4, 5)),
        "b": nn.Parameter(torch.randn(5, 3, dtype=torch.float64)),
        "c": nn.Parameter(torch.randn(3)),
    }
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    h = (x @ p["a"].double()).tanh().float() @ p["b"].float() + p["c"]
    losses = h.square().sum((1, 2))
    G = naive.loop_grads(losses, p)
    norms = naive.norms(G)
    assert_agrees(pergrad.norms(losses, p, retain_graph=True), norms, norms, 1e-5)
    J = pergrad.gradients(losses, p, retain_graph=True)
    assert_agrees(J.flat(), naive.flat(G), norms[:, None], 1e-5)
    pergrad.backward(losses, p)
    for n, value in naive.weighted_sum(G, torch.ones(3)).items():
        assert p[n].grad.dtype == p[n].dtype
        assert_agrees(p[n].grad, value, norms.sum(), 1e-5, n)


def test_double_losses_of_a_single_precision_model() -> None:
    model = nn.Linear(4, 3)
    losses = model(torch.randn(3, 4)).double().square().sum(1)
    norms = naive.norms(naive.loop_grads(losses, model))
    assert_agrees(pergrad.norms(losses, model), norms, norms, 1e-5)


def errors(values: Tensor, truth: Tensor) -> Tensor:
    return (values.double() - truth).abs() / truth


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("pure", [False, True], ids=["autocast", "pure"])
@pytest.mark.parametrize("depth", [1, 3])
def test_long_sequences_in_half_precision(dtype: torch.dtype, pure: bool, depth: int) -> None:
    """Many positions per example: a Gram of positions would cancel where the sum does not."""
    from zoo.sequences import Block

    B, T, width = 8, 48, 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*(Block(width) for _ in range(depth)), nn.Linear(width, 4))
        x = torch.randn(B, T, width) + 3.0  # a common shift: inputs that are nearly parallel
    exact = copy.deepcopy(model).double()
    truth = naive.loop_grads(exact(x.double()).square().mean((1, 2)), exact)
    if pure:
        model, x = model.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=not pure):
        losses = model(x).float().square().mean((1, 2))
    theirs_by_name = naive.loop_grads(losses, model)
    theirs = errors(naive.norms(theirs_by_name), naive.norms(truth))
    got = pergrad.norms(losses, model, retain_graph=True)
    assert got.dtype == torch.float32
    ours = errors(got, naive.norms(truth))
    # Slack: both come from the same rounded cotangents, and which of the two roundings of their
    # sum happens to be nearer to the truth is chance. A tenth of a unit in the last place.
    chance = 0.1 * torch.finfo(dtype).eps
    assert ours.median() <= theirs.median() + chance
    assert ours.max() <= theirs.max() + chance
    # Each parameter by itself, keys included.
    parts = pergrad.norms_by_parameter(losses, model)
    whole = naive.norms(truth)
    for name, g in truth.items():
        own = naive.norms({name: g})
        ours = (parts[name].double() - own).abs() / whole
        theirs = (naive.norms({name: theirs_by_name[name]}) - own).abs() / whole
        assert ours.max() <= theirs.max() + chance, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_inner_products_in_half_precision(dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        x = torch.randn(8, 6, 16)
    exact = copy.deepcopy(model).double()
    truth = naive.loop_grads(exact(x.double()).square().mean((1, 2)), exact)
    with torch.autocast("cpu", dtype=dtype):
        losses = model(x).float().square().mean((1, 2))
    loop = naive.loop_grads(losses, model)
    norms = naive.norms(truth)
    scale = norms[:, None] * norms
    theirs = (naive.gram(loop) - naive.gram(truth)).abs() / scale
    ours = (pergrad.gram(losses, model).double() - naive.gram(truth)).abs() / scale
    assert ours.max() <= theirs.max() + 0.1 * torch.finfo(dtype).eps
    assert ours.median() <= theirs.median() + 0.1 * torch.finfo(dtype).eps


@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_float16_neither_overflows_nor_underflows(size: float) -> None:
    """Squares of what float16 can hold may be what it cannot."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).half()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.25)
    x = torch.full((3, 2, 8), 1.0, dtype=torch.float16)
    losses = model(x).float().sum((1, 2)) * size
    G = naive.loop_grads(losses, model)
    norms = naive.norms(G)
    assert norms.isfinite().all()
    assert (norms > 0).all()
    assert_agrees(pergrad.norms(losses, model, retain_graph=True), norms, norms, 1e-2)
    assert_agrees(pergrad.gram(losses, model), naive.gram(G), norms[:, None] * norms, 1e-2)
