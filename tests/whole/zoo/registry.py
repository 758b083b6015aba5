"""What a case of the zoo is, and how it is run.

A case is a function of the batch size B with a docstring that says what is hard about it. It builds
and returns `(params, forward, data)`: the model, a mapping or a list; `forward(*data) -> (B,)`
losses; and a tuple of tensors whose first dimension is the example, so that example i alone is
`forward(*[d[i : i + 1] for d in data])`. A fourth item, a function i -> loss, says how else to
compute one example alone.

Builders and forward passes run in float64 and with a fixed seed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import naive
import torch
from torch import Tensor

CASES: dict[str, "Case"] = {}


@contextmanager
def settled(seed: int) -> Iterator[None]:
    """float64, and a seed of its own."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@dataclass(frozen=True)
class Run:
    """One forward pass of a case."""

    case: "Case"
    params: Any
    losses: Tensor
    alone: Callable[[int], Tensor]
    again: Callable[[], Tensor]  # the same forward pass with the same weights once more

    @property
    def named(self) -> dict[str, Tensor]:
        return naive.named(self.params)


@dataclass(frozen=True)
class Case:
    """A named small hard model."""

    name: str
    build: Callable[[int], tuple]
    batch: tuple[int, ...]
    mixes: str  # "no", "yes", or "maybe": nobody can tell, so refused or exact, never wrong
    deterministic: bool  # a second forward pass with one example does the same
    rule: bool  # every use of every parameter has to be served by a rule

    def __str__(self) -> str:
        return self.name

    def run(self, batch: int, seed: int = 0) -> Run:
        with settled(seed):
            params, forward, data, *rest = self.build(batch)

            def default(i: int) -> Tensor:
                return forward(*[d[i : i + 1] for d in data])

            one = rest[0] if rest else default

            def alone(i: int) -> Tensor:
                with settled(seed + 1):
                    return one(i)

            def again() -> Tensor:
                with settled(seed + 1):
                    return forward(*data)

            return Run(self, params, again(), alone, again)

    @property
    def options(self) -> dict[str, str]:
        """What a verb has to be told to be exact here."""
        return {} if self.mixes == "no" else {"on_mixing": "exact"}


def case(
    *,
    batch: tuple[int, ...] = (0, 1, 3),
    mixes: str = "no",
    deterministic: bool = True,
    rule: bool = False,
) -> Callable[[Callable[[int], tuple]], Callable[[int], tuple]]:
    """Register a builder under its name."""

    def register(build: Callable[[int], tuple]) -> Callable[[int], tuple]:
        name = build.__name__
        assert name not in CASES, f"two cases {name}"
        assert build.__doc__, f"{name}: what is hard about it?"
        CASES[name] = Case(name, build, batch, mixes, deterministic, rule)
        return build

    return register


@cache
def reference(name: str, batch: int, seed: int = 0) -> naive.Grads:
    """The loop's gradients of a case. Kept, and equal for every run: runs are seeded."""
    run = CASES[name].run(batch, seed)
    return naive.loop_grads(run.losses, run.params, retain_graph=False)


def each_batch(
    *, mixes: tuple[str, ...] = ("no", "yes", "maybe"), single_is_slow: bool = False, every: int = 1
) -> list[Any]:
    """Parameters (case, B) for pytest; slow are, if asked, one example alone, and all cases but
    every n-th.
    """
    import pytest

    def is_slow(k: int, c: Case, B: int) -> bool:
        return k % every > 0 or (single_is_slow and B == 1 < max(c.batch))

    return [
        pytest.param(c, B, id=f"{c.name}-{B}", marks=[pytest.mark.slow] if is_slow(k, c, B) else [])
        for k, c in enumerate(CASES.values())
        if c.mixes in mixes
        for B in c.batch
    ]


def loss(out: Tensor) -> Tensor:
    """(B, ...) -> (B,), with a gradient that differs from entry to entry."""
    x = out.flatten(1)
    w = torch.linspace(-1.0, 1.5, x.shape[1], dtype=x.dtype)
    return (x * w).sum(1).sin() + 0.3 * (x.square() * (2 + w)).sum(1)
