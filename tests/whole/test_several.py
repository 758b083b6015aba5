"""Several directions at once, J @ V, and several sets of weights, J.T @ C, against the loop."""

import re
import warnings
from collections.abc import Iterator

import naive
import pytest
import torch
import zoo
from helpers import assert_agrees
from torch import Tensor

import pergrad
from pergrad.errors import UsageError

Q = 3


@pytest.fixture(autouse=True)
def _fallbacks_are_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        yield


def several(G: naive.Grads, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        n: torch.randn((Q, *g.shape[1:]), generator=generator, dtype=torch.float64).to(dtype)
        for n, g in G.items()
    }


def check(J: pergrad.GradientMatrix, G: naive.Grads, tolerance: float) -> None:
    """Every form of J @ V and J.T @ C, each column against the loop's."""
    norms, V = naive.norms(G), several(G, J.dtype)
    want = torch.stack([naive.matvec(G, {n: v[q] for n, v in V.items()}) for q in range(Q)], 1)
    flat = torch.cat([v.reshape(Q, -1) for v in V.values()], 1).mT
    scale = norms[:, None] * flat.double().norm(dim=0)
    for form in (V, flat):
        assert_agrees(J @ form, want, scale, tolerance, "J @ V")
        assert (J @ form).dtype == J.dtype
    assert_agrees(J @ flat[:, :1], want[:, :1], scale[:, :1], tolerance, "J @ V, one column")
    assert (J @ flat[:, :0]).shape == (len(J), 0)

    C = torch.linspace(-1.5, 1.0, len(J) * Q, dtype=J.dtype).reshape(len(J), Q)
    got = J.T @ C
    assert list(got) == list(G)
    scale = norms @ C.double().abs()
    for q in range(Q):
        for name, part in naive.weighted_sum(G, C[:, q]).items():
            assert_agrees(got[name][q], part, scale[q], tolerance, f"J.T @ C {name}")
    for name, part in (J.T @ C[:, :0]).items():
        assert part.shape == (0, *G[name].shape[1:])


@pytest.mark.parametrize("case", zoo.CASES.values(), ids=str)
def test_several_on_every_model(case: zoo.Case) -> None:
    B = max(case.batch)
    run, G = case.run(B), zoo.reference(case.name, B)
    check(pergrad.gradients(run.losses, run.params, **case.options), G, 1e-9)


def small(dtype: torch.dtype = torch.float32) -> tuple[pergrad.GradientMatrix, naive.Grads]:
    """A table, a convolution in groups, a norm and a linear layer over positions."""
    generator = torch.Generator().manual_seed(1)

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    params = {
        "table": weight(9, 4), "kernel": weight(4, 2, 3), "scale": weight(4), "last": weight(5, 4)
    }  # fmt: skip
    ids = torch.randint(9, (6, 7), generator=generator)
    x = torch.nn.functional.embedding(ids, params["table"])
    x = torch.nn.functional.conv1d(x.mT, params["kernel"], groups=2, padding=1).mT
    x = torch.nn.functional.layer_norm(x, (4,), params["scale"])
    losses = (x @ params["last"].T).tanh().sum(2).square().sum(1)
    G = naive.loop_grads(losses, params)
    return pergrad.gradients(losses, params), G


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_several_in_both_precisions(dtype: torch.dtype) -> None:
    check(*small(dtype), 1e-5 if dtype == torch.float32 else 1e-9)


def test_an_empty_batch() -> None:
    J, G = small(torch.float64)
    check(J[:0], naive.take(G, slice(0, 0)), 1e-9)


def test_several_are_refused_where_they_do_not_fit() -> None:
    J, G = small()
    P = J.shape[1]
    V = several(G, torch.float32)
    cases = {
        rf"have shape \({P - 1}, 2\).*Pass \(P, Q\), a column.*\({P}, 2\)": torch.ones(P - 1, 2),
        "do not agree on how many.*the same Q": {**V, "table": V["table"][:2]},
        r"`table` \(9, 4\).*with the same Q": {**V, "table": V["table"][0]},
        "Missing: `scale`.*Pass one tensor for each": {n: V[n] for n in V if n != "scale"},
        r"for `last`, whose shape is \(5, 4\)\. Pass \(Q, \*\(5, 4\)\)": {
            **V, "last": V["last"].mT},
        "floating point": {n: v.long() for n, v in V.items()},
    }  # fmt: skip
    for message, wrong in cases.items():
        with pytest.raises(UsageError, match=message):
            J @ wrong
    with pytest.raises(
        UsageError, match=re.escape("(6,), or (6, Q) for Q sets of them, not (5, 2)")
    ):
        J.T @ torch.ones(5, 2)
    with pytest.raises(UsageError, match=r"one number per row, shape \(6,\), not"):
        J.scale(torch.ones(6, 2))
