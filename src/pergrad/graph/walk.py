"""The graph below a vector of losses, walked once.

Owns: `Graph`, plain records of the nodes in topological order, which of them lead to the requested
parameters, which depend on parameters alone, and the key that tells two graphs apart.
Does not know: layouts, rules, factors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from pergrad.errors import UnsupportedError
from pergrad.graph import nodes
from pergrad.graph.layout import Layout, regular_pattern
from pergrad.graph.nodes import Meta
from pergrad.graph.ops import traits

Slot = tuple[int, int]  # (node index, output number)
Edge = tuple[int, int]  # (node index, input number)


class Key:
    """What it is made of, hashed once: a look-up in a dictionary would do so each time."""

    __slots__ = ("_hash", "_parts")

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self._parts = parts
        self._hash = hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self._parts == other._parts)


@dataclass(slots=True)
class Graph:
    """Nodes from the losses down; consumers come before producers."""

    nodes: list[Any]
    edges: list[tuple[tuple[int, int], ...]]  # per input: (node index or -1, output number)
    root: Slot
    targets: dict[Slot, str]  # where a requested parameter enters, and its name
    leads: list[bool]  # whether a requested parameter lies below the node
    pure: list[bool]  # whether nothing but requested parameters lies below the node
    python: list[Any]  # the nodes that belong to a Function written in Python
    batch: int = 0  # how many examples there are
    # Where examples begin to separate, if the root is a scalar: the edges into its last reductions,
    # and the example of each element that goes in there. None: the root is a vector of losses.
    starts: dict[Edge, Layout] | None = None
    _metas: dict[int, tuple[Meta, ...]] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)
    _checkpointed: bool | None = None

    def metas(self, index: int) -> tuple[Meta, ...]:
        found = self._metas.get(index)
        if found is None:
            found = self._metas[index] = nodes.metas(self.nodes[index])
        return found

    def op(self, index: int) -> str:
        found = self._names.get(index)
        if found is None:
            found = self._names[index] = nodes.op_name(self.nodes[index])
        return found

    def shape(self, slot: Slot) -> tuple[int, ...]:
        return self.metas(slot[0])[slot[1]].shape

    def is_checkpointed(self) -> bool:
        """Whether a checkpointed block has to compute anything again."""
        if self._checkpointed is None:
            self._checkpointed = any(map(nodes.is_checkpointed, self.nodes))
        return self._checkpointed

    def edge(self, slot: Slot) -> GradientEdge:
        return GradientEdge(self.nodes[slot[0]], slot[1])

    def children(self, index: int) -> list[int]:
        """The nodes below that lead to a parameter."""
        return [c for c, _ in self.edges[index] if c >= 0 and self.leads[c]]

    def key(self, *more: Any) -> "Key":
        """Equal for two graphs only if every op, edge, shape, dtype and saved number is.

        And whatever else is put into it.
        """
        outline = nodes.outline
        more = (*more, self.batch, self._starts())
        rows: list[tuple[Any, ...]] = [
            (outline(node), below) if leads else below
            for node, below, leads in zip(self.nodes, self.edges, self.leads, strict=True)
        ]
        rest = (self.root, tuple(self.targets.items()), *more)
        try:
            return Key((*rows, rest))
        except TypeError:  # a list among what a node saved: made hashable first
            rows = [
                (self.op(i), self.metas(i), below, nodes.attributes(node)) if leads else below
                for i, (node, below, leads) in enumerate(
                    zip(self.nodes, self.edges, self.leads, strict=True)
                )
            ]
            return Key((*rows, rest))

    def form(self) -> tuple[Any, ...]:
        """As `key`, without sizes: ops and edges."""
        return (tuple(zip(map(self.op, range(len(self.nodes))), self.edges, strict=True)),
                tuple(self.targets), tuple(self.starts or ()))  # fmt: skip

    def _starts(self) -> tuple[Any, ...] | None:
        """The starts, hashable."""
        if self.starts is None:
            return None
        return tuple(
            (edge, layout.owner.shape, _pattern(layout)) for edge, layout in self.starts.items()
        )

    def below(self, starts: Iterable[int], *, everything: bool = False) -> set[int]:
        """Nodes that are reached from these, and these; `everything`: not only those that lead to a
        requested parameter.
        """
        found = set(starts)
        stack = list(found)
        while stack:
            for child, _ in self.edges[stack.pop()]:
                if child >= 0 and child not in found and (everything or self.leads[child]):
                    found.add(child)
                    stack.append(child)
        return found

    def names_below(self, index: int, limit: int = 3) -> list[str]:
        """The nearest parameters below a node: how its place is named to the user."""
        found: list[str] = []
        queue, seen = [index], {index}
        while queue and len(found) < limit:
            at = queue.pop(0)
            for child, number in self.edges[at]:
                if child < 0 or not self.leads[child]:
                    continue
                name = self.targets.get((child, number))
                if name is not None and name not in found:
                    found.append(name)
                if child not in seen:
                    seen.add(child)
                    queue.append(child)
        return found


@lru_cache(maxsize=8)  # layouts of a training loop are the same from step to step
def _pattern(layout: Layout) -> tuple[int, ...]:
    """Equal for equal owners in tensors of equal shape."""
    owners = layout.owner.reshape(-1)
    regular = regular_pattern(owners)
    return tuple(owners.tolist()) if regular is None else regular


def walk(losses: Tensor, params: Mapping[str, Tensor]) -> Graph:
    """Read the graph of `losses` down to every leaf.

    Raises:
        UnsupportedError: a re-entrant checkpoint hides the parameters inside it, a parameter is a
            shell around other tensors, FullyShardedDataParallel has flattened it, or the pass would
            upset DistributedDataParallel.
    """
    for name, p in params.items():
        if nodes.wraps_tensors(p):
            raise UnsupportedError(
                f"Parameter `{name}` is a {type(p).__name__}, a shell around other tensors, whose "
                "gradients pergrad cannot read. Pass ordinary tensors: gather or dequantise the "
                "parameter for this call."
            )
    root = nodes.get_gradient_edge(losses)
    ordered, below = topological(root.node)
    index = {node: i for i, node in enumerate(ordered)}
    edges = [
        tuple([(-1, 0) if child is None else (index[child], number) for child, number in inputs])
        for inputs in below
    ]
    targets = _find_targets(params, index, edges)
    leads, pure = _classify(ordered, edges, targets)
    python = nodes.in_python(ordered)
    for node in python:
        _refuse(node)
    batch = losses.shape[0] if losses.dim() else 0
    return Graph(ordered, edges, (index[root.node], root.output_nr), targets, leads, pure, python,
                 batch)  # fmt: skip


def _refuse(node: Any) -> None:
    """Functions through which pergrad must not send a pass."""
    if nodes.first_static_backward(node):
        raise UnsupportedError(
            "The losses come from DistributedDataParallel with static_graph=True, which has "
            "not run a backward yet. It would take pergrad's pass for its first one and never "
            "synchronise gradients again. Run one ordinary training step before, or compute "
            "the losses with the wrapped model, `ddp.module`."
        )
    if nodes.reentrant_checkpoint(node):
        raise UnsupportedError(
            f"The losses go through a re-entrant activation checkpoint ({_block(node)}), which "
            "hides the parameters inside it from the graph: their gradients would be missing "
            "without a word. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
        )


def _block(node: Any) -> str:
    function = getattr(node, "run_function", None)
    owner = getattr(function, "__self__", function)
    return f"`{type(owner).__name__ if not callable(function) else _name_of(function)}`"


def _name_of(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__


def topological(root: Any) -> tuple[list[Any], list[Any]]:
    """Every node below `root`, each before what it reads from; and what that is, node by node."""
    finished: list[Any] = []
    below: list[Any] = []
    seen: set[Any] = set()
    stack = [root]
    edges = nodes.edges
    while stack:
        node = stack.pop()
        if type(node) is tuple:  # all below it has been finished
            node, found = node
            finished.append(node)
            below.append(found)
        elif node not in seen:  # it was pushed once for each node above it
            seen.add(node)
            found = edges(node)
            stack.append((node, found))
            for child, _ in found:
                if child is not None and child not in seen:
                    stack.append(child)
    finished.reverse()
    below.reverse()
    return finished, below


def _find_targets(
    params: Mapping[str, Tensor], index: dict[Any, int], edges: list[tuple[tuple[int, int], ...]]
) -> dict[Slot, str]:
    targets: dict[Slot, str] = {}
    leaves: dict[int, str] = {}
    middle: list[tuple[str, Tensor]] = []
    for name, p in params.items():
        if p.grad_fn is None:
            leaves[id(p)] = name
        else:  # a tensor in the middle of the graph
            middle.append((name, p))
    for node, i in index.items():
        if edges[i]:
            continue
        variable = nodes.leaf_variable(node)
        if nodes.is_flattened(variable):
            raise UnsupportedError(
                "The losses come from a FullyShardedDataParallel, which flattens the parameters of "
                "many layers into one and frees it between passes: pergrad cannot tell which "
                "gradient is whose. Use `fully_shard` of torch.distributed.fsdp instead."
            )
        known = leaves.get(id(variable))
        if known is not None:
            targets[i, 0] = known
    for name, p in middle:
        i = index.get(p.grad_fn, -1)
        if i >= 0:
            targets.setdefault((i, p.output_nr), name)
    return targets


def _classify(
    ordered: list[Any], edges: list[tuple[tuple[int, int], ...]], targets: dict[Slot, str]
) -> tuple[list[bool], list[bool]]:
    leads = [False] * len(ordered)
    pure = [False] * len(ordered)
    for i, _ in targets:
        leads[i] = pure[i] = True
    for i in range(len(ordered) - 1, -1, -1):
        if leads[i] or not edges[i]:
            continue
        all_pure = True
        for child, _ in edges[i]:
            if child < 0:
                all_pure = False
            else:
                leads[i] = leads[i] or leads[child]
                all_pure = all_pure and pure[child]
        pure[i] = all_pure and not traits(nodes.op_name(ordered[i])).looks_up
    return leads, pure
