"""Squared norms read while a backward pass of the user's own comes by.

No pass of ours: the plan is the same as ever, but its hooks sit in a pass that somebody else
starts, and that must go on whatever happens in them. So nothing here raises during it; a failure is
kept, and told to whoever asks for the numbers.

Owns: `UserPass`: hooks before the pass, squared norms during it, and the checks that what came by
is what was planned: one pass, by every use, and nothing else that flows in.
Does not know: how losses were had, what a caller makes of the norms.
"""

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pergrad.engine.late_norms import Doubts
from pergrad.engine.pass_ import Pass
from pergrad.engine.places import owner_of
from pergrad.engine.run import Options, _policy, _through, _warn, none_reached
from pergrad.engine.schedule import Schedule, Use, schedule_for
from pergrad.engine.user_state import nothing_hidden, retained_untouched
from pergrad.errors import UnsupportedError, UsageError
from pergrad.factors import Factor
from pergrad.factors.workspace import limit, workspace
from pergrad.graph import nodes
from pergrad.graph.flaws import look
from pergrad.graph.plan import plan_of
from pergrad.graph.walk import Graph
from pergrad.ops.joining import SINKS

# Those that wait for a backward pass, by the losses that it would start from.
_WAITING: "weakref.WeakValueDictionary[int, UserPass]" = weakref.WeakValueDictionary()

_REMEDY = (
    "Take the norms before the backward pass: `pergrad.norms(losses, model, retain_graph=True)`."
)


class UserPass:
    """The squared norms of what flows through a graph in the next backward pass, whose ever it is.

    Args:
        losses: what the graph was walked from.
        graph: with its batch, and its starts if the root is a scalar.
        params: name -> tensor, as they occur in the graph.
        options: on_mixing, check_layout and chunk_bytes.
        add: called with a name and squared norms (B,), once or more often.

    Attributes:
        seed: the cotangent that arrived at the root.

    Raises:
        PergradError: the graph cannot be planned, or mixes examples; before any hook is there.
    """

    def __init__(
        self,
        losses: Tensor,
        graph: Graph,
        params: Mapping[str, Tensor],
        options: Options,
        add: Callable[[str, Tensor], None],
    ) -> None:
        self.graph, self.params = graph, params
        self.seed: Tensor | None = None
        self.failure: BaseException | None = None
        self._number: int | None = None
        self._doubts = Doubts()
        self._handles: list[RemovableHandle] = []
        self._add, self._losses = add, weakref.ref(losses)
        self._names = {id(p): name for name, p in params.items()}
        self._told: dict[str, list[Tensor]] | None = None  # squared norms from a pass of ours
        self._one_at_a_time = threading.RLock()
        self._budget = options.chunk_bytes or limit(losses.device)
        self._unreached = _Unreached(graph, params)
        with retained_untouched(), nothing_hidden(params), nodes.hooks_aside(params) as hooks:
            if not graph.targets:
                raise UsageError(none_reached(params))
            self.plan = plan_of(graph, losses, options.check_layout)
            _policy(losses, graph, self.plan, options)
        self.schedule = schedule_for(graph, self.plan)
        _refuse(self.schedule)
        _warn(self.schedule, graph, self.plan, graph.batch)
        self._hooked_direct = [
            graph.targets[slot] for slot in self.plan.direct if graph.targets[slot] in hooks
        ]

        def sq_norms(name: str, factor: Factor) -> None:
            self._doubts.sq_norms(name, factor, partial(add, name))

        emit = _through(hooks, params, sq_norms)
        self._pass = Pass(graph, self.plan, self.schedule, graph.batch, emit, False, None,
                          squares=None if hooks else add)  # fmt: skip
        try:
            self._attach()
        except BaseException:
            self.detach()
            raise
        _WAITING[id(losses)] = self

    def _attach(self) -> None:
        graph, plan = self.graph, self.plan
        self._handles.append(nodes.before(graph.nodes[graph.root[0]], self._guarded(self._begins)))
        for use in self.schedule.uses:
            serve = self._server(use)
            self._handles.append(nodes.before(graph.nodes[use.site.node], self._guarded(serve)))
        for i in self._pass.passed_by():
            seen = self._guarded(partial(look, graph, i))
            self._handles.append(nodes.before(graph.nodes[i], seen))
        for target in plan.direct:

            def direct(cotangents: Sequence[Tensor | None], target: tuple = target) -> None:
                if nodes.pass_number() == self._number:
                    self._pass.serve_direct(target, cotangents[target[1]])

            self._handles.append(nodes.before(graph.nodes[target[0]], self._guarded(direct)))

    def _guarded(
        self, work: Callable[[Sequence[Tensor | None]], None]
    ) -> Callable[[tuple[Tensor | None, ...]], None]:
        """A hook that raises nothing, records nothing and casts nothing."""

        def hook(cotangents: tuple[Tensor | None, ...]) -> None:
            if self.failure is not None:
                return
            try:
                with self._one_at_a_time, torch.no_grad(), workspace(self._budget):
                    work(cotangents)
            except Exception as error:
                self.fail(error)

        return hook

    def _begins(self, cotangents: Sequence[Tensor | None]) -> None:
        """The pass is at the root."""
        number = nodes.pass_number()
        if self._number is not None and number != self._number:
            raise UsageError(_two_passes())
        self._number = number
        seed = cotangents[self.graph.root[1]]
        self.seed = None if seed is None else seed.detach().clone()
        self._check_runs()
        self._check_flows()

    def _check_runs(self) -> None:
        """Every node's own backward that is needed computes what it is needed for."""
        graph = self.graph
        for use in self.schedule.uses:
            if not use.calls_node:
                continue
            for k in use.site.slots:
                if not nodes.will_run(graph.nodes[graph.edges[use.site.node][k][0]]):
                    raise UnsupportedError(_left_out(owner_of(graph.targets[
                        self.plan.routes[use.ends[k]][0].target])))  # fmt: skip

    def _check_flows(self) -> None:
        """Nothing but the losses sends a gradient into the part of the graph that is read."""
        graph = self.graph
        inside = {node: i for i, node in enumerate(graph.nodes)}
        root = graph.nodes[graph.root[0]], graph.root[1]
        started, passed_root = False, False
        for start in nodes.starts_under_way():
            edge = (
                start if isinstance(start, nodes.GradientEdge) else nodes.get_gradient_edge(start)
            )
            stack: list[tuple[nodes.Node, nodes.Node, int]] = [(None, edge.node, edge.output_nr)]
            seen: set[tuple[nodes.Node, int]] = set()
            entries: list[tuple[object, int, int]] = []
            while stack:
                parent, node, number = stack.pop()
                if node in inside:
                    entries.append((parent, inside[node], number))
                elif (node, number) not in seen:
                    below = nodes.edges(node)
                    if nodes.op_name(node) in SINKS:  # output i is input i: the others get nothing
                        seen.add((node, number))
                        below = below[number : number + 1]
                    elif (node, 0) in seen:
                        continue
                    else:
                        seen |= {(node, 0), (node, number)}
                    self._unreached.excuse(nodes.leaf_variable(node))
                    stack += [(node, c, n) for c, n in below if c is not None]
            here = any((graph.nodes[i], number) == root for _, i, number in entries)
            started, passed_root = True, passed_root or here
            for parent, i, number in entries if here else ():
                if (graph.nodes[i], number) != root and self._reads(i, number):
                    raise UsageError(self._flows_in(parent, i))
        if not started or not passed_root:
            raise UnsupportedError(
                "pergrad cannot see what this backward pass was started from, and so not whether "
                f"anything but the losses flows into it. {_REMEDY}"
            )

    def _reads(self, i: int, number: int) -> bool:
        """Whether a gradient that enters there comes by what is read."""
        graph = self.graph
        if not graph.leads[i]:
            return False
        direct = {node for node, _ in self.plan.direct}
        return not graph.pure[i] or i in direct

    def _flows_in(self, parent: object, i: int) -> str:
        by = f"`{nodes.op_name(parent)}`" if parent is not None else "another tensor"
        below = self.graph.names_below(i, 1)
        near = f" (near parameter `{below[0]}`)" if below else ""
        return (
            f"Something beside the losses goes backward in the same pass: {by} sends a gradient "
            f"into `{self.graph.op(i)}`{near}, so what was read there is not the losses' alone. An "
            "auxiliary term belongs to the losses of the examples or into a backward pass of its "
            f"own. {_REMEDY}"
        )

    def _server(self, use: Use) -> Callable[[Sequence[Tensor | None]], None]:
        ways = [way for end in use.ends.values() for way in self.plan.routes[end]]
        pulls = any(way.steps is None or way.reads_indices for way in ways)

        def serve(cotangents: Sequence[Tensor | None]) -> None:
            # Others may come by: vector-Jacobian products of ours, a pass that a user's hook runs.
            if nodes.pass_number() != self._number:
                return
            with ExitStack() as stack:
                if pulls:  # a pass of ours through what depends on parameters alone
                    stack.enter_context(retained_untouched())
                    stack.enter_context(nodes.hooks_aside(self.params))
                self._pass.serve(use, list(cotangents))

        return serve

    def fail(self, error: BaseException) -> None:
        """Keep the first failure. Hooks stay until the pass is over: torch is at one of them."""
        if self.failure is None:
            self.failure = error.with_traceback(None)

    # --- a pass of `pergrad.backward`, which is not the user's own -------------------------------

    def take_over(self, params: Mapping[str, Tensor]) -> None:
        """A pass of ours begins, which tells its squared norms. Nothing is raised."""
        self.detach()
        if self._number is not None or self._told is not None:
            self.fail(UsageError(_two_passes()))
        self._told = {}
        if {id(p) for p in params.values()} != set(self._names):
            self.fail(
                UsageError(
                    "pergrad.backward was given other parameters than the `pergrad.reading` or "
                    "`watch` block around it. Pass the same model to both."
                )
            )

    def besides(self, name: str, add: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """Add squared norms (B,) there, and keep them."""
        assert self._told is not None
        kept = self._told.setdefault(name, [])

        def both(squares: Tensor) -> None:
            kept.append(squares.detach())
            add(squares)

        return both

    def told(self, weights: Tensor, *, by_layer: bool) -> None:
        """The pass is over; weights (B,) of its examples. Nothing is raised."""
        told, self._told = self._told or {}, {}
        if by_layer:
            self.fail(
                UsageError(
                    'clip(by="layer") gives each layer weights of its own, so an example has no '
                    "one weight in the step, by which it could be read or watched. Clip whole "
                    f"gradients in the steps that are read. {_REMEDY}"
                )
            )
        if self.failure is not None:
            return
        try:
            with torch.no_grad():
                self.seed = weights.detach().clone()
                for name, several in told.items():
                    for squares in several:
                        by = self.seed.to(squares.device, squares.dtype)
                        # an example that was left out has no finite norm, and added nothing
                        self._add(name, torch.where(by == 0, 0.0, squares * by.square()))
            # whatever pass comes next would be another
            root = self.graph.nodes[self.graph.root[0]]
            self._handles.append(nodes.before(root, lambda _: self.fail(UsageError(_two_passes()))))
        except Exception as error:
            self.fail(error)

    def detach(self) -> None:
        """No hook of ours is left."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def finish(self) -> None:
        """After the backward pass: all came by, and nothing is missing in the squared norms."""
        self.detach()
        if _WAITING.get(key := id(self._losses())) is self:
            del _WAITING[key]
        try:
            if self.failure is None:
                with torch.no_grad(), workspace(self._budget):
                    self._complete()
        except Exception as error:
            self.fail(error)
        del self._pass, self.graph, self.plan

    def _complete(self) -> None:
        if self.seed is None and (self._told is not None or self._number is None):
            raise UsageError(
                "No backward pass came by these losses inside the `pergrad.reading` block. Call "
                "`loss.backward()` inside it, on a loss made of the very losses that were given, "
                "or `pergrad.backward` with these losses."
            )
        if self._told is not None:  # a pass of ours has seen to the rest
            return
        if self._hooked_direct:
            raise UnsupportedError(
                f"The parameter `{self._hooked_direct[0]}` has a tensor hook, and its own gradient "
                "lies apart by example: what its hook makes of one example's cannot be read in a "
                f"pass of all. {_REMEDY}"
            )
        self._unreached.check()
        left = [t for t, ends in self._pass.missing.items() if ends]
        if left:
            raise UnsupportedError(_left_out(f"parameter `{self.graph.targets[left[0]]}`"))
        self._doubts.settle()


class _Unreached:
    """Parameters that the losses do not reach, whose `.grad` an op may write to all the same.

    That is the business of other losses in the same pass, and of the other ranks of a distributed
    run, which may reach them; of nobody else.
    """

    def __init__(self, graph: Graph, params: Mapping[str, Tensor]) -> None:
        reached = set(graph.targets.values())
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._before = {
            id(p): (name, p, p.grad, None if p.grad is None else nodes.version(p.grad))
            for name, p in params.items()
            if name not in reached and p.is_leaf and not distributed
        }

    def excuse(self, leaf: Tensor | None) -> None:
        """Another loss of the pass reaches it."""
        self._before.pop(id(leaf), None)

    def check(self) -> None:
        """Nothing was written to the others."""
        for name, p, grad, version in self._before.values():
            if p.grad is not grad or (grad is not None and nodes.version(grad) != version):
                raise UnsupportedError(
                    f"The backward pass wrote to the .grad of `{name}`, which is not in the graph "
                    "of these losses: an op runs a backward pass of its own and hides it. "
                    "Reversible layers do so, and some checkpoints. Compute the losses without it."
                )


def taken_over(losses: Tensor, params: Mapping[str, Tensor]) -> UserPass | None:
    """The reading that waits for a backward pass of these losses, if a pass of ours is that one."""
    waiting = _WAITING.get(id(losses))
    if waiting is None or waiting._losses() is not losses:
        return None
    waiting.take_over(params)
    return waiting


def set_aside(losses: Tensor, why: UsageError) -> None:
    """A reading that waits for a backward pass of these losses has no numbers."""
    waiting = _WAITING.get(id(losses))
    if waiting is not None and waiting._losses() is losses:
        waiting.fail(why)


def _two_passes() -> str:
    return (
        "Two backward passes came by the same losses inside one `pergrad.reading` block, so what "
        "was read is the gradient of neither. Give each pass a block of its own."
    )


def _left_out(place: str) -> str:
    return (
        f"The backward pass did not come by every use of {place}, so its gradients would be "
        "incomplete and no number is returned. A pass with `inputs=` or of `torch.autograd.grad` "
        "stops early: give `pergrad.reading` the parameters that it is asked for."
    )


def _refuse(schedule: Schedule) -> None:
    """What must not be touched within a pass that is not ours."""
    if schedule.compiled:
        raise UnsupportedError(
            "The losses go through a region compiled by torch.compile, whose backward runs once. "
            'Compute the losses under `with torch.compiler.set_stance("force_eager"):` in the '
            f"steps that are read. {_REMEDY}"
        )
