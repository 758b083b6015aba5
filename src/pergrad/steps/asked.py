"""What can be asked of a compiled step, each as a function from losses to plain tensors.

Owns: `Asked`, and the questions.
Does not know: graphs, compilers, whether numbers are real or recorded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pergrad import api
from pergrad.clipping import Clip
from pergrad.engine.late_norms import Doubts
from pergrad.engine.run import Options, run
from pergrad.engine.totals import Total
from pergrad.engine.user_state import Held
from pergrad.factors import Factor
from pergrad.factors.workspace import workspace
from pergrad.inputs import check_weights
from pergrad.matrix import root

Named = dict[str, Tensor]
Results = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """One question: `answer(losses, named, tensors)`, which changes nothing."""

    name: str
    answer: Callable[[Tensor, Named, Sequence[Tensor]], Results]
    tensors: tuple[Tensor, ...] = ()  # of the caller's, other ones at every call
    constants: tuple[object, ...] = ()  # what the answer was made from besides
    key: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        forms = tuple((t.shape, t.dtype, t.device) for t in self.tensors)
        object.__setattr__(self, "key", (self.name, self.constants, forms))


NORMS = Asked("norms", lambda losses, named, _: (api.norms(losses, named),))
NORMS_BY_PARAMETER = Asked(
    "norms_by_parameter",
    lambda losses, named, _: tuple(api.norms_by_parameter(losses, named).values()),
)
GRAM = Asked("gram", lambda losses, named, _: (api.gram(losses, named),))


def dots(direction: dict[str, Tensor]) -> Asked:
    """Inner products with a direction, whose names are those of parameters."""
    names = tuple(direction)

    def answer(losses: Tensor, named: Named, tensors: Sequence[Tensor]) -> Results:
        parts = dict(zip(names, tensors, strict=True))
        return (api.dots(losses, named, against={name: parts[name] for name in named}),)

    return Asked("dots", answer, tuple(direction.values()), names)


def weighted(weights: Tensor | float | Clip | None) -> Asked:
    """The norms, then the weighted sum for each parameter: of no elements where it is unreached."""
    tensors = (weights,) if isinstance(weights, Tensor) else ()
    clip = weights if isinstance(weights, Clip) else None
    number = float(weights) if isinstance(weights, (int, float)) else 1.0
    constants = ("clip", clip.max_norm, clip.mean) if clip else ("number", number)

    def answer(losses: Tensor, named: Named, tensors: Sequence[Tensor]) -> Results:
        norms, kept = _kept(losses, named)
        if clip is not None:
            rows = clip(norms)
        else:
            rows = check_weights(tensors[0], losses) if tensors else torch.full_like(norms, number)
        with torch.no_grad():  # what an op saved has a history
            sums = [_sum(kept[name], name, rows, p) if name in kept else p.new_empty(0)
                    for name, p in named.items()]  # fmt: skip
        return norms, *sums

    return Asked("backward", answer, tensors, constants if not tensors else ())


def _sum(held: Held, name: str, rows: Tensor, p: Tensor) -> Tensor:
    factor = held.factor(name)
    return factor.weighted_gradient(rows.to(factor.device, factor.dtype)).to(p.dtype)


def _kept(losses: Tensor, named: Named) -> tuple[Tensor, dict[str, Held]]:
    """The norms, and all factors."""
    total = Total(losses, api.result_dtype(named), (losses.shape[0],))
    kept: dict[str, Held] = {}
    doubts = Doubts()

    def emit(name: str, factor: Factor) -> None:
        factor = factor.formed()  # the norm and the sum need the same rows
        doubts.sq_norms(name, factor, total.add)
        kept[name] = Held(factor.materialized())

    with workspace(None, losses.device):
        run(losses, named, Options(), emit, finish=doubts.settle)
    return root(total.value).to(total.dtype).detach(), kept
