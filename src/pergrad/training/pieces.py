"""What a watched micro-batch says, from what was read of it.

Owns: the examples' own mean losses and the norms of their gradients; the norm of `.grad`.
Does not know: steps, runs, how a pass is read.
"""

from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor

from pergrad.engine.places import module_of
from pergrad.errors import UsageError
from pergrad.training.reader import Reading
from pergrad.training.step_numbers import Piece


def piece_of(read: Reading, groups: str | None) -> Piece:
    """What was read of a micro-batch, as the gradients of the examples' own mean losses.

    Raises:
        Exception: what kept it from being read.
    """
    tokens = _plain(read.tokens)
    factors = _plain(read.weights)
    weighted = _plain(read.weighted_norms)
    unit = read.unit
    weight = factors * unit * tokens
    nothing = torch.where(tokens == 0, 0.0, float("nan")).double()
    norm = torch.where(weight == 0, nothing, weighted / weight.abs())
    own = torch.full_like(norm, float("nan"))
    if read.has_losses:
        own = _plain(read.losses) / (unit * tokens)
    scalar = read.scalar  # a trainer may have multiplied the loss itself in place meanwhile
    total = float((factors * own).sum()) if scalar is None else float(scalar) * read.factor
    by_group: dict[str, Tensor] = {}
    if groups == "layer":
        for name, norms in read.norms_by_parameter.items():
            layer = module_of(name) or name
            squares = _plain(norms).square()
            by_group[layer] = by_group[layer] + squares if layer in by_group else squares
        scale = torch.where(tokens == 0, 0.0, 1 / (unit * tokens)).abs()
        by_group = {name: squares.sqrt() * scale for name, squares in by_group.items()}
    return Piece(own, tokens, weight, norm, None, by_group, total)


def check_scale(read: Reading, piece: Piece) -> None:
    """A GradScaler whose scale is too large says nothing about examples.

    Raises:
        UsageError: a finite loss was multiplied by something, and gradients are not finite.
    """
    scale = float(read.weights.abs().max()) if len(piece.norm) else 0.0
    if scale > 1 and isfinite(piece.total) and not bool(piece.norm.isfinite().all()):
        raise UsageError(
            f"Gradients are not finite, though the loss is, which was multiplied by {scale:.6g}. A "
            "GradScaler skips such a step and takes a smaller scale; without one, multiply by less."
        )


def _plain(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)


def norm_of(params: Mapping[str, Tensor]) -> tuple[float, bool]:
    """The norm of all .grad, of this rank's shards where they are sharded; and whether they are."""
    norms, sharded = [], False
    for p in params.values():
        grad = p.grad
        if grad is None:
            continue
        if hasattr(grad, "to_local"):
            grad, sharded = grad.to_local(), True
        if grad.layout != torch.strided:
            grad = grad.coalesce().values() if grad.is_sparse else grad.to_dense()
        wide = torch.promote_types(grad.dtype, torch.float32)
        norms.append(torch.linalg.vector_norm(grad.detach(), dtype=wide))
    if not norms:
        return 0.0, sharded
    together = torch.stack([n.to(norms[0].device, torch.float64) for n in norms])
    return float(torch.linalg.vector_norm(together)), sharded
