"""From the losses down to the places where parameters meet examples.

Owns: the walk of layouts through the graph, the decision which nodes are above the examples'
meeting point (separated) and which below (shared by examples, or mixing them), and the list of
uses that follows.
Does not know: rules, factors, numbers (it asks `measure` where the structure does not tell).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch

from pergrad.graph.alone import Alone
from pergrad.graph.layout import Layout, along, merge
from pergrad.graph.ops import Op, Reads, Result, Why, cut_out, traits, transfer, understands
from pergrad.graph.routes import expanded_weight
from pergrad.graph.walk import Graph, Slot

Measured = dict[Slot, Layout | None]  # None: several examples meet in one element
Measure = Callable[[Graph, list[Slot]], Measured]


@dataclass(frozen=True, slots=True)
class Site:
    """One node at which parameters meet examples: its cotangents separate by example."""

    node: int
    layouts: tuple[Layout | None, ...]  # of the cotangent at each output
    slots: tuple[int, ...]  # the inputs below which examples no longer separate


@dataclass(frozen=True, slots=True)
class Mix:
    """A place where examples interact."""

    parent: int  # the op that makes them
    child: Slot
    sure: bool = True  # or whether it might as well be a table that all examples read
    rows: bool = False  # rows that are one example's own reach other losses, whatever they are of
    product: bool = False  # every example meets as many rows as there are examples


class Read(NamedTuple):
    """What layouts were derived from that is in a node, beside its structure."""

    node: int
    field: str | None  # of saved indices; None: what was measured at the node alone
    value: Any  # a tensor, or several, or None; or an `Alone`


@dataclass(slots=True)
class Uses:
    """Every use of every requested parameter that the losses reach."""

    sites: list[Site]
    direct: dict[Slot, Layout]  # parameters whose own gradient separates by example
    mixes: list[Mix]
    measured: bool  # whether a layout was measured: it then holds for this batch only
    read: list[Read]  # what index tensors were read: it holds where they are the same
    known_mixed: frozenset[Slot] = field(default_factory=frozenset)
    layouts: dict[Slot, Layout] = field(default_factory=dict)  # wherever examples are separate


def find_uses(
    graph: Graph, examples: int, measure: Measure, known_mixed: Iterable[Slot] = ()
) -> Uses:
    """Walk layouts from the losses down until examples no longer separate."""
    measured: Measured = dict.fromkeys(known_mixed)
    first, reads = set(measured), _reads_data(graph)
    while True:
        spread = _Spread(graph, examples, measured, reads)
        spread.run()
        if not spread.wanted:
            break
        measured.update(measure(graph, sorted(spread.wanted)))
    uses = spread.collect()
    uses.measured = any(slot not in first for slot in measured if measured[slot] is not None)
    uses.known_mixed = frozenset(slot for slot, found in measured.items() if found is None)
    return uses


class _Mixed:
    """Marks an output in whose gradient examples meet."""


_MIXED = _Mixed()
_State = Layout | _Mixed | None


class _Spread:
    """One walk of layouts from the losses to the parameters."""

    def __init__(
        self, graph: Graph, examples: int, measured: Measured, reads: tuple[list[bool], list[bool]]
    ) -> None:
        self.graph = graph
        self.examples = examples
        self.measured = measured
        self.wanted: set[Slot] = set()
        self.read: dict[tuple[int, str | None], Read] = {}
        self.below: set[int] = set()  # nodes whose cotangents do not separate
        self.states: dict[Slot, _State] = {}
        self.mixes: list[Mix] = []
        self._pending: set[int] = set()
        self._arrived: dict[Slot, list[tuple[int, Result | _Mixed]]] = {}
        self._data, self._computed = reads

    def run(self) -> None:
        graph = self.graph
        owners = torch.arange(self.examples, device="cpu")
        if graph.starts is None:
            self._arrived[graph.root] = [(-1, along(graph.shape(graph.root), 0, owners))]
        for (i, k), layout in (graph.starts or {}).items():
            self._arrived.setdefault(graph.edges[i][k], []).append((-1, layout))
        for i in range(len(graph.nodes)):
            if graph.leads[i]:
                self._visit(i)

    def _visit(self, i: int) -> None:
        graph = self.graph
        count = len(graph.metas(i))
        states = [self._resolve((i, number)) for number in range(count)]
        if i in self._pending:
            self._postpone(i)
            return
        for number, state in enumerate(states):
            self.states[i, number] = state
        if any(isinstance(state, _Mixed) for state in states):
            self.below.add(i)
            for child, number in graph.edges[i]:
                if child >= 0 and graph.leads[child]:
                    self._arrived.setdefault((child, number), []).append((i, _MIXED))
            return
        layouts = [state if isinstance(state, Layout) else None for state in states]
        if all(layout is None for layout in layouts):
            return
        op = self._op(i)
        results = transfer(op, layouts)
        self._note(i, op)
        if Why.UNKNOWN in results:
            results = self._alone(i, layouts, results)
        batched = traits(op.name).batched
        for (child, number), result in zip(graph.edges[i], results, strict=True):
            # None: nobody's gradient, as below an output of DDP's that the losses do not use
            if child < 0 or not graph.leads[child] or result is None:
                continue
            if batched and isinstance(result, Layout):
                expanded = expanded_weight(graph, (child, number))
                if expanded is not None and any(expanded.shared):
                    # Stop here, not below the expand, where the engine would have formed one
                    # gradient of the weight for each example.
                    result = Why.CONTRACTED
            self._arrived.setdefault((child, number), []).append((i, result))

    def _note(self, i: int, op: Op) -> None:
        """What was read of the indices that an op has saved."""
        for name, value in op.read.items():
            self.read[i, name] = Read(i, name, value)

    def _alone(self, i: int, layouts: list[Layout | None], results: list[Result]) -> list[Result]:
        """The results again, where the structure does not tell by what the node does alone."""
        graph = self.graph
        inputs = [
            k
            for k, ((child, _), result) in enumerate(zip(graph.edges[i], results, strict=True))
            if result is Why.UNKNOWN and child >= 0 and graph.leads[child] and not graph.pure[child]
        ]
        found = inputs and Alone.measured(graph, i, layouts, inputs, self.examples)
        if not found:
            return results
        self.read[i, None] = Read(i, None, found)
        return [found.below.get(k, result) for k, result in enumerate(results)]

    def _op(self, i: int) -> Op:
        graph = self.graph
        shapes, pure = [], []
        for child, number in graph.edges[i]:
            inside = child >= 0 and graph.leads[child]
            shapes.append(graph.shape((child, number)) if inside else None)
            pure.append(inside and graph.pure[child])
        outs = [m.shape for m in graph.metas(i)]
        return Op(graph.nodes[i], graph.op(i), outs, shapes, pure, self.examples)

    def _resolve(self, slot: Slot) -> _State:
        """The sum of what arrived at one output."""
        arrived = self._arrived.get(slot)
        if not arrived:
            return None
        if any(parent in self._pending for parent, _ in arrived):
            self._pending.add(slot[0])
            return None
        pure = self.graph.pure[slot[0]]
        layouts = [what for _, what in arrived if isinstance(what, Layout)]
        rest: list[tuple[int, Result | _Mixed]] = [
            (parent, what) for parent, what in arrived if not isinstance(what, Layout)
        ]
        if not rest:
            total = _merged(layouts)
            if total is None:  # an example may have been given more than its own
                total = _merged([self._cut_out(parent, slot, what) for parent, what in arrived])
            if total is not None:
                return total
        if pure:
            return _MIXED
        kinds = {what for _, what in rest}
        sure = Why.MIXING in kinds or any(isinstance(what, _Mixed) for what in kinds)
        open_question = (
            not rest  # owners disagree: the numbers may still be apart
            or Why.UNKNOWN in kinds
            or (Why.CONTRACTED in kinds and self._data[slot[0]])
        )
        if open_question and not sure:
            if slot not in self.measured:
                self.wanted.add(slot)
                self._pending.add(slot[0])
                return None
            found = self.measured[slot]
            if found is not None:
                return found
        meet = (bool(layouts) and self._computed[slot[0]]) or Why.MIXING in kinds
        if meet or (open_question and self._interacts(slot, rest)):
            at_fault = [p for p, what in rest if what is Why.MIXING]
            at_fault = at_fault or [p for p, _ in rest] or [p for p, _ in arrived]
            above = max(at_fault)
            mix = Mix(
                slot[0] if above < 0 else above,
                slot,
                sure=meet,
                rows=Why.MIXING not in kinds,
                product=not meet and Why.UNKNOWN not in kinds,
            )
            self.mixes.append(mix)
        return _MIXED

    def _cut_out(self, parent: int, slot: Slot, claimed: Result | _Mixed) -> Layout:
        """What one op above claims of an output, and no more than that."""
        assert isinstance(claimed, Layout)
        above = self.states.get((parent, 0)) if parent >= 0 else None
        if not isinstance(above, Layout) or self.graph.edges[parent] != (slot,):
            return claimed
        op = self._op(parent)
        cut = cut_out(op, above)
        self._note(parent, op)
        return cut or claimed

    def _interacts(self, slot: Slot, rest: list[tuple[int, Result | _Mixed]]) -> bool:
        """Whether what was computed from data looks like a batch rather than a constant table.

        The graph cannot tell for sure; either way the numbers are exact.
        """
        graph, batch = self.graph, self.examples
        if batch < 2 or not self._computed[slot[0]]:
            return False
        if any(what is Why.UNKNOWN for _, what in rest):
            shape = graph.shape(slot)
            return len(shape) > 0 and shape[0] > 0 and shape[0] % batch == 0
        # a product in which every example meets every example
        products = [graph.shape((parent, 0)) for parent, what in rest if what is Why.CONTRACTED]
        return any(s[-2:] == (batch, batch) and prod(s) == batch**2 for s in products)

    def _postpone(self, i: int) -> None:
        """Below an open question: ask about unknown ops further down in the same round."""
        graph = self.graph
        for child, number in graph.edges[i]:
            if child < 0 or not graph.leads[child]:
                continue
            self._pending.add(child)
            self._arrived.setdefault((child, number), []).append((i, Why.UNKNOWN))
            slot = (child, number)
            if not understands(graph.op(i)) and not graph.pure[child] and slot not in self.measured:
                self.wanted.add(slot)

    def collect(self) -> Uses:
        graph = self.graph
        sites: list[Site] = []
        for i in range(len(graph.nodes)):
            if not graph.leads[i] or i in self.below:
                continue
            layouts = tuple(
                state if isinstance(state := self.states.get((i, n)), Layout) else None
                for n in range(len(graph.metas(i)))
            )
            if all(layout is None for layout in layouts):
                continue
            slots = []
            for k, (child, number) in enumerate(graph.edges[i]):
                if child < 0 or not graph.leads[child]:
                    continue
                if child in self.below or isinstance(self.states.get((child, number)), _Mixed):
                    slots.append(k)
            if slots:
                sites.append(Site(i, layouts, tuple(slots)))
        direct = {
            slot: state
            for slot in graph.targets
            if slot[0] not in self.below and isinstance(state := self.states.get(slot), Layout)
        }
        uses = Uses(sites, direct, self.mixes, False, list(self.read.values()))
        uses.layouts = {
            slot: state
            for slot, state in self.states.items()
            if slot[0] not in self.below and isinstance(state, Layout)
        }
        return uses


def _merged(layouts: list[Layout]) -> Layout | None:
    """The layout of a sum; None where two examples meet in one element."""
    total: Layout | None = layouts[0]
    for layout in layouts[1:]:
        total = None if total is None else merge(total, layout)
    return total


def _outgrows(graph: Graph, i: int) -> bool:
    """Whether an op's output is larger than every input that leads to a parameter."""
    inputs = [graph.shape((c, n)) for c, n in graph.edges[i] if c >= 0 and graph.leads[c]]
    sizes = [prod(shape) for shape in (graph.shape((i, 0)), *inputs)]
    # a nested tensor's compare with no number; it is refused by name below
    return all(type(size) is int for size in sizes) and max(sizes[1:], default=-1) < sizes[0]


def _enters(graph: Graph, i: int) -> bool:
    """Whether data enters at this very node."""
    reads = traits(graph.op(i)).reads
    if reads is Reads.UNKNOWN:
        return not graph.pure[i]
    if reads in (Reads.NOTHING, Reads.ALWAYS):
        return reads is Reads.ALWAYS
    missing = any(c < 0 or not graph.leads[c] for c, _ in graph.edges[i])
    # x * w for a scale w of one number for each feature: x is data if it is larger than w
    return missing and (reads is Reads.MISSING or _outgrows(graph, i))


def _reads_data(graph: Graph) -> tuple[list[bool], list[bool]]:
    """Whether data, not parameters and constants alone, enters below each node; and whether any
    number there depends on a parameter and on data.

    Zeros or known rows laid beside a parameter make a table of it, not a batch: unless the
    parameter was copied to the rows of a batch, as class tokens are.
    """
    entered = [False] * len(graph.nodes)
    computed = [False] * len(graph.nodes)
    copied = [False] * len(graph.nodes)
    for i in range(len(graph.nodes) - 1, -1, -1):
        if not graph.leads[i]:
            continue
        below, known = graph.children(i), traits(graph.op(i))
        enters = _enters(graph, i)
        entered[i] = enters or any(entered[c] for c in below)
        repeats = below and not (known.weights or known.joins) and _outgrows(graph, i)
        copied[i] = bool(repeats) or known.looks_up or any(copied[c] for c in below)
        if known.joins:
            met = enters and copied[i]
        else:
            together = not all(entered[c] for c in below)  # a parameter with what data has entered
            met = entered[i] and (enters or known.weights or known.looks_up or together)
        computed[i] = met or any(computed[c] for c in below)
    return entered, computed
