"""Norms far below or above 1 of a parameter that is one number, as of any other."""

import naive
import pytest
import torch
from helpers import assert_agrees
from torch import nn

import pergrad


@pytest.mark.parametrize("size", [1e-30, 0.0, 1e25, float("nan")])
@pytest.mark.parametrize("examples", [2, 40])
def test_a_scalar_parameter(examples: int, size: float) -> None:
    shift = nn.Parameter(torch.tensor(0.5))
    x = torch.linspace(1, 2, examples)
    x[1] = size

    def losses() -> torch.Tensor:
        return x * shift

    got = pergrad.norms(losses(), [shift])
    if size != size:
        assert got.isnan().tolist() == [k == 1 for k in range(examples)]
        return
    want = naive.norms(naive.loop_grads(losses(), [shift]))
    assert_agrees(got, want, want, 1e-6)
