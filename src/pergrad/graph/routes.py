"""From the operand of a use down to the parameters it was computed from.

Owns: the parameter-only part of the graph: routes that only rearrange a parameter (transpose,
view, cast, slice), and vector-Jacobian products through everything else.
Does not know: examples, factors' algebra, rules.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pergrad.graph import nodes
from pergrad.graph.ops import Op, Step, traits
from pergrad.graph.walk import Graph, Slot
from pergrad.recording import flagged, is_recorded


@dataclass(frozen=True, slots=True)
class Route:
    """How a gradient at `start` becomes one of the parameter at `target`.

    `steps` rearrange it (an isometry); None if a vector-Jacobian product is needed. A look-up in a
    table is a step if its indices turn out to be neighbours: `settled` tells.
    """

    start: Slot
    target: Slot
    steps: tuple[Step, ...] | None
    reads_indices: bool = field(init=False)  # whether a step depends on indices, which are data

    def __post_init__(self) -> None:
        looks_up = any(step[0] == "look up" for step in self.steps or ())
        object.__setattr__(self, "reads_indices", looks_up)


def settled(graph: Graph, way: Route) -> tuple[Step, ...] | None:
    """The steps of a route now that its indices can be read; None: use `pull`."""
    if not way.reads_indices or way.steps is None:
        return way.steps
    steps: list[Step] = []
    for step in way.steps:
        if step[0] == "look up":
            (table,) = graph.edges[step[1]]
            function = traits(graph.op(step[1])).steps
            assert function is not None
            read = function(_op(graph, (step[1], 0), table), 0)
            if read is None:
                return None
            steps += read
        else:
            steps.append(step)
    return tuple(steps)


def routes(graph: Graph, start: Slot) -> list[Route]:
    """Every parameter that a gradient arriving at `start` reaches."""
    found: list[Route] = []
    steps: list[Step] = []
    at = start
    while True:
        if at in graph.targets:
            found.append(Route(start, at, tuple(steps)))
            if not graph.children(at[0]):
                return found
        after = _step(graph, at)
        if after is None:
            break
        more, at = after
        steps += more
    done = {route.target for route in found}
    below = _targets_below(graph, at[0])
    found += [Route(start, target, None) for target in below if target not in done]
    return found


def _step(graph: Graph, at: Slot) -> tuple[tuple[Step, ...], Slot] | None:
    """One op that only rearranges its input; None for anything else."""
    index, number = at
    if len(graph.edges[index]) != 1:
        return None
    (child,) = graph.edges[index]
    entry = traits(graph.op(index))
    if child[0] < 0 or not graph.leads[child[0]] or entry.steps is None:
        return None
    if entry.steps_read_data:
        return (("look up", index),), child
    found = entry.steps(_op(graph, at, child), number)
    return None if found is None else (found, child)


def _op(graph: Graph, at: Slot, child: Slot) -> Op:
    """An op of one input that leads to a parameter."""
    index, number = at
    metas = graph.metas(index)
    both = metas[number].dtype, graph.metas(child[0])[child[1]].dtype
    return Op(
        graph.nodes[index],
        graph.op(index),
        [meta.shape for meta in metas],
        [graph.shape(child)],
        [True],
        real=all(dtype.is_floating_point for dtype in both),
    )


def _targets_below(graph: Graph, index: int) -> list[Slot]:
    """Targets that lie strictly below a node."""
    found: list[Slot] = []
    seen = {index}
    stack = [index]
    while stack:
        for child, number in graph.edges[stack.pop()]:
            if child < 0 or not graph.leads[child]:
                continue
            if (child, number) in graph.targets and (child, number) not in found:
                found.append((child, number))
            if child not in seen:
                seen.add(child)
                stack.append(child)
    return found


@dataclass(frozen=True, slots=True)
class Expanded:
    """A weight behind the batch dimensions of a batched product."""

    slot: Slot  # the weight itself
    lead: tuple[int, ...]
    shared: tuple[bool, ...]


def expanded_weight(graph: Graph, slot: Slot) -> Expanded | None:
    """Look through view and expand below an operand (b, k, m) of a batched product."""
    at = slot
    matrix = graph.shape(slot)[1:]
    lead = graph.shape(slot)[:1]
    while graph.pure[at[0]] and at not in graph.targets:
        entry = traits(graph.op(at[0]))
        if not (entry.keeps_order or entry.expands) or len(graph.edges[at[0]]) != 1:
            return None
        child = graph.edges[at[0]][0]
        shape = graph.shape(child)
        if shape[-2:] != matrix and not (entry.expands and len(shape) >= 2):
            return None
        if entry.expands:
            if shape[-2:] != matrix:
                return None
            sizes = (1,) * (len(lead) + 2 - len(shape)) + tuple(shape[:-2])
            shared = tuple(size == 1 for size in sizes)
            return Expanded(child, lead, shared)
        at, lead = child, tuple(shape[:-2])
    return None


def pull(
    graph: Graph, start: Slot, target: Slot, *, create_graph: bool = False
) -> Callable[[Tensor], Tensor]:
    """The linear map from gradients (n, *start shape) to (n, *target shape).

    Those at a complex start are real, (n, *start shape, 2).
    """
    source, sink = graph.edge(start), graph.edge(target)
    shape = graph.shape(target)
    meta = graph.metas(start[0])[start[1]]

    def one(g: Tensor) -> Tensor:
        if g.storage_offset():
            # as_strided_scatter reads its gradient from the beginning of the memory it lies in
            g = g.clone()
        with nodes.in_our_words():
            (out,) = torch.autograd.grad(
                [source], [sink], [g], retain_graph=True, allow_unused=True,
                create_graph=create_graph,
            )  # fmt: skip
        if out is None:
            return g.new_zeros(shape)
        return out.to_dense() if out.is_sparse else out  # of embeddings with sparse=True

    def many(rows: Tensor) -> Tensor:
        wide = rows.dtype
        if meta.dtype.is_complex:
            rows = torch.view_as_complex(rows.contiguous())
        rows = rows.to(meta.dtype)
        if rows.shape[0] == 0:
            return rows.new_zeros(0, *shape, dtype=wide)
        if rows.shape[0] > 2 and not create_graph:
            batched = _batched(source, sink, rows)
            if batched is not None:
                # Batching rules of single ops have been wrong before: two rows must agree.
                ends = [0, rows.shape[0] - 1]
                same = [close(batched[i], one(rows[i])).all() for i in ends]
                if is_recorded():
                    flagged(~torch.stack(same))
                if is_recorded() or all(map(bool, same)):
                    return batched.to(wide)
        return torch.stack([one(row) for row in rows]).to(wide)

    return many


def _batched(source: GradientEdge, sink: GradientEdge, rows: Tensor) -> Tensor | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns when it batches an op by a loop
            (out,) = torch.autograd.grad(
                [source], [sink], [rows], retain_graph=True, allow_unused=True,
                is_grads_batched=True,
            )  # fmt: skip
    except (RuntimeError, NotImplementedError):
        return None
    return out


def agree(one: Tensor, two: Tensor) -> bool:
    """Whether two ways to the same numbers differ by no more than rounding."""
    return bool(close(one, two).all())


def close(one: Tensor, two: Tensor) -> Tensor:
    """Of bool, element by element: whether they differ by no more than rounding."""
    eps = torch.finfo(two.dtype).eps
    scale = two.abs().amax() if two.numel() else two.new_zeros(())
    return ((one - two).abs() <= 64 * eps * scale) | ~torch.isfinite(two)
