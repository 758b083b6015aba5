"""What the ranks of a private run have in common.

Owns: that all begin alike (weights, settings, random numbers), and the sum over ranks.
Does not know: norms, clipping, optimizers.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pergrad.errors import UnsupportedError, UsageError
from pergrad.graph import sharded

_BYTES, _PRIME = 2**20, 2**61 - 1


def rank_and_ranks() -> tuple[int, int]:
    """This process's number, and how many there are."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def check_model(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """A model that no one else sums over ranks, whole on each.

    Raises:
        UnsupportedError: it is wrapped, or sharded.
    """
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise UnsupportedError(
            f"The model is a {type(model).__name__}, which sums gradients that are not clipped. "
            "Pass `model.module` and call that: Private sums over the ranks itself, once a step."
        )
    for name, p in params.items():
        if hasattr(p, "full_tensor") or sharded.is_sharded(p):  # a DTensor, or a gathered one
            raise UnsupportedError(
                f"The parameter `{name}` is sharded over ranks, and Private needs it whole on each."
                " Leave fully_shard out; a small `most` bounds what activations take."
            )


def begin_alike(
    params: Mapping[str, Tensor], settings: Mapping[str, float], generator: torch.Generator
) -> None:
    """All ranks have the weights and settings of rank 0; its random numbers are everyone's.

    Raises:
        UsageError: a rank has others.
    """
    mine: dict[str, Any] = {f"`{name}`": value for name, value in settings.items()}
    mine |= {f"the parameter `{name}`": _digest(p) for name, p in params.items()}
    state = generator.get_state()
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, (mine, state))
    first = ranks[0][0]
    for rank, (other, _) in enumerate(ranks):
        for what in [*first, *other]:
            if first.get(what) != other.get(what):
                raise UsageError(
                    f"Ranks 0 and {rank} do not begin alike: {what} differs. Give all the same "
                    "settings and data, and the same weights: seed before the model is made, or "
                    "broadcast those of rank 0."
                )
    generator.set_state(ranks[0][1])


def _digest(p: Tensor) -> tuple[Any, ...]:
    """Equal for equal bits, whatever the order of adding up."""
    total = 0
    for bits in p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).split(_BYTES):
        places = torch.arange(1, len(bits) + 1)
        total = (31 * total + int((bits * places).sum())) % _PRIME
    return tuple(p.shape), str(p.dtype), total


def add_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Each becomes the sum of all ranks', in place."""
    for tensor in tensors:
        torch.distributed.all_reduce(tensor)
