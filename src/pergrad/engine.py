"""One backward pass from the losses to a factor for every requested parameter.

Owns: the order of things: plan, policy on interacting examples, hooks for the length of one pass,
and which uses are served on its way or from what it returns.
Does not know: how a use is served (`serving`), what a caller makes of the factors.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass

import torch
from torch import Tensor

from pergrad.errors import (
    FallbackWarning,
    MixedExamplesError,
    UnsupportedError,
    UsageError,
    users_line,
)
from pergrad.factors import Computed, Factor
from pergrad.factors.workspace import pass_begins
from pergrad.graph import nodes
from pergrad.graph.plan import Plan, plan_for
from pergrad.graph.walk import Graph, Slot
from pergrad.hidden import nothing_hidden
from pergrad.retained import retained_untouched
from pergrad.schedule import Schedule, Use, schedule_for
from pergrad.serving import Emit, Pass, Record


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


def run(
    losses: Tensor,
    params: Mapping[str, Tensor],
    options: Options,
    emit: Emit,
    *,
    records: list[Record] | None = None,
    finish: Callable[[], None] | None = None,
) -> None:
    """Call `emit(name, factor)` once for every parameter that the losses reach.

    And `finish` after the last one, where nothing is recorded unless create_graph is asked for.
    """
    with (
        retained_untouched(),
        nothing_hidden(params),
        nodes.hooks_aside(params) as hooks,
        ExitStack() as stack,
    ):
        graph, plan = plan_for(losses, params, options.check_layout)
        schedule = schedule_for(graph, plan)
        pass_begins(losses.device, schedule.held)
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
        state = Pass(
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
        if finish is not None:
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


def _streaming(losses: Tensor, state: Pass, options: Options) -> None:
    """Serve each use while the pass is at it; its cotangent is gone afterwards."""
    graph, plan = state.graph, state.plan
    requests = state.schedule.requests_for(graph, plan)
    wanted = requests.wanted
    handles = []
    own: list[int] = []
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
            handles.append(graph.nodes[use.site.node].register_prehook(hook_for(use)))
        if not wanted:
            return
        keep = options.retain_graph or requests.keep
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
        total.grad_fn.register_prehook(lambda _: number.append(nodes.pass_number()))
    with nodes.in_our_words():
        return torch.autograd.grad(
            total, [graph.edge(slot) for slot in wanted], allow_unused=True,
            retain_graph=retain_graph, create_graph=create_graph,
        )  # fmt: skip


def _at_once(losses: Tensor, state: Pass) -> None:
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
