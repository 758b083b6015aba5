"""Random models: a fixed range of seeds, every seed that ever failed, and a sweep on request."""

import warnings
from collections import Counter

import pytest
import torch
from tests.whole.fuzz.judge import (
    check,
    judge,
    loop_is_wrong,
    repeats_itself,
    second_is_wrong,
    truth,
)
from tests.whole.fuzz.models import Model

import pergrad

QUICK = range(500)
STEP = 100

# What each of them once showed is in the comment; what a seed builds changes with models.py.
ONCE_FAILED = {
    10363: "a parameter without dimensions in a loop over scalar examples",
    2250: "the same",
    12815: "the same",
    206: "a real parameter added to complex numbers",
    254: "a complex product",
    753: "an in-place slice inside a checkpoint",
    40342: "the same",
    20285: "torch's own batch norm backward is wrong for a permuted 5-D input",
    53593: "a batched product with its own weights, below interacting examples, by the fallback",
    55895: "torch's layer norm over one element has rounding for a gradient",
    9507: "the same of an expanded and permuted 4-D input, below a user's hook",
    6278: "a group norm of non-contiguous cotangents",
    316685: "torch's second derivatives are no derivatives, pergrad's are",
    317742: "torch's batch norm backward, at a tensor that is computed from parameters",
    301003: "a table joined with zeros, less its mean",
    331558: "a table joined with zeros, summed cumulatively",
    333570: "a weight joined with zeros",
    40567: "a tensor asked for together with the parameter it is computed from",
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sweep(seeds: range) -> Counter:
    counts: Counter = Counter()
    failed = []
    for seed in seeds:
        verdict = judge(seed)
        counts[verdict.kind] += 1
        if verdict.failed:
            failed.append((seed, verdict.kind, verdict.detail[:200]))
    assert not failed, failed
    return counts


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(first, marks=[pytest.mark.slow] if first >= 300 else [])
        for first in range(QUICK.start, QUICK.stop, STEP)
    ],
)
def test_random_models_are_exact_or_refused(first: int) -> None:
    counts = sweep(range(first, first + STEP))
    assert counts["exact"] > 0.7 * STEP
    # Where nothing in the graph tells a table from a batch, pergrad may ask before it goes on.
    assert counts["refused"] + counts["unsupported"] <= 0.05 * STEP


@pytest.mark.parametrize("seed", ONCE_FAILED)
def test_seed_that_once_failed(seed: int) -> None:
    verdict = judge(seed, everything=True)
    assert not verdict.failed, (verdict.kind, verdict.detail)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10_000, 20_000, STEP))
def test_ten_thousand_random_models(first: int) -> None:
    sweep(range(first, first + STEP))


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_is_one_model(seed: int) -> None:
    one, two = Model(seed), Model(seed)
    first, second = one.forward(one.data()), two.forward(two.data())
    assert one.log == two.log
    assert torch.equal(first, second)
    assert torch.equal(first, one.forward(one.data()))  # also when the parameters exist already
    assert [p.shape for p in one.params.values()] == [p.shape for p in two.params.values()]


def test_the_judge_does_not_blame_torch_without_need() -> None:
    """What it asks torch about: repetition and second derivatives; of models with all right."""
    for seed in (0, 2, 5, 7):
        model = Model(seed)
        model.forward(model.data())
        assert repeats_itself(model, 0)
        assert not loop_is_wrong(model, 0)
        assert not second_is_wrong(model, 0, on_mixing="exact")


def test_the_judge_sees_a_wrong_number() -> None:
    model = Model(2)
    losses = model.forward(model.data())
    J = truth(losses, model.params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(losses, model.params, ("flat",), J)
        J[0, J[0].abs().argmax()] *= 1 + 1e-7
        with pytest.raises(Exception, match="off by"):
            check(losses, model.params, ("flat",), J)


def exact(losses: torch.Tensor, params: dict[str, torch.Tensor], **options: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(losses, params, ("flat", "matrix", "gram", "by_parameter", "dots"), **options)


def leaf(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def test_parameter_without_dimensions_in_a_loop_over_scalars() -> None:
    w, x = leaf(), leaf(3).detach()
    exact(torch.stack([x[i].sin() * w for i in range(3)]), {"w": w})


def test_in_place_slice_inside_a_checkpoint() -> None:
    w, v, x = leaf(4), leaf(), leaf(3, 4).detach()

    def block(x: torch.Tensor) -> torch.Tensor:
        y = (x * w).clone()
        y.select(1, 0).mul_(v)
        return y * 1.5

    losses = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sin().sum(1)
    exact(losses, {"w": w, "v": v})


def test_own_weights_of_a_batched_product_below_interacting_examples() -> None:
    w, x = leaf(2, 4, 2), leaf(2, 4, 4).detach()
    exact((x @ w).sort(0).values.square().sum((1, 2)), {"w": w}, on_mixing="exact")


@pytest.mark.parametrize("cut", [lambda w: w[torch.tensor([0, 1, 1])], lambda w: w[:3].exp()])
def test_tensor_in_the_middle_of_the_graph(cut) -> None:
    w, x = leaf(5, 4), leaf(3, 4).detach()
    v = cut(w)
    exact((x * v).sin().sum(1), {"v": v})


def test_a_tensor_in_the_middle_and_the_parameter_it_comes_from() -> None:
    """Both are asked for: the cotangent that a use and a requested tensor share serves both."""
    w, ids = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 3])
    middle = w[ids]
    losses = middle.square().sum(1)
    norms = pergrad.norms_by_parameter(losses, {"w": w, "middle": middle}, retain_graph=True)
    own = 2 * middle.detach().norm(dim=1)
    torch.testing.assert_close(norms["middle"], own)
    torch.testing.assert_close(norms["w"], own)
