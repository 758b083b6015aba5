"""One way to compare, for all tests, and what goes with it."""

import importlib
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from pergrad.factors.constants import Constants
from pergrad.factors.methods import choice
from pergrad.factors.methods.choice import Method

Made = tuple[Callable[[], Tensor], nn.Module]  # losses, and of which model

# "Agrees" in float64. 1e-9 is far above rounding (2e-16 times the ops and sums on the way) and far
# below anything that a wrong row, sign or missing term could hide in.
TOLERANCE = 1e-9


def made(make: Callable[[], Made], dtype: torch.dtype = torch.float64) -> Made:
    """What it makes, in this dtype and the same every time."""
    before = torch.get_default_dtype()
    torch.manual_seed(1)
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


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


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, however nested: tensors, arrays, numbers. A NaN equals itself."""
    assert type(a) is type(b), f"{where}: a {type(a).__name__} and a {type(b).__name__}"
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        bits = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        assert torch.equal(*bits), f"{where}: {a} and {b}"
    elif isinstance(a, Mapping):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif type(a).__module__ == "numpy":
        assert a.tobytes() == b.tobytes(), where
    else:
        assert a == b or (a != a and b != b), f"{where}: {a!r} and {b!r}"


def random_states() -> dict[str, Any]:
    """Of torch, Python and numpy."""
    found = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if "numpy" in sys.modules:
        found["numpy"] = sys.modules["numpy"].random.get_state()
    return found


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
