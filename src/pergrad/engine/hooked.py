"""Hooks that the user has put into the graph count as they do in a loop over the examples.

Owns: which hooks run on the batch's gradient, which once for each example, and for which parameters
a backward pass for each example is the only way.
Does not know: how hooks are found in a graph, rules, verbs.

A hook is any function of a gradient, and only in the loop does it get what it was written for: the
gradient of one loss. One that returns nothing looks on, and gets the batch's. One that may return
something is called once for each example where the elements of the gradient are known to belong to
one example each. In all other places the loop itself is run, for the parameters below.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pergrad.engine.user_state import Attached, elsewhere
from pergrad.errors import UnsupportedError, UsageError
from pergrad.graph import nodes
from pergrad.graph.hooks import Hook, Hooks, hooks_in, name_of, replace
from pergrad.graph.layout import Layout
from pergrad.graph.plan import Plan, layouts_in
from pergrad.graph.walk import Graph
from pergrad.inputs import names_list


@dataclass(slots=True)
class Arrangement:
    """What is done about the hooks of one graph."""

    looped: dict[str, Hook] = field(default_factory=dict)  # parameter -> a hook that it lies below
    executed: set[int] = field(default_factory=set)  # nodes that torch has to run, with their hooks
    instead: list[tuple[Any, dict[int, Hook]]] = field(default_factory=list)
    aside: list[Any] = field(default_factory=list)  # hooks that no pass of ours may call

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """For the length of one pass."""
        before = [(functions, dict(functions)) for functions, _ in self.instead]
        before += [(functions, dict(functions)) for functions in self.aside]
        try:
            for functions, others in self.instead:
                replace(functions, others)
            for functions in self.aside:
                replace(functions, dict.fromkeys(functions, _nothing))
            yield
        finally:
            for functions, hooks in before:
                replace(functions, hooks)


def _nothing(*_: Any) -> None:
    return None


def arranged(
    losses: Tensor,
    graph: Graph,
    plan: Plan,
    attached: Attached,
    own: list[int],
    *,
    create_graph: bool,
    check_layout: str,
) -> Arrangement:
    """What is done about the hooks on a graph: nothing, for the most.

    `own`: the numbers of the passes in which hooks are to be called differently.
    """
    arrangement = Arrangement()
    if not attached.hooks:
        return arrangement
    places, others = hooks_in(graph, attached.hooks, attached.tensors)
    elsewhere(others)
    if not places:
        return arrangement
    below = graph.below(graph.edges[s.node][k][0] for s in plan.sites for k in s.slots)
    layouts = None
    for place in places:
        changing = place.changing
        if place.node in below and changing:
            _loop(arrangement, graph, place)
        elif place.node in below:
            arrangement.aside.append(place.functions)
        elif not changing:
            arrangement.instead.append(_watched(graph, place, own))
        elif place.kind == "after" or create_graph or (place.node, place.output) in graph.targets:
            _loop(arrangement, graph, place)
        else:
            if layouts is None:
                layouts = layouts_in(losses, graph, check_layout)
            arrangement.instead.append(_by_example(graph, place, own, layouts, losses.shape[0]))
            if place.kind == "before":
                arrangement.executed.add(place.node)
    return arrangement


def _loop(arrangement: Arrangement, graph: Graph, place: Hooks) -> None:
    reached = graph.below([place.node])
    for (node, output), name in graph.targets.items():
        if node not in reached or (node == place.node and place.kind != "tensor"):
            continue
        if node != place.node or output == place.output:
            arrangement.looped.setdefault(name, place.changing[0])


def _where(graph: Graph, place: Hooks) -> str:
    near = graph.names_below(place.node, 1)
    return f"at the op `{graph.op(place.node)}`" + (f" near parameter `{near[0]}`" if near else "")


def _watched(graph: Graph, place: Hooks, own: list[int]) -> tuple[Any, dict[int, Hook]]:
    """Hooks that return nothing may not change a gradient in place either."""

    def watched(hook: Hook) -> Hook:
        def run(*gradients: Any) -> Any:
            seen = [(g, nodes.version(g)) for g in _tensors(gradients)]
            result = hook(*gradients)
            if nodes.pass_number() in own and any(nodes.version(g) != v for g, v in seen):
                raise UsageError(
                    f"The hook {name_of(hook)} {_where(graph, place)} changes a gradient in place, "
                    "so pergrad cannot give it the gradient of each example. Return the new "
                    "gradient from the hook, or change a clone."
                )
            return result

        return run

    return place.functions, {k: watched(hook) for k, hook in place.functions.items()}


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for value in values for t in _tensors(value)] if isinstance(values, tuple) else []


def _by_example(
    graph: Graph,
    place: Hooks,
    own: list[int],
    layouts: Mapping[tuple[int, int], Layout],
    batch: int,
) -> tuple[Any, dict[int, Hook]]:
    """Hooks that are called once for each example, with its gradient and zeros elsewhere."""
    single = place.kind == "tensor"
    outputs = [place.output] if single else list(range(len(graph.metas(place.node))))
    owners = [layouts.get((place.node, n)) for n in outputs]

    def spread(hook: Hook) -> Hook:
        def run(gradients: Any) -> Any:
            if nodes.pass_number() not in own:
                return hook(gradients)
            whole = (gradients,) if single else tuple(gradients)
            total = [None if g is None else torch.zeros_like(g) for g in whole]
            for example in range(batch):
                mine = [
                    None if g is None else torch.zeros_like(g, dtype=torch.bool)
                    if owner is None else (owner.owner == example).to(g.device).expand(g.shape)
                    for g, owner in zip(whole, owners, strict=True)
                ]  # fmt: skip
                parts = tuple(
                    None if g is None or m is None else torch.where(m, g, torch.zeros_like(g))
                    for g, m in zip(whole, mine, strict=True)
                )
                returned = hook(parts[0] if single else parts)
                if returned is not None:
                    parts = returned if isinstance(returned, tuple) else (returned,)
                    if len(parts) != len(total):
                        return returned  # torch has words for it
                for n, (part, m) in enumerate(zip(parts, mine, strict=True)):
                    so_far = total[n]
                    if part is None or m is None or so_far is None:
                        continue
                    if not isinstance(part, Tensor) or part.shape != so_far.shape:
                        return returned
                    if _spills(part, m):
                        raise UnsupportedError(_spilling(graph, place, hook, example))
                    total[n] = torch.where(m, part, so_far)
            return total[0] if single else tuple(total)

        return run

    return place.functions, {k: spread(hook) for k, hook in place.functions.items()}


def _spills(part: Tensor, mine: Tensor) -> bool:
    """Whether a gradient of one example is not zero outside the example's elements.

    Not a number in both places is the example's own misfortune.
    """
    outside = (part != 0) & ~mine
    if not bool(outside.any()):
        return False
    unknown = torch.isnan(part)
    return bool((outside & ~unknown).any()) or not bool((unknown & mine).any())


def _spilling(graph: Graph, place: Hooks, hook: Hook, example: int) -> str:
    return (
        f"The hook {name_of(hook)} {_where(graph, place)} was given the gradient of example "
        f"{example}, and returned one that is not zero in the other examples' elements, so one "
        "example's loss would move the others' activations. Return zero where the gradient is zero "
        "(multiply it; do not add to it), or remove the hook for this call."
    )


def hook_warning(hooks: Mapping[str, Hook], batch: int) -> str:
    """Why the loop is run for the parameters below these hooks, and what to do about it."""
    by_hook: dict[str, None] = dict.fromkeys(name_of(hook) for hook in hooks.values())
    return (
        f"The hook {', '.join(list(by_hook)[:3])} may change a gradient in which examples are not "
        f"apart, so the gradients of {names_list(list(hooks), 3)} are taken by one backward pass "
        f"for each of the {batch} examples: exact, at the price of that loop. Let the hook return "
        "nothing if it only looks on, or remove it for this call."
    )
