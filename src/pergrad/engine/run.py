"""One backward pass from the losses to a factor for every requested parameter.

Owns: the order of things: plan, policy on interacting examples, hooks for the length of one pass,
and which uses are served on its way or from what it returns.
Does not know: how a use is served (`serving`), what a caller makes of the factors.
"""

import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypedDict

import torch
from torch import Tensor

from pergrad.engine.hooked import Arrangement, arranged, hook_warning
from pergrad.engine.loop import Ways, loop, most_at_once
from pergrad.engine.meetings import below_meetings
from pergrad.engine.mixing import refuse
from pergrad.engine.parts import (
    Apart,
    Parts,
    known,
    meeting_warning,
    parts_of,
    planned,
    price_of_meetings,
)
from pergrad.engine.pass_ import Emit, Explained, Pass, Record, Squares
from pergrad.engine.places import owner_of
from pergrad.engine.schedule import Schedule, Use, schedule_for
from pergrad.engine.together import Cotangents, Together, groups, wanted
from pergrad.engine.user_state import Held, nothing_hidden, retained_untouched
from pergrad.errors import FallbackWarning, UnsupportedError, UsageError, users_line
from pergrad.factors import Beside, Computed, Factor, Placed
from pergrad.factors.workspace import limit, pass_begins
from pergrad.graph import nodes
from pergrad.graph.flaws import watched
from pergrad.graph.hooks import Hook
from pergrad.graph.plan import Plan, interact, plan_for, plan_of
from pergrad.graph.walk import Graph, Slot, walk
from pergrad.inputs import names_list
from pergrad.ops.compiled import unread
from pergrad.recording import is_recorded


@dataclass(frozen=True, slots=True)
class Options:
    """The options that every verb takes."""

    retain_graph: bool = False
    create_graph: bool = False
    on_mixing: Literal["raise", "exact"] = "raise"
    check_layout: Literal["once", "always", "never"] = "once"
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


class PassOptions(TypedDict, total=False):
    """Those options that a caller names where a pass is not his own: `Unpack[PassOptions]`."""

    on_mixing: Literal["raise", "exact"]
    check_layout: Literal["once", "always", "never"]
    chunk_bytes: int | None


class OptionsGiven(PassOptions, total=False):
    """Those options that a caller names, for signatures: `**options: Unpack[OptionsGiven]`."""

    retain_graph: bool
    create_graph: bool


def run(
    losses: Tensor,
    params: Mapping[str, Tensor],
    options: Options,
    emit: Emit,
    *,
    told: Explained | None = None,
    finish: Callable[[], None] | None = None,
    adding: bool = False,
    squares: Squares | None = None,
) -> None:
    """Call `emit(name, factor)` once for every parameter that the losses reach.

    With `adding` it may be called more often, with some of the examples each time. And `finish`
    after the last one, where nothing is recorded unless create_graph is asked for. With `told`,
    which is filled, everything is served in the one pass, as the price alone is asked for. With
    `squares` squared norms are all that is wanted, and it may be told them in the place of `emit`.
    """
    with (
        retained_untouched() as attached,
        nothing_hidden(params),
        nodes.hooks_aside(params) as hooks,
        ExitStack() as stack,
    ):
        emit = _through(hooks, params, emit)
        own: list[int] = []  # the number of our pass
        graph = walk(losses, params)
        if not graph.targets:
            raise UsageError(none_reached(params))
        hookless = not (attached.hooks or hooks)
        key = graph.key()
        if options.on_mixing == "exact" and hookless and told is None and not graph.python:
            again = known(losses, graph, key, options.check_layout)
            if again:  # exact whether or not examples of this very batch meet
                _by_parts(again, losses.shape[0], options, emit, finish, own, adding=adding)
                return
        plan = plan_of(graph, losses, options.check_layout, key)
        hooked = arranged(
            losses, graph, plan, attached, own,
            create_graph=options.create_graph, check_layout=options.check_layout,
        )  # fmt: skip
        if not options.create_graph and graph.python:
            stack.enter_context(nodes.compiled_regions_kept(graph.python))
        room = _Room(losses, graph, options)
        parted = partial(parts_of, losses, params, graph, plan, options.check_layout)
        served = partial(_served, parted, allowed=hookless)
        _policy(losses, graph, plan, options, served)
        looped = _looped(graph, hooked.looped)
        met = below_meetings(graph, plan)
        # else what gradients meet in may be a function of parameters alone
        mixed = bool(met) and _mixed(losses, graph, plan, options)
        if mixed or (met and parted()):
            parts = served()
            if told is not None:
                told.price = price_of_meetings(graph, plan, parts, mixed=mixed)
            else:
                apart = planned(losses, params, parts, options.check_layout, graph, plan)
                if options.on_mixing == "raise":
                    text = meeting_warning(graph, plan, parts if apart else None)
                    warnings.warn(text, FallbackWarning, stacklevel=users_line())
                if apart is not None:
                    _by_parts(apart, losses.shape[0], options, emit, finish, own, adding=adding)
                    return
                looped += [name for name in met if name not in looped]
        if looped:
            used = not set(graph.targets.values()) <= set(looped)
            one = options.create_graph or not hookless or bool(graph.python)
            loop(
                losses, {name: params[name] for name in looped}, emit,
                Ways(
                    create_graph=options.create_graph,
                    free=not (used or options.retain_graph or options.create_graph),
                    most=options.chunk_bytes or 4 * room.at_hand,
                    many=1 if one else room.at_once,
                    in_parts=adding and not hooks and not options.create_graph,
                ),
            )  # fmt: skip
            if told is not None:
                told.records += [Record(n, "hook", "fallback", "one example", None) for n in looped]
            if not used:
                if finish is not None:
                    finish()
                return
            rest = {name: p for name, p in params.items() if name not in looped}
            graph, plan = plan_for(losses, rest, options.check_layout)
        records = None if told is None else told.records
        told_at_once = not (hooks or options.create_graph or is_recorded())
        _pass(losses, graph, plan, options, emit, records, finish, hooked, own,
              squares=squares if told_at_once else None)  # fmt: skip


def _pass(
    losses: Tensor,
    graph: Graph,
    plan: Plan,
    options: Options,
    emit: Emit,
    records: list[Record] | None,
    finish: Callable[[], None] | None,
    hooked: Arrangement,
    own: list[int],
    before: Sequence[Apart] = (),
    squares: Squares | None = None,
) -> None:
    """One backward pass in which every use is served by its rule or by the fallback.

    And with it those of parts `before`, which have had their passes, whose examples come first.
    """
    schedule = schedule_for(graph, plan)
    pass_begins(losses.device, schedule.held)
    if options.create_graph and any(map(nodes.is_compiled, graph.python)):
        raise UnsupportedError(
            "The losses go through a region compiled by torch.compile, which has no second "
            "derivative, and create_graph=True asks for one. Compute the losses under "
            '`with torch.compiler.set_stance("force_eager"):`.'
        )
    if not schedule.quiet:
        _warn(schedule, graph, plan, losses.shape[0])
    given = (graph, plan, schedule, losses.shape[0], emit, options.create_graph, records)
    state = Pass(*given, squares=squares)
    if before:
        state = Together(*given, of=[*before, Apart(slice(0, 0), losses, graph, plan)])
    with hooked.in_force(), watched(graph, state.passed_by()):
        if isinstance(state, Together):
            state.earlier = [_cotangents(part) for part in before]
        if options.create_graph:
            _at_once(losses, state, own)
        else:
            _streaming(losses, state, options, own, hooked.executed)
        state.check_complete()
        if finish is not None:
            with torch.set_grad_enabled(options.create_graph):
                finish()


def _cotangents(part: Apart) -> Cotangents:
    """What arrives at the uses of a part of the losses, in a pass that keeps the graph."""
    slots = wanted(part)
    grads = _gradients(part.losses, part.graph, slots, retain_graph=True)
    return dict(zip(slots, grads, strict=True))


def none_reached(params: Mapping[str, Tensor]) -> str:
    """The message where losses reach nothing that is asked for."""
    return (
        f"The losses reach none of the parameters ({names_list(list(params), 3)}), so every "
        "gradient would be zero. Are these the parameters of the model that computed the losses, "
        "rather than those of a copy or of an average of it (EMA)? Pass the very tensors that took "
        "part in the forward pass; nothing below a `detach()` or `torch.no_grad()` is reached."
    )


def _looped(graph: Graph, hooks: Mapping[str, Hook]) -> list[str]:
    """The parameters for which hooks ask for the loop over the examples, with a warning."""
    if hooks:
        warnings.warn(hook_warning(hooks, graph.batch), FallbackWarning, stacklevel=users_line())
    return list(hooks)


def _by_parts(
    apart: list[Apart],
    batch: int,
    options: Options,
    emit: Emit,
    finish: Callable[[], None] | None,
    own: list[int],
    *,
    adding: bool,
) -> None:
    """A pass for each part of the losses, served one by one or several at once.

    `emit` as in `run`.
    """
    found: dict[str, list[Held]] = {}
    numbers = torch.arange(batch, device="cpu")
    for group in groups(apart, 0 if options.create_graph else limit(apart[0].losses.device)):
        *before, part = group
        index = torch.cat([numbers[each.where] for each in group])

        def placed(name: str, factor: Factor, index: Tensor = index) -> None:
            if adding:
                emit(name, Placed(factor, index, batch))
            else:  # the graph may be gone when the last part has been served
                held = Held(Placed(factor.materialized(), index, batch))
                found.setdefault(name, []).append(held)

        last = part is apart[-1]
        chosen = options if last else replace(options, retain_graph=True)
        end = finish if last and adding else None
        _pass(part.losses, part.graph, part.plan, chosen, placed, None, end, Arrangement(), own,
              before)  # fmt: skip
    for name in list(found):
        emit(name, Beside([held.factor(name) for held in found.pop(name)]))
    if finish is not None and not adding:
        with torch.set_grad_enabled(options.create_graph):
            finish()


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


@dataclass(frozen=True, slots=True)
class _Room:
    """How many gradients a loop may take at once and hold: asked only where there is one."""

    losses: Tensor
    graph: Graph
    options: Options

    @property
    def at_hand(self) -> int:
        """Bytes."""
        return self.options.chunk_bytes or limit(self.losses.device)

    @property
    def at_once(self) -> int:
        """Losses."""
        cpu = self.losses.device.type == "cpu"
        return most_at_once(self.graph, self.at_hand, cpu=cpu)


def _served(parted: Callable[[], Parts | None], *, allowed: bool) -> Parts | None:
    """Parts of the losses, if they are to be served one after the other; never where hooks want
    each loss.
    """
    return parted() if allowed else None


def _mixed(losses: Tensor, graph: Graph, plan: Plan, options: Options) -> bool:
    sure = any(mix.sure for mix in plan.mixes)
    return sure or interact(losses, graph, plan, options.check_layout)


def _no_parts() -> None:
    """Of a pass that is the user's own."""


def _policy(
    losses: Tensor,
    graph: Graph,
    plan: Plan,
    options: Options,
    parted: Callable[[], Parts | None] = _no_parts,
) -> None:
    """Refuse what interacts, unless asked for."""
    if options.on_mixing == "raise" and interact(losses, graph, plan, options.check_layout):
        refuse(graph, plan, parted())


def _warn(schedule: Schedule, graph: Graph, plan: Plan, batch: int) -> None:
    for use in schedule.uses:
        if nodes.is_compiled(graph.nodes[use.site.node]):
            _warn_unread(use, graph, plan, batch)
            continue
        if use.rule is not None:
            continue
        name = use.op
        warnings.warn(
            f"pergrad has no rule for the op `{name}` (at {owner_of(use.unruled)}). Its "
            f"gradients are exact all the same, by one backward of that op for each of the {batch} "
            f"examples: about {batch} times the cost of the op's own backward.",
            FallbackWarning,
            stacklevel=users_line(),
        )


def _warn_unread(use: Use, graph: Graph, plan: Plan, batch: int) -> None:
    """Of parameters that a compiled region uses in a way that could not be read."""
    reasons = unread(graph.nodes[use.site.node], use.site, batch)
    if not reasons:
        return
    names = [graph.targets[way.target] for slot in reasons for way in plan.routes[use.ends[slot]]]
    warnings.warn(
        f"pergrad cannot read how the region `{use.op}` compiled by torch.compile uses "
        f"{names_list(list(dict.fromkeys(names)), 3)}: {next(iter(reasons.values()))}. These "
        f"gradients are exact all the same, by one backward of the region for each of the {batch} "
        f"examples: about {batch} times its cost. Compute the losses under "
        '`with torch.compiler.set_stance("force_eager"):` to have all layers served by rules.',
        FallbackWarning,
        stacklevel=users_line(),
    )


def _streaming(
    losses: Tensor, state: Pass, options: Options, own: list[int], executed: Collection[int]
) -> None:
    """Serve each use while the pass is at it; its cotangent is gone afterwards."""
    graph, plan = state.graph, state.plan
    requests = state.schedule.requests_for(graph, plan, executed)
    wanted = requests.wanted
    handles = []
    # For each GPU hooks run in a thread of torch's, which knows nothing of the caller's budget.
    caller, one_at_a_time = threading.get_ident(), threading.RLock()

    def hook_for(use: Use) -> Callable[[tuple[Tensor | None, ...]], None]:
        context = copy_context()

        def hook(cotangents: tuple[Tensor | None, ...]) -> None:
            # Others may come by: vector-Jacobian products of ours, a pass that a user's hook runs.
            if nodes.pass_number() not in own:
                return
            with one_at_a_time:
                # not recorded by torch: this pass has no create_graph
                if threading.get_ident() == caller:
                    state.serve(use, list(cotangents))
                else:
                    context.run(state.serve, use, list(cotangents))

        return hook

    try:
        for use in requests.streamed:
            handles.append(nodes.before(graph.nodes[use.site.node], hook_for(use)))
        if not wanted:
            return
        keep = options.retain_graph or requests.keep
        checkpointed = requests is not state.schedule.requests
        again = graph.nodes if checkpointed and options.retain_graph else ()
        with nodes.selections_untouched(again):
            grads = _gradients(losses, graph, wanted, retain_graph=keep, number=own)
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
    number: list[int] | None = None,
) -> tuple[Tensor | None, ...]:
    """torch's backward pass from losses seeded with ones; its number goes to the list."""
    with torch.enable_grad():
        # A sum, not a vector of ones as grad_outputs: that would make torch import sympy, 35 MB.
        total = losses.sum()
    if number is not None:
        assert total.grad_fn is not None
        # nobody else has this node, and the pass begins with it
        nodes.before(total.grad_fn, lambda _: number.append(nodes.pass_number()))
    with nodes.in_our_words():
        return nodes.gradients(
            total, [graph.edge(slot) for slot in wanted],
            retain_graph=retain_graph, create_graph=create_graph,
        )  # fmt: skip


def _at_once(losses: Tensor, state: Pass, own: list[int]) -> None:
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
        grads = _gradients(losses, graph, wanted, create_graph=True, number=own)
        by_slot = dict(zip(wanted, grads, strict=True))
        for use in state.schedule.uses:
            node, count = use.site.node, len(use.site.layouts)
            state.serve(use, [by_slot.get((node, n)) for n in range(count)])
        for target in plan.direct:
            state.serve_direct(target, by_slot[target])
