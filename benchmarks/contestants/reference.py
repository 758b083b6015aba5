"""What is right: the loop in float64, on a few examples of a large batch.

Every function returns a record of tensors for `harness.error`; "rows" says which examples.
"""

import copy

import torch
from torch import Tensor

from contestants import loop
from workloads import Step

EXAMPLES = 3

Batch = tuple[Tensor, ...]


def _double(batch: Batch) -> Batch:
    return tuple(t.double() if t.is_floating_point() else t for t in batch)


def _wide(step: Step) -> Step:
    reference = None if step.reference is None else _double(step.reference)
    return Step(copy.deepcopy(step.model).double(), _double(step.batch), step.loss, reference)


def few(count: int) -> list[int]:
    """A few examples: the first two, which everyone computes, and the last."""
    return sorted({*range(min(EXAMPLES - 1, count)), count - 1})


def _pick(batch: Batch, rows: list[int]) -> Batch:
    return tuple(t[rows] for t in batch)


def norms(step: Step) -> dict[str, Tensor]:
    wide, rows = _wide(step), few(len(step))
    return {"rows": torch.tensor(rows), "norms": loop.norms(wide)(_pick(wide.batch, rows))}


lengths = norms


def gram(step: Step) -> dict[str, Tensor]:
    wide, rows = _wide(step), few(len(step))
    J = loop.flat(wide, _pick(wide.batch, rows))
    return {"rows": torch.tensor(rows), "values": J @ J.T, "left": J.norm(dim=1),
            "right": J.norm(dim=1), "columns": torch.tensor(rows)}  # fmt: skip


def cross(step: Step) -> dict[str, Tensor]:
    assert step.reference is not None
    wide, rows = _wide(step), few(len(step))
    columns = few(len(step.reference[0]))
    J = loop.flat(wide, _pick(wide.batch, rows))
    K = loop.flat(wide, _pick(wide.reference, columns))
    return {"rows": torch.tensor(rows), "values": J @ K.T, "left": J.norm(dim=1),
            "right": K.norm(dim=1), "columns": torch.tensor(columns)}  # fmt: skip


def direction(step: Step) -> dict[str, Tensor]:
    wide, rows = _wide(step), few(len(step))
    J = loop.flat(wide, _pick(wide.batch, rows))
    v = torch.cat([t.double().flatten() for t in step.direction().values()])
    # what an inner product with a direction unrelated to the gradient amounts to
    size = v.norm() / len(v) ** 0.5
    return {"rows": torch.tensor(rows), "values": J @ v, "left": J.norm(dim=1) * size}


def clip(step: Step) -> dict[str, Tensor]:
    """With the error of torch's own backward in the model's dtype: a sum of gradients that cancel
    differs from the one in float64 by whatever a ReLU does that rounding takes across zero.
    """
    wide = _wide(step)
    found, total = loop.clip(wide)(wide.batch)
    total = torch.cat([g.flatten() for g in total.values()])
    weights = (1 / found).clamp(max=1)
    params = list(step.params().values())
    losses = step.losses(step.batch)
    own = torch.autograd.grad(
        (losses * weights.to(losses)).sum(), params, allow_unused=True, materialize_grads=True
    )
    off = torch.cat([g.flatten().double() for g in own]) - total
    return {"rows": torch.arange(len(step)), "norms": found, "sum": total,
            "of autograd": off.norm() / total.norm()}  # fmt: skip
