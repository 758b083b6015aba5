"""From the operand of a use down to the parameters it was computed from.

Owns: the parameter-only part of the graph: routes that only rearrange a parameter (transpose,
view, cast, slice), and vector-Jacobian products through everything else.
Does not know: examples, factors' algebra, rules.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pergrad.graph import nodes
from pergrad.graph.walk import Graph, Slot

Step = (
    tuple  # ("view", shape) | ("permute", dims) | ("embed", shape, dim, start) | ("look up", node)
)


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
    steps = []
    for step in way.steps:
        if step[0] == "look up":
            node, (table,) = graph.nodes[step[1]], graph.edges[step[1]]
            start = _neighbours(node)
            if start is None:
                return None
            shape = graph.shape(table)
            count = prod(graph.shape((step[1], 0))) // max(1, shape[1])
            steps += [("view", (count, shape[1])), ("embed", shape, 0, start)]
        else:
            steps.append(step)
    return tuple(steps)


def _neighbours(node: nodes.Node) -> int | None:
    """The first row of a look-up that takes rows one after the other, as positions do."""
    ids = nodes.saved(node, "indices").reshape(-1)
    padding = nodes.attribute(node, "padding_idx")
    if not ids.numel() or nodes.attribute(node, "scale_grad_by_freq"):
        return None
    ideal = ids[0] + torch.arange(ids.numel(), dtype=ids.dtype, device=ids.device)
    # read at once: a GPU makes the CPU wait each time
    start, equal = torch.stack([ids[0], (ids == ideal).all().to(ids.dtype)]).tolist()
    if not equal or (padding is not None and start <= padding < start + ids.numel()):
        return None
    return int(start)


_VIEWS = {"view", "unsafe_view", "reshape_alias", "reshape_copy", "squeeze", "unsqueeze"}
_COPIES = {"clone", "alias", "to_copy", "lift", "lift_fresh", "lazy_clone"}


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
        step, at = after
        if step is not None:
            steps.append(step)
    done = {route.target for route in found}
    below = _targets_below(graph, at[0])
    found += [Route(start, target, None) for target in below if target not in done]
    return found


def _step(graph: Graph, at: Slot) -> tuple[Step | None, Slot] | None:
    """One op that only rearranges its input; None for anything else."""
    index, number = at
    below = [(c, n) for c, n in graph.edges[index] if c >= 0 and graph.leads[c]]
    if len(graph.edges[index]) != 1 or len(below) != 1:
        return None
    child = below[0]
    op, node = graph.op(index), graph.nodes[index]
    shape = graph.shape(child)
    rank = len(shape)
    if op in _COPIES:
        both = graph.metas(index)[number].dtype, graph.metas(child[0])[child[1]].dtype
        return (None, child) if all(d.is_floating_point for d in both) else None
    if op in _VIEWS:
        return ("view", shape), child
    if op == "expand" and prod(shape) == prod(graph.shape(at)):
        return ("view", shape), child
    if op in ("t", "transpose"):
        if rank < 2:
            return None, child
        one, two = (0, 1) if op == "t" else (nodes.attribute(node, "dim0"),
                                             nodes.attribute(node, "dim1"))  # fmt: skip
        dims = list(range(rank))
        dims[one], dims[two] = dims[two], dims[one]
        return ("permute", tuple(dims)), child
    if op == "permute":
        dims = [d % rank for d in nodes.attribute(node, "dims")]
        return ("permute", tuple(dims.index(d) for d in range(rank))), child
    if op == "embedding":
        return ("look up", index), child
    if op in ("slice", "split", "unsafe_split", "split_with_sizes", "unbind", "select"):
        return _cut(graph, at, child, op)
    return None


def _cut(graph: Graph, at: Slot, child: Slot, op: str) -> tuple[Step, Slot] | None:
    index, number = at
    node, shape = graph.nodes[index], graph.shape(child)
    dim = nodes.attribute(node, "dim")
    dim = dim + len(shape) if dim < 0 else dim
    if op == "slice":
        if nodes.attribute(node, "step") != 1:
            return None
        start = nodes.attribute(node, "start") or 0
        begin, _, _ = slice(start, nodes.attribute(node, "end"), 1).indices(shape[dim])
        return ("embed", shape, dim, begin), child
    if op in ("select", "unbind"):
        position = number if op == "unbind" else nodes.attribute(node, "index")
        position = position + shape[dim] if position < 0 else position
        return ("embed", shape, dim, position), child
    begin = sum(meta.shape[dim] for meta in graph.metas(index)[:number])
    return ("embed", shape, dim, begin), child


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
        op = graph.op(at[0])
        if op not in _VIEWS | _COPIES | {"expand"} or len(graph.edges[at[0]]) != 1:
            return None
        child = graph.edges[at[0]][0]
        shape = graph.shape(child)
        if shape[-2:] != matrix and not (op == "expand" and len(shape) >= 2):
            return None
        if op == "expand":
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
                if all(_agree(batched[i], one(rows[i])) for i in ends):
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


def _agree(one: Tensor, two: Tensor) -> bool:
    eps = torch.finfo(two.dtype).eps
    scale = two.abs().amax() if two.numel() else two.new_zeros(())
    close = (one - two).abs() <= 64 * eps * scale
    return bool((close | ~torch.isfinite(two)).all())
