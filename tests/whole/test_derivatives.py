"""create_graph=True on every model of the zoo: derivatives of results are those of the loop's."""

import warnings
from collections.abc import Iterator

import naive
import pytest
import torch
import zoo
from helpers import assert_agrees, direction
from torch import Tensor

import pergrad

# scale_grad_by_freq divides what should be the gradient; torch forgets to in second derivatives.
LARGEST = [
    pytest.param(c, max(c.batch), id=c.name)
    for c in zoo.CASES.values()
    if c.name != "embedding_scaled_by_frequency"
]


@pytest.fixture(autouse=True)
def _fallbacks_are_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        yield


def derivative(value: Tensor, run: zoo.Run) -> Tensor:
    """(P,); zeros where the value depends on parameters in no differentiable way."""
    params = list(run.named.values())
    if not value.requires_grad:
        return torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
    grads = torch.autograd.grad(
        value, params, allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return torch.cat([g.to_dense().reshape(-1) for g in grads])


def numbers(norms: Tensor, gram: Tensor, dots: Tensor) -> list[Tensor]:
    """Scalars that weigh every entry differently."""
    B = len(norms)
    c = torch.linspace(-1.0, 2.0, B, dtype=torch.float64)
    return [norms.mean(), (norms.square() * c).sum(), (gram * c[:, None]).sin().sum(),
            (dots * c).square().sum()]  # fmt: skip


def loops(run: zoo.Run, v: dict[str, Tensor]) -> list[Tensor] | None:
    """The derivatives by the loop; None where torch has no second derivative of an op."""
    flat = torch.cat([part.reshape(-1) for part in v.values()])
    try:
        rows = naive.live_rows(run.losses, run.params)
        values = numbers(rows.norm(dim=1), rows @ rows.T, rows @ flat)
        return [derivative(value, run) for value in values]
    except RuntimeError as error:
        if "not implemented" in str(error):
            return None
        raise


@pytest.mark.parametrize(("case", "B"), LARGEST)
def test_derivatives_of_results(case: zoo.Case, B: int) -> None:
    run = case.run(B)
    v = direction(run.named)
    want = loops(run, v)
    if want is None:
        return
    options = {**case.options, "create_graph": True, "retain_graph": True}
    norms = pergrad.norms(run.losses, run.params, **options)
    gram = pergrad.gram(run.losses, run.params, **options)
    dots = pergrad.dots(run.losses, run.params, against=v, **options)
    got = [derivative(value, run) for value in numbers(norms, gram, dots)]
    for what, mine, theirs in zip(("norms", "squares", "gram", "dots"), got, want, strict=True):
        assert_agrees(mine, theirs, theirs.abs().max() + 1e-6, 1e-8, what)


MATRICES = [
    "mlp", "gpt_tied", "conv2d", "weight_norm", "called_twice", "layer_norm_3d",
    "permuted_losses", "mixture_of_experts",
]  # fmt: skip


@pytest.mark.parametrize("name", MATRICES)
def test_derivatives_of_a_matrix(name: str) -> None:
    """Also of products with a matrix of another batch, whose graph is another one."""
    one, two = zoo.CASES[name].run(3), zoo.CASES[name].run(3, seed=1)
    J = pergrad.gradients(one.losses, one.params, create_graph=True, retain_graph=True)
    K = pergrad.gradients(two.losses, two.params, create_graph=True, retain_graph=True)
    left, right = naive.live_rows(one.losses, one.params), naive.live_rows(two.losses, two.params)
    c = torch.linspace(-1.0, 2.0, 3, dtype=torch.float64)
    pairs = [
        ((J @ K.T).sin().sum(), (left @ right.T).sin().sum()),
        (J.row_dots(K).sin().sum(), (left * right).sum(1).sin().sum()),
        (J.norms().sum() * K.norms().sum(), left.norm(dim=1).sum() * right.norm(dim=1).sum()),
        (J[[2, 0]].flat().sin().sum(), left[[2, 0]].sin().sum()),
        (sum(g.sin().sum() for g in (J.T @ c).values()), (c @ left).sin().sum()),
        (J.scale(c).norms_by_parameter()[J.names[0]].sum(),
         (left[:, : next(iter(one.named.values())).numel()] * c[:, None]).norm(dim=1).sum()),
    ]  # fmt: skip
    for got, want in pairs:
        for run in (one, two):
            expected = derivative(want, run)
            assert_agrees(derivative(got, run), expected, expected.abs().max() + 1e-6, 1e-8)
    assert not J.detach().norms().requires_grad


def test_a_penalty_on_norms_trains() -> None:
    """What create_graph is for: the mean norm goes down."""
    run = zoo.CASES["mlp"].run(3)
    optimizer = torch.optim.SGD(run.named.values(), lr=0.05)
    seen = []
    for _ in range(20):
        norms = pergrad.norms(run.again(), run.params, create_graph=True)
        seen.append(float(norms.mean().detach()))
        optimizer.zero_grad()
        norms.mean().backward()
        optimizer.step()
    assert seen[-1] < 0.9 * seen[0]
