"""One backward pass from the losses to a factor for every requested parameter.

Owns: the order of things: plan, policy on interacting examples, hooks for the length of one pass,
rule or fallback for each use, routes down to the parameters, and early release of cotangents.
Does not know: what a caller makes of the factors.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from pergrad.errors import (
    FallbackWarning,
    MixedExamplesError,
    UnsupportedError,
    UsageError,
    users_line,
)
from pergrad.factors import Computed, Embedded, Factor, KeptGram, Pulled, Sum, inspect, mapped
from pergrad.graph import chain, nodes
from pergrad.graph.layout import describe
from pergrad.graph.plan import Plan, plan_for
from pergrad.graph.walk import Graph, Slot
from pergrad.held import Held, Untouched
from pergrad.hidden import nothing_hidden
from pergrad.retained import retained_untouched
from pergrad.rules import ADDED, Operand, Situation
from pergrad.rules.fallback import direct, fallback
from pergrad.schedule import Schedule, Use, schedule_for
from pergrad.sharing import Source

Emit = Callable[[str, Factor], None]


@dataclass(frozen=True, slots=True)
class Options:
    """The options that every verb takes."""

    retain_graph: bool = False
    create_graph: bool = False
    on_mixing: str = "raise"
    check_layout: str = "once"
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.on_mixing not in ("raise", "exact"):
            raise UsageError(f'on_mixing is "raise" or "exact", not {self.on_mixing!r}.')
        if self.check_layout not in ("once", "always", "never"):
            raise UsageError(
                f'check_layout is "once", "always" or "never", not {self.check_layout!r}.'
            )
        size = self.chunk_bytes
        if size is not None and (not isinstance(size, int) or size < 1):
            raise UsageError(
                f"chunk_bytes is {size!r}; pass a positive number of bytes, or None for a sensible "
                "share of free memory."
            )


@dataclass(slots=True)
class Record:
    """How one operand was served, for `explain`."""

    parameter: str
    op: str
    how: str
    layout: str
    factor: Factor | None


@dataclass(frozen=True, slots=True)
class _Added:
    """A bias that waits for the product to whose result it is added, whose norm tells its own."""

    use: Use
    cotangents: list[Tensor | None]
    untouched: Untouched

    @property
    def slot(self) -> int:
        """The only operand."""
        return self.use.site.slots[0]


@dataclass(slots=True)
class _Pass:
    """The state of one backward pass."""

    graph: Graph
    plan: Plan
    schedule: Schedule
    batch: int
    emit: Emit
    create_graph: bool
    records: list[Record] | None
    waiting: dict[Slot, int] = field(default_factory=dict)  # uses that have not reported, by end
    parts: dict[Slot, list[Held]] = field(default_factory=dict)
    missing: dict[Slot, set[Slot]] = field(default_factory=dict)  # ends, by parameter
    found: dict[Slot, list[Held]] = field(default_factory=dict)
    kept: dict[Source, KeptGram] = field(default_factory=dict)  # by where the data come from
    added: dict[int, _Added] = field(default_factory=dict)  # by the product's node

    def __post_init__(self) -> None:
        self.waiting = dict(self.schedule.waiting)
        self.missing = {target: set(ends) for target, ends in self.schedule.missing.items()}

    def serve(self, use: Use, cotangents: list[Tensor | None]) -> None:
        """Factors of every operand of one use, some of them when a later one is served."""
        g = cotangents[0]
        if use.product is None or g is None or self.create_graph:
            self._serve(use, cotangents, self.added.pop(use.site.node, None))
        else:
            self.added[use.product] = _Added(use, cotangents, Untouched([g]))

    def _serve(
        self, use: Use, cotangents: list[Tensor | None], added: _Added | None = None
    ) -> None:
        site = use.site
        kept = self._kept(use)
        situation = Situation(
            self.graph.nodes[site.node],
            use.op,
            self.batch,
            cotangents,
            site.layouts,
            use.operands,
            kept,
            None if added is None else self._bias(added, cotangents[0]),
        )
        alive = any(g is not None for g in cotangents)
        served = use.rule(situation) if use.rule is not None and alive else {}
        bias = served.pop(ADDED, None)
        if len(served) < len(site.slots):
            rest = [k for k in site.slots if k not in served]
            others: dict[int, Factor | None] = dict.fromkeys(rest)
            if rest and alive:
                others = fallback(situation, rest, wanted=use.calls_node)
        for k in use.last_first:
            if k in served:
                self._report(use, k, served[k], "rule")
            else:
                self._report(use, k, others[k], "fallback")
        if kept is not None:
            kept.served()
        if bias is not None and added is not None:
            self._report(added.use, added.slot, bias, "rule")
        elif added is not None:
            self._serve(added.use, added.cotangents)

    def _bias(self, added: _Added, g: Tensor | None) -> Operand | None:
        """The bias that waits, if its cotangent is g, the product's, as it lies in memory."""
        end = added.use.ends[added.slot]
        added.untouched.check(self.graph.targets[self.plan.routes[end][0].target])
        own = added.cotangents[0]
        same = (
            own is not None
            and g is not None
            and own.data_ptr() == g.data_ptr()
            and own.numel() == g.numel()
            and (own.dtype, own.device) == (g.dtype, g.device)
            and own.is_contiguous()
            and g.is_contiguous()
        )
        return added.use.operands[added.slot] if same else None

    def _kept(self, use: Use) -> KeptGram | None:
        """What the uses that read the same data share; nothing if it has to be differentiable."""
        if use.reads is None or self.create_graph:
            return None
        found = self.kept.get(use.reads)
        if found is None:
            found = self.kept[use.reads] = KeptGram(self.schedule.readers[use.reads])
        return found

    def _report(self, use: Use, k: int, factor: Factor | None, how: str) -> None:
        end = use.ends[k]
        if self.records is not None:
            if end in self.schedule.mixed:
                how = "mixed"
            layout = next(layout for layout in use.site.layouts if layout is not None)
            for way in self.plan.routes[end]:
                name = self.graph.targets[way.target]
                self.records.append(Record(name, use.op, how, describe(layout), factor))
        self.waiting[end] -= 1
        alone = self.schedule.alone.get(end)
        if alone is not None:
            self.missing[alone.target].discard(end)
            if factor is not None:
                self.emit(self.graph.targets[alone.target], self._route(alone, factor))
            return
        if factor is not None:
            # What the node saved is at hand now, and may be gone when the other uses have reported.
            factor = factor if self.waiting[end] == 0 else inspect.materialized(factor)
            self.parts.setdefault(end, []).append(Held(factor))
        if self.waiting[end] == 0:
            name = self.graph.targets[self.plan.routes[end][0].target]
            self._descend(end, _total(name, self.parts.pop(end, [])))

    def _descend(self, start: Slot, factor: Factor | None) -> None:
        """From the operand down to each parameter below it."""
        for way in self.plan.routes[start]:
            if factor is not None:
                part = self._route(way, factor)
                if self.missing[way.target] != {start}:
                    part = inspect.materialized(part)
                self.found.setdefault(way.target, []).append(Held(part))
            self._arrived(way.target, start)

    def _route(self, way: chain.Route, factor: Factor) -> Factor:
        if way.steps == ():
            return factor
        graph = self.graph
        ways = chain.settled(graph, way)
        if ways is None:
            function = chain.pull(graph, way.start, way.target, create_graph=self.create_graph)
            return Pulled(factor, function, graph.shape(way.target))
        steps: list[chain.Step] = []
        for step in ways:
            if step[0] == "embed":
                _, wide, dim, start = step
                size = list(wide)
                inner = mapped(factor, tuple(steps)) if steps else factor
                size[dim] = prod(inner.shape) // max(prod(wide) // max(wide[dim], 1), 1)
                inner = mapped(inner, (("view", tuple(size)),))
                factor, steps = Embedded(inner, wide, (dim, start, start + size[dim])), []
            else:
                steps.append(step)
        return mapped(factor, tuple(steps)) if steps else factor

    def serve_direct(self, target: Slot, g: Tensor | None) -> None:
        """A parameter whose own gradient separates by example."""
        layout = self.plan.direct[target]
        factor = None if g is None else direct(g, layout, self.batch)
        if self.records is not None:
            name = self.graph.targets[target]
            self.records.append(Record(name, "leaf", "rule", describe(layout), factor))
        if factor is not None:
            self.found.setdefault(target, []).append(Held(factor))
        self._arrived(target, target)

    def _arrived(self, target: Slot, start: Slot) -> None:
        self.missing[target].discard(start)
        if not self.missing[target]:
            name = self.graph.targets[target]
            factor = _total(name, self.found.pop(target, []))
            if factor is not None:
                self.emit(name, factor)

    def check_complete(self) -> None:
        """No number without every use of every parameter in it."""
        left = [target for target, starts in self.missing.items() if starts]
        if left:
            names = ", ".join(f"`{self.graph.targets[target]}`" for target in left[:5])
            raise UnsupportedError(
                f"The backward pass did not come by every use of {names}, so its gradients would "
                "be incomplete and no number is returned. This is a defect of pergrad; please "
                "report it with this model."
            )


def _total(name: str, parts: list[Held]) -> Factor | None:
    if not parts:
        return None
    factors = [part.factor(name) for part in parts]
    return factors[0] if len(factors) == 1 else Sum(factors)


def run(
    losses: Tensor,
    params: Mapping[str, Tensor],
    options: Options,
    emit: Emit,
    *,
    records: list[Record] | None = None,
) -> None:
    """Call `emit(name, factor)` once for every parameter that the losses reach."""
    with (
        retained_untouched(),
        nothing_hidden(params),
        nodes.hooks_aside(params) as hooks,
        ExitStack() as stack,
    ):
        graph, plan = plan_for(losses, params, options.check_layout)
        schedule = schedule_for(graph, plan)
        if options.create_graph and any(map(nodes.is_compiled, graph.nodes)):
            raise UnsupportedError(
                "The losses go through a region compiled by torch.compile, which has no second "
                "derivative, and create_graph=True asks for one. Compute the losses under "
                '`with torch.compiler.set_stance("force_eager"):`.'
            )
        if schedule.compiled:
            stack.enter_context(nodes.compiled_regions_kept())
        _policy(graph, plan, options)
        _warn(schedule, losses.shape[0])
        state = _Pass(
            graph,
            plan,
            schedule,
            losses.shape[0],
            _through(hooks, params, emit),
            options.create_graph,
            records,
        )
        if options.create_graph:
            _at_once(losses, state)
        else:
            _streaming(losses, state, options)
        state.check_complete()


def _through(
    hooks: Mapping[str, list[Callable[..., Tensor | None]]],
    params: Mapping[str, Tensor],
    emit: Emit,
) -> Emit:
    """Pass each example's gradient through the user's tensor hooks on the parameter, as a loop of
    `torch.autograd.grad` would: such a hook may mask or scale it.
    """

    def hooked(name: str, factor: Factor) -> None:
        chain_ = hooks.get(name)
        if chain_:
            dtype, inner = params[name].dtype, factor

            def rows(index: Tensor) -> Tensor:
                found = []
                for row in inner.select(index.to(inner.device)).dense().to(dtype):
                    for hook in chain_:
                        changed = hook(row)
                        row = row if changed is None else changed
                    found.append(row)
                return torch.stack(found)

            factor = Computed(factor.batch, factor.shape, rows, factor._zeros(0))
        emit(name, factor)

    return hooked if hooks else emit


def _policy(graph: Graph, plan: Plan, options: Options) -> None:
    if not plan.mixes or options.on_mixing == "exact":
        return
    mix = plan.mixes[0]
    op = graph.op(mix.parent)
    place = _place(graph, mix.parent)
    remedy = (
        "call `model.eval()` (or `.eval()` on that module) or use GroupNorm or LayerNorm"
        if "batch_norm" in op
        else "compute the loss of each example from that example alone"
    )
    raise MixedExamplesError(
        f"The op `{op}` {place} mixes examples: the loss of one example depends on the others in "
        "the batch, so its gradient cannot be read off its own rows. "
        f"Either {remedy}; or pass on_mixing=\"exact\" to get the exact gradients of these losses "
        "all the same, at about the cost of one backward per example."
    )  # fmt: skip


def _place(graph: Graph, index: int) -> str:
    """Where an op is, in the names of the user's model."""
    own = [graph.targets[slot] for slot in graph.edges[index] if slot in graph.targets]
    if own:
        return f"of {owner_of(own[0])}"
    below = graph.names_below(index, 1)
    return f"after {owner_of(below[0])}" if below else "in the model"


def module_of(name: str) -> str:
    """The path of the module that owns a parameter, by the parameter's name; "" for the model."""
    return name.rpartition(".")[0]


def owner_of(name: str) -> str:
    """The place of a parameter in words."""
    module = module_of(name)
    return f"module `{module}`" if module else f"parameter `{name}`"


def _warn(schedule: Schedule, batch: int) -> None:
    for use in schedule.uses:
        if use.rule is not None:
            continue
        name = use.op
        remedy = (
            " A compiled region is one op to autograd. Compute the losses under "
            '`with torch.compiler.set_stance("force_eager"):` to have its layers served by rules.'
            if name.startswith("CompiledFunction")
            else ""
        )
        warnings.warn(
            f"pergrad has no rule for the op `{name}` (at {owner_of(use.unruled)}). Its "
            f"gradients are exact all the same, by one backward of that op for each of the {batch} "
            f"examples: about {batch} times the cost of the op's own backward.{remedy}",
            FallbackWarning,
            stacklevel=users_line(),
        )


def _streaming(losses: Tensor, state: _Pass, options: Options) -> None:
    """Serve each use while the pass is at it; its cotangent is gone afterwards."""
    graph, plan = state.graph, state.plan
    requests = state.schedule.requests_for(graph, plan)
    wanted = requests.wanted
    handles = []
    inside = [False]

    def hook_for(use: Use) -> Callable[[tuple[Tensor | None, ...]], None]:
        def hook(cotangents: tuple[Tensor | None, ...]) -> None:
            if inside[0]:
                return  # a vector-Jacobian product of ours passes here
            inside[0] = True
            try:  # torch does not record a pass without create_graph
                state.serve(use, list(cotangents))
            finally:
                inside[0] = False

        return hook

    try:
        for use in requests.streamed:
            handles.append(graph.nodes[use.site.node].register_prehook(hook_for(use)))
        if not wanted:
            return
        keep = options.retain_graph or requests.keep
        grads = _gradients(losses, graph, wanted, retain_graph=keep)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        by_slot = dict(zip(wanted, grads, strict=True))
        del grads
        for use in requests.returned:
            slots = [(use.site.node, n) for n in range(len(use.site.layouts))]
            cotangents = [
                by_slot.get(s) if s in plan.direct else by_slot.pop(s, None) for s in slots
            ]
            state.serve(use, cotangents)
            del cotangents
        for target in plan.direct:
            state.serve_direct(target, by_slot.pop(target, None))


def _gradients(
    losses: Tensor,
    graph: Graph,
    wanted: Iterable[Slot],
    *,
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """torch's backward pass from losses seeded with ones."""
    with torch.enable_grad():
        # A sum, not a vector of ones as grad_outputs: that would make torch import sympy, 35 MB.
        total = losses.sum()
    with nodes.in_our_words():
        return torch.autograd.grad(
            total, [graph.edge(slot) for slot in wanted], allow_unused=True,
            retain_graph=retain_graph, create_graph=create_graph,
        )  # fmt: skip


def _at_once(losses: Tensor, state: _Pass) -> None:
    """As `_streaming`, differentiably: every cotangent is asked for and kept."""
    graph, plan = state.graph, state.plan
    wanted: dict[Slot, None] = dict.fromkeys(plan.direct)
    for site in plan.sites:
        for n, layout in enumerate(site.layouts):
            if layout is not None:
                wanted[site.node, n] = None
    if not wanted:
        return
    with torch.enable_grad():
        grads = _gradients(losses, graph, wanted, create_graph=True)
        by_slot = dict(zip(wanted, grads, strict=True))
        for use in state.schedule.uses:
            node, count = use.site.node, len(use.site.layouts)
            state.serve(use, [by_slot.get((node, n)) for n in range(count)])
        for target in plan.direct:
            state.serve_direct(target, by_slot[target])
