"""The noise scale: without bias against the whole data set, and its band."""

from math import inf, isnan

import pytest
import torch
from torch import Tensor

import pergrad


def data(seed: int = 0) -> Tensor:
    """Gradients of 400 examples; tr S about 60, |G|^2 about 2."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(400, 1, generator=generator, dtype=torch.float64) * 2
    noise = torch.randn(400, 40, generator=generator, dtype=torch.float64)
    return scales * noise + 0.22


def truth(G: Tensor) -> tuple[float, float]:
    """(tr S, |G|^2) of the whole data set, S with the denominator of a population."""
    mean = G.mean(0)
    return float((G - mean).square().sum(1).mean()), float(mean.square().sum())


def step(G: Tensor, rows: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return G[rows].norm(dim=1), (w[:, None] * G[rows]).sum(0).norm(), w


@pytest.mark.parametrize("weighted", [False, True])
def test_unbiased(weighted: bool) -> None:
    G = data()
    trace, sq_norm = truth(G)
    noise = pergrad.NoiseScale(window=None)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4000):
        rows = torch.randint(400, (16,), generator=generator)
        w = torch.rand(16, generator=generator, dtype=torch.float64) if weighted else torch.ones(16)
        w = w * 3 if weighted else w / 16  # whatever they sum to
        norms, total, w = step(G, rows, w.double())
        noise.add(norms, total, w if weighted else None)
    assert noise.trace == pytest.approx(trace, rel=0.02)
    assert noise.sq_norm == pytest.approx(sq_norm, rel=0.05)
    assert noise.value == pytest.approx(trace / sq_norm, rel=0.06)


def test_the_band_covers_the_truth() -> None:
    """In 90 to 99 % of 200 runs, after 20 steps, and the band is not idly wide."""
    G = data()
    trace, sq_norm = truth(G)
    inside, finite = 0, 0
    generator = torch.Generator().manual_seed(2)
    for _ in range(200):
        noise = pergrad.NoiseScale()
        for _ in range(20):
            rows = torch.randint(400, (64,), generator=generator)
            norms, total, _ = step(G, rows, torch.full((64,), 1 / 64, dtype=torch.float64))
            noise.add(norms, total)
        inside += noise.low <= trace / sq_norm <= noise.high
        finite += noise.high < 3 * trace / sq_norm
    assert 180 <= inside <= 198
    assert finite > 180


def test_micro_batches_are_one_step() -> None:
    """Norms of all micro-batches and ranks, with the gradient that they add up to."""
    G = data()[:12]
    whole, pieces = pergrad.NoiseScale(), pergrad.NoiseScale()
    whole.add(G.norm(dim=1), G.mean(0).norm())
    parts = torch.cat([G[:5].norm(dim=1), G[5:].norm(dim=1)])
    pieces.add(parts, G.sum(0).norm(), torch.ones(12))  # a sum, not a mean
    assert pieces.value == pytest.approx(whole.value)


def test_few_steps() -> None:
    noise = pergrad.NoiseScale()
    assert isnan(noise.value)
    assert (noise.low, noise.high, noise.steps) == (0.0, inf, 0)
    G = data()
    for start in range(0, 400, 100):
        noise.add(G[start : start + 100].norm(dim=1), G[start : start + 100].mean(0).norm())
        assert noise.low <= noise.value <= noise.high
    assert noise.steps == 4
    assert "4 steps" in repr(noise)


def test_nothing_but_noise() -> None:
    """No mean gradient: the scale is at least something, and may be infinite."""
    generator = torch.Generator().manual_seed(3)
    noise = pergrad.NoiseScale()
    for _ in range(30):
        g = torch.randn(8, 50, generator=generator, dtype=torch.float64)
        noise.add(g.norm(dim=1), g.mean(0).norm())
    assert noise.high == inf
    assert noise.low > 1


def test_window() -> None:
    noise = pergrad.NoiseScale(window=2)
    for k in range(5):
        noise.add(torch.tensor([1.0, 2.0 + k]), 1.0)
    assert noise.steps == 2


def test_weight_zero_needs_no_norm() -> None:
    one, two = pergrad.NoiseScale(), pergrad.NoiseScale()
    one.add(torch.tensor([1.0, 2.0]), 1.2)
    two.add(torch.tensor([1.0, 2.0, float("nan")]), 1.2, torch.tensor([0.5, 0.5, 0.0]))
    assert one.value == two.value


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.tensor([1.0]), 1.0), r"One example alone(.|\n)*micro-batches"),
        ((torch.zeros(0), 0.0), r"One example alone"),
        ((torch.ones(3), 1.0, torch.tensor([0.0, 1.0, 0.0])), r"One example alone"),
        ((torch.ones(2), 1.0, torch.tensor([1.0, -1.0])), r"sum to 0(.|\n)*Leave it out"),
        ((torch.ones(2), 1.0, torch.ones(3)), r"weights(.|\n)*\(2,\)"),
        ((torch.ones(2, 2), 1.0), r"not a tensor or an array \(B,\)"),
        ((torch.tensor([1.0, float("nan")]), 1.0), r"not finite(.|\n)*Leave the step out"),
        ((torch.ones(2), float("inf")), r"not finite"),
    ],
)
def test_bad_input(arguments: tuple, match: str) -> None:
    noise = pergrad.NoiseScale()
    with pytest.raises(pergrad.UsageError, match=match):
        noise.add(*arguments)
    assert noise.steps == 0


def test_bad_settings() -> None:
    with pytest.raises(pergrad.UsageError, match="at least 2 steps"):
        pergrad.NoiseScale(window=1)
    with pytest.raises(pergrad.UsageError, match="between 0 and 1"):
        pergrad.NoiseScale(coverage=95)


def test_sums() -> None:
    """A step by its sums is the step by its norms."""
    norms = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    one, two = pergrad.NoiseScale(), pergrad.NoiseScale()
    one.add(norms, 1.9)
    two.add_sums(float(norms.square().sum()) / 9, 1.9, 1 / 3)
    assert one.value == pytest.approx(two.value, rel=1e-12)
    with pytest.raises(pergrad.UsageError, match=r"One example alone(.|\n)*whole step"):
        two.add_sums(1.0, 1.0, 1.0)
    with pytest.raises(pergrad.UsageError, match=r"not finite(.|\n)*Leave the step out"):
        two.add_sums(float("inf"), 1.0, 0.5)
