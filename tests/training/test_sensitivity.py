"""Of one example's part in a private step: never more than the clip, whatever the batch.

python -m pytest -m slow tests/training/test_sensitivity.py    # a thousand batches each, minutes
"""

import pytest
import torch
import torch.nn.functional as F
from private_models import ARCHITECTURES
from torch import Tensor, nn

import pergrad

CLIP = 0.1


def sum_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What a step without noise adds up: by how far the identity for an optimizer moves weights."""
    data = list(zip(x, y, strict=True))
    state = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    private = pergrad.Private(model, optimizer, CLIP, 0.0, data, 1.0, 3)
    for batch in private:
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        private.backward(losses)
    moved = [(a - p.detach()).flatten() for a, p in zip(state, model.parameters(), strict=True)]
    for p, a in zip(model.parameters(), state, strict=True):
        p.data.copy_(a)
    return torch.cat(moved).double() * len(data)


def largest(name: str, dtype: torch.dtype, batches: int) -> float:
    """The most that one example more moved the sum by, over random batches of all scales."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().to(dtype)
    generator = torch.Generator().manual_seed(0)
    most = 0.0
    for _ in range(batches):
        size = int(torch.randint(2, 6, (1,), generator=generator))
        scale = 10 ** float(torch.rand(1, generator=generator) * 4 - 2)
        x = scale * torch.randn(size, 4, generator=generator, dtype=torch.float64).to(dtype)
        y = torch.randint(3, (size,), generator=generator)
        moved = (sum_of(model, x, y) - sum_of(model, x[1:], y[1:])).norm()
        assert moved <= CLIP + 100 * torch.finfo(dtype).eps * (1 + size)  # the weights' rounding
        most = max(most, float(moved))
    return most


def test_there_are_twenty() -> None:
    assert len(ARCHITECTURES) == 20


@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_example_moves_the_sum_by_clip_at_most(name: str, dtype: torch.dtype) -> None:
    assert largest(name, dtype, 6) > 0.5 * CLIP  # the bound is reached: something is clipped


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_thousand_batches(name: str, dtype: torch.dtype) -> None:
    assert largest(name, dtype, 1000) > 0.99 * CLIP
