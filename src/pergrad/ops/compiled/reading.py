"""A compiled region, read: whose gradient every result is, and which factors the parameters have.

Owns: the walk through a region's backward graph, the smaller graph that computes what the factors
need and no gradient of a weight, and the check of both against the region itself.
Does not know: single ops of aten (`owners`, `ends`), parameters' names.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from pergrad.errors import UsageError
from pergrad.factors import Factor, Pulled, Sum, mapped
from pergrad.graph import nodes
from pergrad.graph.layout import NOBODY, Layout, regular_pattern
from pergrad.graph.ops import Step
from pergrad.ops.compiled.ends import End, apart, end_at
from pergrad.ops.compiled.owners import SUMMED, UNREAD, Call, State, name_of, state_after


class Unread(Exception):
    """Why a region, or one of its results, cannot be read."""


@dataclass(frozen=True, slots=True)
class Term:
    """The factor at an end, and the way from there to a result of the region."""

    end: End
    steps: tuple[Step, ...] = ()
    tail: fx.GraphModule | None = None  # linear in its first argument; constants follow
    constants: tuple[fx.Node, ...] = ()
    shape: tuple[int, ...] = ()  # of what the tail returns


@dataclass(slots=True)
class Reading:
    """What is known of one region for one layout of examples."""

    layouts: tuple[Layout | None, ...]  # of the cotangents
    batch: int
    results: list[int | None]  # for each edge of the node, the number of the graph's result
    states: list[State] = field(default_factory=list)  # by result
    terms: dict[int, list[Term]] = field(default_factory=dict)  # by result; none: it is zero
    unread: dict[int, str] = field(default_factory=dict)  # why a result has no terms
    compute: Callable[..., Any] | None = None
    places: dict[fx.Node, tuple[bool, int]] = field(default_factory=dict)
    apart: dict[fx.Node, Layout] = field(default_factory=dict)  # of the values that are needed

    def why_not(self, slot: int) -> str | None:
        """Why there is no factor at an edge of the node; None if there is."""
        result = self.results[slot]
        return None if result is None else self.unread.get(result)

    def ops(self, slot: int) -> str:
        """The ops at the ends that lead to an edge."""
        result = self.results[slot]
        terms = [] if result is None else self.terms[result]
        return ", ".join(dict.fromkeys(term.end.op for term in terms))

    def values(self, arguments: Sequence[Any]) -> dict[fx.Node, Any]:
        """What the factors are made of, for the arguments of the region's backward graph."""
        assert self.compute is not None
        computed = self.compute(*arguments)
        return {
            node: arguments[number] if given else computed[number]
            for node, (given, number) in self.places.items()
        }

    def factors(self, values: dict[fx.Node, Any], slots: Sequence[int]) -> dict[int, Factor | None]:
        """The factor at each edge that can be read."""
        return {
            k: self._factor(self.terms[r], values)
            for k in slots
            if (r := self.results[k]) is not None and r in self.terms
        }

    def _factor(self, terms: list[Term], values: dict[fx.Node, Any]) -> Factor | None:
        parts = []
        for term in terms:
            part = term.end.make([values[n] for n in term.end.needs], self.batch)
            if part is not None:
                parts.append(_moved(term, part, [values[n] for n in term.constants]))
        return None if not parts else parts[0] if len(parts) == 1 else Sum(parts)


def _moved(term: Term, factor: Factor, constants: list[Any]) -> Factor:
    """The factor at an end, brought to the result."""
    tail = term.tail
    if tail is None:
        return mapped(factor, term.steps) if term.steps else factor

    def pull(rows: Tensor) -> Tensor:
        done = [tail(row, *constants) for row in rows]
        if not done:
            return rows.new_zeros(0, *term.shape)
        return torch.stack(done).to(rows.dtype)

    return Pulled(factor, pull, term.shape)


_READINGS: WeakKeyDictionary[type, OrderedDict[Any, Reading | str]] = WeakKeyDictionary()
_MOST = 16  # readings of one region


def reading_of(node: Any, layouts: Sequence[Layout | None], batch: int) -> Reading | str:
    """The reading of a region for cotangents so laid out; or why there is none."""
    known = _READINGS.setdefault(nodes.region_class(node), OrderedDict())
    key = (nodes.region_number(node), batch, tuple(map(_key, layouts)))
    reading = known.get(key)
    if reading is None:
        try:
            with torch.no_grad():
                reading = _read(node, tuple(layouts), batch)
        except Unread as error:
            reading = str(error)
        except UsageError:
            raise
        except Exception as error:  # a graph of a form that nobody has thought of
            reading = f"reading its graph ended with {type(error).__name__}: {error}"[:200]
        known[key] = reading
        while len(known) > _MOST:
            known.popitem(last=False)
    return reading


def _key(layout: Layout | None) -> Any:
    if layout is None:
        return None
    owner = layout.owner.reshape(-1)
    pattern = regular_pattern(owner)
    return layout.shape, layout.owner.shape, pattern or tuple(owner.tolist())


def _read(node: Any, layouts: tuple[Layout | None, ...], batch: int) -> Reading:
    module = nodes.region_graph(node)
    if isinstance(module, str):
        raise Unread(module)
    module = nodes.with_reshapes(module)
    graph = module.graph
    for n in graph.nodes:
        if nodes.changes_something(n.target):
            raise Unread(f"its backward graph has the op {name_of(n)}, which is not repeatable")
    (output,) = [n for n in graph.nodes if n.op == "output"]
    outputs: Any = output.args[0]
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    # Which argument is which cotangent is told by a number that is put in.
    marks: list[Tensor | None] = [
        torch.full(m.shape, n + 1, dtype=m.dtype, device=m.device)
        if layout is not None else None
        for n, (m, layout) in enumerate(zip(nodes.metas(node), layouts, strict=True))
    ]  # fmt: skip
    arguments, results = nodes.region_arguments(node, marks, len(outputs))
    if len(arguments) != len(inputs):
        raise Unread("its backward graph does not take what the region hands to it")
    tangents = _tangents(inputs, arguments, layouts)
    values = nodes.shapes_within(module, arguments)
    for n, value in zip(inputs, arguments, strict=True):
        if n.name.startswith(("arange", "iota")):  # the same in every batch of this size
            values[n] = value
    states: dict[fx.Node, State] = {}
    for n in graph.nodes:
        if n.op in ("placeholder", "get_attr"):
            states[n] = layouts[tangents[n]] if n in tangents else None
        elif n.op == "call_function":
            states[n] = state_after(Call(n, states, values))
    reading = Reading(layouts, batch, results)
    for number, n in enumerate(outputs):
        state = states.get(n) if isinstance(n, fx.Node) else None
        reading.states.append(state)
        try:
            reading.terms[number] = _Terms(states, values).of(n) if state is not None else []
        except Unread as error:
            reading.unread[number] = str(error)
    smaller = _smaller(module, inputs, reading)
    reading.apart = {n: s for n in reading.places if isinstance(s := states[n], Layout)}
    _check(node, module, smaller, reading, inputs, tangents)
    reading.compute = smaller
    if nodes.made_by_inductor(node) and not any(isinstance(a, int) for a in arguments):
        reading.compute = torch.compile(smaller, dynamic=False)
    return reading


def _tangents(
    inputs: list[fx.Node], arguments: list[Any], layouts: Sequence[Layout | None]
) -> dict[fx.Node, int]:
    """The number of the output to which each cotangent in the graph belongs."""
    found: dict[fx.Node, int] = {}
    for n, value in zip(inputs, arguments, strict=True):
        if not n.name.startswith("tangents"):
            continue
        if not isinstance(value, Tensor) or value.numel() == 0:
            raise Unread("one of its cotangents is empty or no tensor")
        number = round(float(value.reshape(-1)[0].real)) - 1
        if number < 0:
            continue  # of an output that the losses do not use
        layout = layouts[number]
        if layout is None or tuple(value.shape) != layout.shape or number in found.values():
            raise Unread("its cotangents are not those of its outputs")
        found[n] = number
    if len(found) != sum(layout is not None for layout in layouts):
        raise Unread("its backward graph does not take all cotangents of its outputs")
    return found


_RENAMED = ("clone", "alias", "detach", "contiguous", "convert_element_type", "_to_copy",
            "lift_fresh_copy")  # fmt: skip
_VIEWS = ("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze")


class _Terms:
    """From a result up to the ends that it is computed from."""

    def __init__(self, states: dict[fx.Node, State], values: dict[fx.Node, Any]) -> None:
        self.states, self.values = states, values

    def of(self, node: fx.Node) -> list[Term]:
        state = self.states[node]
        if isinstance(state, Layout):
            return [Term(apart(node, state))]
        if state is UNREAD:
            raise Unread(self._why(node))
        end = self._end(node)
        if end is not None:
            return [Term(end)]
        call = Call(node, self.states, self.values)
        simple = self._simple(call)
        if simple is not None:
            return simple
        return self._general(node)

    def _end(self, node: fx.Node) -> End | None:
        """The end at a node, if its arguments are apart by example; None if they are summed."""
        number, at = 0, node
        if name_of(node) == "getitem":
            at, number = node.args  # type: ignore[assignment]
        linear = [n for n in at.all_input_nodes if self.states.get(n) is not None]
        if all(self.states[n] is SUMMED for n in linear):
            return None
        call = Call(at, self.states, self.values)
        end = end_at(call, number)
        if end is None:
            raise Unread(f"the op {call.name} sums over examples, and no rule for it is known")
        return end

    def _why(self, node: fx.Node) -> str:
        """The op at which reading ended."""
        while True:
            above = [n for n in node.all_input_nodes if self.states.get(n) is UNREAD]
            tuples = [n for n in node.all_input_nodes if isinstance(self.states.get(n), tuple)]
            if not above and not tuples:
                return f"examples cannot be followed through the op {name_of(node)}"
            node = (above or tuples)[0]
            if not above:
                return f"examples cannot be followed through the op {name_of(node)}"

    def _simple(self, call: Call) -> list[Term] | None:
        """Through views and sums."""
        inner = call.linear
        if (
            call.name == "add"
            and len(inner) == 2
            and call.get("alpha", 1) == 1
            and all(tuple(self.values[n].shape) == call.shape for n in inner)
        ):
            return [term for n in inner for term in self.of(n)]
        if len(inner) != 1:
            return None
        step: tuple[Step, ...]
        if call.name in _RENAMED:
            step = ()
        elif call.name in _VIEWS:
            step = (("view", call.shape),)
        elif call.name == "permute":
            step = (("permute", tuple(call["dims"])),)
        elif call.name == "t" and len(call.shape) == 2:
            step = (("permute", (1, 0)),)
        else:
            return None
        above = self.of(inner[0])
        if any(term.tail is not None for term in above):
            return None
        return [Term(term.end, (*term.steps, *step)) for term in above]

    def _general(self, result: fx.Node) -> list[Term]:
        """Any ops, linear in each of the ends above: run for one example after the other."""
        ends: dict[fx.Node, End] = {}
        tail: dict[fx.Node, None] = {}

        def visit(node: fx.Node) -> None:
            if node in ends or node in tail:
                return
            end = self._end(node)
            if end is not None:
                ends[node] = end
                return
            for n in node.all_input_nodes:
                if self.states.get(n) is not None:
                    visit(n)
            tail[node] = None

        visit(result)
        outside = dict.fromkeys(
            n for node in tail for n in node.all_input_nodes if n not in tail and n not in ends
        )
        terms = []
        for node, end in ends.items():
            graph = fx.Graph()
            env = {node: graph.placeholder("row")}
            env |= {n: graph.placeholder(f"constant_{k}") for k, n in enumerate(outside)}
            for other in ends:
                if other is not node:
                    zero = graph.call_function(torch.zeros, (tuple(self.values[other].shape),),
                                               {"dtype": self.values[other].dtype})  # fmt: skip
                    env[other] = zero
            for n in tail:
                env[n] = graph.node_copy(n, env.__getitem__)
            graph.output(env[result])
            shape = tuple(self.values[result].shape)
            terms.append(Term(end, (), fx.GraphModule({}, graph), tuple(outside), shape))
        return terms


def _smaller(module: fx.GraphModule, inputs: list[fx.Node], reading: Reading) -> fx.GraphModule:
    """The graph that returns what the factors need."""
    needed = dict.fromkeys(
        n for terms in reading.terms.values() for term in terms
        for n in (*term.end.needs, *term.constants)
    )  # fmt: skip
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, copies)
    wanted = [n for n in needed if n not in inputs]
    graph.output(tuple(copies[n] for n in wanted))
    reading.places = {n: (True, inputs.index(n)) for n in needed if n in inputs}
    reading.places |= {n: (False, k) for k, n in enumerate(wanted)}
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)


def _check(
    node: Any,
    module: fx.GraphModule,
    smaller: fx.GraphModule,
    reading: Reading,
    inputs: list[fx.Node],
    tangents: dict[fx.Node, int],
) -> None:
    """What was read is held against the region itself; what does not agree is not used.

    The examples' gradients have to add up to the region's own. And with the cotangents of each
    example times a power of two, all that belongs to it has to grow by just that.
    """
    generator = torch.Generator().manual_seed(0)
    drawn: list[Tensor | None] = []
    for m, layout in zip(nodes.metas(node), reading.layouts, strict=True):
        if layout is None:
            drawn.append(None)
            continue
        g = torch.randn(m.shape, dtype=torch.float64, generator=generator).to(m.dtype)
        drawn.append(torch.where(layout.owner == NOBODY, torch.zeros_like(g), g).to(m.device))
    arguments, _ = nodes.region_arguments(node, drawn)
    truth = module(*arguments)
    reading.compute = smaller
    slots = {r: k for k, r in enumerate(reading.results) if r is not None and reading.terms.get(r)}
    values = reading.values(arguments)
    factors = reading.factors(values, list(slots.values()))
    for result, slot in slots.items():
        rounding = _rounding(reading.terms[result], values)
        if not _adds_up(factors[slot], truth[result], rounding):
            del reading.terms[result]
            reading.unread[result] = "the examples' gradients did not add up to the region's own"
    for stride in _strides(reading.batch):
        for result in _misplaced(smaller, reading, arguments, inputs, tangents, stride):
            reading.terms.pop(result, None)
            reading.unread[result] = "the layout that was read in its graph does not hold"


def _adds_up(factor: Factor | None, whole: Tensor, rounding: float) -> bool:
    """Whether the sum over the examples is the region's own gradient."""
    if factor is None:
        return not bool(whole.any())
    ones = torch.ones(factor.batch, dtype=factor.dtype, device=factor.device)
    total = factor.weighted_sum(ones)
    if total.shape != whole.shape:
        return False
    unknown = torch.isnan(whole)
    if not torch.equal(unknown, torch.isnan(total)):
        return False
    error = torch.where(unknown, 0.0, total.double() - whole.double()).norm()
    size = torch.where(unknown, 0.0, whole.double()).norm()
    return bool(error <= _tolerance(whole.dtype) * size + rounding)


def _tolerance(dtype: torch.dtype) -> float:
    return min(torch.finfo(dtype).eps ** 0.6, 0.06)  # 4e-10, 7e-5, 0.016, 0.055


def _rounding(terms: list[Term], values: dict[fx.Node, Any]) -> float:
    """What rounding may make of a sum that is zero, such as the gradient of a key's bias."""
    total = 0.0
    for term in terms:
        size = 1.0
        for n in term.end.needs:
            value = values[n]
            if isinstance(value, Tensor) and value.is_floating_point():
                size *= float(value.double().norm())
                size *= torch.finfo(value.dtype).eps if n is term.end.needs[0] else 1
        total += 64 * size * prod(term.end.shape) ** 0.5
    return total


_SPAN = 16


def _strides(batch: int) -> list[int]:
    strides, stride = [], 1
    while stride < max(batch, 2):
        strides.append(stride)
        stride *= _SPAN
    return strides


def _powers(layout: Layout, stride: int) -> Tensor:
    exponents = (layout.owner.clamp_min(0) // stride) % _SPAN - _SPAN // 2
    return torch.exp2(exponents.double())


def _misplaced(
    smaller: fx.GraphModule,
    reading: Reading,
    arguments: list[Any],
    inputs: list[fx.Node],
    tangents: dict[fx.Node, int],
    stride: int,
) -> list[int]:
    """Results with an end at which something does not grow as its owner's cotangents do."""
    scaled = list(arguments)
    for n, number in tangents.items():
        at, layout = inputs.index(n), reading.layouts[number]
        assert layout is not None
        powers = _powers(layout, stride).to(arguments[at].device, arguments[at].dtype)
        scaled[at] = arguments[at] * powers
    before, after = smaller(*arguments), smaller(*scaled)
    wrong = []
    for result, terms in reading.terms.items():
        for term in terms:
            for n in (*term.end.needs, *term.constants):
                given, number = reading.places[n]
                if given:
                    continue
                expected = before[number].double()
                if n in reading.apart:
                    expected = expected * _powers(reading.apart[n], stride).to(expected.device)
                if not _equal(expected, after[number].double()):
                    wrong.append(result)
    return wrong


def _equal(one: Tensor, two: Tensor) -> bool:
    close = (one - two).abs() <= 1e-6 * one.abs() + 1e-30
    return bool((close | (torch.isnan(one) & torch.isnan(two))).all())
