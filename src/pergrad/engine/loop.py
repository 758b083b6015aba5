"""One backward pass for each example, for parameters whose gradients come in no other way.

Owns: how many examples one call of torch takes, how many gradients are held at once, and the check
that a call for many examples gives what one for a single example does.
Does not know: why the loop is needed, uses, rules.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from pergrad.factors import Dense, Factor, Placed
from pergrad.factors.numeric import result_dtype
from pergrad.graph import nodes
from pergrad.graph.routes import agree
from pergrad.graph.walk import Graph

Emit = Callable[[str, Factor], None]
_MOST_AT_ONCE = 32  # more take no less time
# Measured: with ops of 64 KiB a call for many is two to six times faster, with 500 KiB not at all.
_LARGE_BYTES = 2**18
_WORTH_IT = 4  # of fewer, too large a part would be taken again to be compared


@dataclass(frozen=True, slots=True)
class Ways:
    """How the loop may be run.

    Attributes:
        create_graph: the gradients have a graph themselves.
        free: nobody needs the losses' graph afterwards.
        most: bytes for the gradients of one group.
        many: examples that one call may take; 1 where a function of the user's would see them.
        in_parts: whether `emit` takes the examples of a parameter one part after the other, so that
            one loop is enough however large the model is.
    """

    create_graph: bool
    free: bool
    most: int
    many: int = 1
    in_parts: bool = False


def loop(losses: Tensor, params: Mapping[str, Tensor], emit: Emit, ways: Ways) -> None:
    """Call `emit` with the gradients of all examples for every parameter that a loss reaches."""
    batch = losses.shape[0]
    examples = [list(range(batch))]
    if ways.in_parts:
        size = sum(p.numel() for p in params.values()) * 8
        step = max(1, min(batch, ways.most // max(size, 1)))
        examples = [part[at : at + step] for part in examples for at in range(0, batch, step)]
        groups = [list(params)]
    else:
        groups = _groups(params, batch, ways.most)
    calls = [(group, part) for group in groups for part in examples]
    many = _Many(ways.many)
    for call, (group, part) in enumerate(calls):
        tensors = [params[name] for name in group]
        last = ways.free and call == len(calls) - 1
        columns = _gradients(losses, tensors, part, ways, many, last=last)
        for name, stacked in zip(group, columns, strict=True):
            if stacked is None:
                continue
            rows: Factor = Dense(stacked if ways.create_graph else stacked.detach())
            if len(part) < batch:
                rows = Placed(rows, torch.tensor(part, device="cpu"), batch)
            emit(name, rows)


def most_at_once(graph: Graph, room: int, *, cpu: bool) -> int:
    """How many examples' gradients, at every op on the way, one call had better take.

    As many as fit into `room` bytes. A CPU that is busy with each op gains nothing.
    """
    sizes = [
        sum(prod(meta.shape) * meta.dtype.itemsize for meta in graph.metas(i))
        for i, leads in enumerate(graph.leads) if leads
    ]  # fmt: skip
    mostly = sum(size**2 for size in sizes) / max(sum(sizes), 1)  # small ones do not count
    if cpu and mostly > _LARGE_BYTES:
        return 1
    return max(1, min(_MOST_AT_ONCE, room // max(sum(sizes), 1)))


@dataclass(slots=True)
class _Many:
    """How many examples the next call takes; 1 once such a call was found to be no good."""

    count: int

    def tried(self, losses: Tensor, tensors: Sequence[Tensor], part: list[int]) -> list | None:
        """The gradients of several examples by one call, or None if that cannot be had."""
        seeds = torch.zeros(len(part), *losses.shape, dtype=losses.dtype, device=losses.device)
        seeds[range(len(part)), part] = 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns when it batches an op by a loop
                grads = torch.autograd.grad(
                    losses, tensors, seeds, allow_unused=True, retain_graph=True,
                    is_grads_batched=True,
                )  # fmt: skip
        except (RuntimeError, NotImplementedError):
            return None
        return list(grads)


def _gradients(
    losses: Tensor,
    tensors: Sequence[Tensor],
    examples: list[int],
    ways: Ways,
    many: _Many,
    *,
    last: bool,
) -> list[Tensor | None]:
    """(examples, *shape) for each tensor, None where no loss reaches it."""
    parts: list[list[Tensor | None]] = []
    at = 0
    while at < len(examples):
        part = examples[at : at + many.count]
        if len(part) < _WORTH_IT:
            ends = last and at + 1 == len(examples)
            one = _one(losses, tensors, examples[at], ways, free=ends)
            parts.append([None if g is None else g[None] for g in one])
            at += 1
            continue
        batched = many.tried(losses, tensors, part)
        # Batching rules of single ops have been wrong before: rows of it must agree.
        rows = [0, len(part) - 1] if at == 0 else [at % len(part)]
        if batched is None or not all(
            _same(batched, _one(losses, tensors, part[row], ways, free=False), row) for row in rows
        ):
            many.count = 1
            continue
        parts.append([None if g is None else g.to(result_dtype(g)) for g in batched])
        at += len(part)
    counts = [next((len(g) for g in part if g is not None), 1) for part in parts]
    columns: list[Tensor | None] = []
    for k, p in enumerate(tensors):
        own = [part[k] for part in parts]
        dtype = next((g.dtype for g in own if g is not None), None)
        if dtype is None:
            columns.append(None)
            continue
        columns.append(
            torch.cat(
                [
                    torch.zeros(count, *p.shape, dtype=dtype, device=p.device) if g is None else g
                    for count, g in zip(counts, own, strict=True)
                ]
            )
        )
    return columns


def _same(batched: Sequence[Tensor | None], one: Sequence[Tensor | None], row: int) -> bool:
    """Whether one row of many is what the plain pass gives.

    A gradient that is rounding alone, as of a bias before a batch norm, is another in each way.
    """
    largest = max((_largest(g) for g in one if g is not None), default=0.0)
    return all(
        (a is None and b is None)
        or (a is not None and (_rounding(a[row], b, largest) or agree(a[row].to(b.dtype), b)))
        if b is not None
        else a is None or not bool(a[row].any())
        for a, b in zip(batched, one, strict=True)
    )


def _largest(g: Tensor) -> float:
    """The largest magnitude of the numbers that are finite."""
    sizes = g.abs()
    finite = torch.where(sizes.isfinite(), sizes, 0)
    return float(finite.amax()) if g.numel() else 0.0


def _rounding(a: Tensor, b: Tensor, largest: float) -> bool:
    """Whether both are too small beside the row's largest gradient to be more than rounding."""
    bound = 64 * torch.finfo(b.dtype).eps * largest
    return all(bool((g.abs() <= bound).all()) for g in (a, b))  # never of nan


def _one(
    losses: Tensor, tensors: Sequence[Tensor], example: int, ways: Ways, *, free: bool
) -> list[Tensor | None]:
    """The gradient of one loss."""
    with torch.enable_grad():
        loss = losses[example]
    with nodes.in_our_words():
        grads = torch.autograd.grad(
            loss, list(tensors), allow_unused=True, retain_graph=not free,
            create_graph=ways.create_graph,
        )  # fmt: skip
    strided = [g if g is None or g.layout is torch.strided else g.to_dense() for g in grads]
    return [None if g is None else g.to(result_dtype(g)) for g in strided]


def _groups(params: Mapping[str, Tensor], batch: int, most: int) -> list[list[str]]:
    """Parameters whose rows fit into memory together; each group is one loop."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, p in params.items():
        size = batch * p.numel() * 8
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups
