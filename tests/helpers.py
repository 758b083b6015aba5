"""One way to compare, for all tests, and what goes with it."""

import importlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from pergrad.factors.constants import Constants
from pergrad.factors.methods import choice
from pergrad.factors.methods.choice import Method

# "Agrees" in float64. 1e-9 is far above rounding (2e-16 times the ops and sums on the way) and far
# below anything that a wrong row, sign or missing term could hide in.
TOLERANCE = 1e-9


def assert_agrees(
    got: Tensor, want: Tensor, scale: Tensor | float, tolerance: float = TOLERANCE, what: str = ""
) -> None:
    """|got - want| <= tolerance * scale, entry by entry; `scale` broadcasts against `want`.

    The scale is what the number is relative to: the example's norm for norms, the product of two
    norms for an inner product (Cauchy-Schwarz). Zero scale means exactly equal.
    """
    assert isinstance(got, Tensor), f"{what}: a {type(got).__name__}"
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    bound = tolerance * torch.as_tensor(scale, dtype=torch.float64).expand(want.shape)
    wrong = ~((got - want).abs() <= bound)  # a NaN is wrong
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} entries differ\n"
        f"got {got}\nexpected {want}\nscale {scale}"
    )


def assert_rows_agree(
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    *,
    norms: Tensor,
    tolerance: float = TOLERANCE,
    what: str = "",
) -> None:
    """name -> (B, ...) on both sides; every entry relative to the norm of its whole row."""
    assert list(got) == list(want), f"{what}: names {list(got)}, not {list(want)}"
    for name in want:
        scale = norms.reshape(-1, *[1] * (want[name].dim() - 1))
        assert_agrees(got[name], want[name], scale, tolerance, f"{what} {name}")


def direction(params: Mapping[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    """A tensor for each parameter, always the same for one seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in params.items()
    }


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where nothing can be compiled, until the test is over."""
    kernels = importlib.import_module("pergrad.kernels.fused")
    monkeypatch.setattr(kernels, "_fused", lambda dtype: "not in this test")


def only(name: str) -> AbstractContextManager[object]:
    """Every choice among methods for norms falls to one of this name.

    At a single position to "rows"; without the compiled kernel to what it does, by torch.
    """

    def chosen(methods: Iterable[Method], sizes: Any, by: Constants) -> Method:
        named = {method.name: method for method in methods}
        if named["rows"].available(sizes):
            return named["rows"]
        without = {"fused": "gram", "fused shift": "shift"}
        there = name not in without or named[name].available(sizes)
        return named[name if there else without[name]]

    return mock.patch.object(choice, "cheapest", chosen)
