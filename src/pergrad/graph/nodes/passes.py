"""torch's backward passes, seen from inside and outside.

Owns: which pass a thread is in, and running something inside or outside of one.
Does not know: what is run.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward

from pergrad.graph.nodes.hooks import before

Result = TypeVar("Result")


def pass_number() -> int:
    """Which of torch's backward passes this thread is in; -1 if it is in none."""
    return torch._C._current_graph_task_id()


def starts_under_way() -> list[Any]:
    """What the backward passes under way, in all threads, were started from: tensors and edges.

    torch tells nobody, but the function that starts a pass is still there, with its arguments.
    """
    found: list[Any] = []
    at: Any = None
    frames = list(sys._current_frames().values())
    while frames:
        at = frames.pop()
        while at is not None:
            if at.f_code is _engine_run_backward.__code__:
                found += at.f_locals["t_outputs"]
            at = at.f_back
    # Nothing here may refer to a frame any more: this one would keep itself, and with it all below
    # it and what their variables hold, until Python looks for circles.
    return found


def after_pass(function: Callable[[], Any]) -> None:
    """Call a function at the end of the backward pass that this thread is in.

    Behind those that were asked for before, in the same pass or by one of them.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(function)


def will_run(node: Any) -> bool:
    """Whether the backward pass that this thread is in comes by a node."""
    return bool(torch._C._will_engine_execute_node(node))


def gradients(
    total: Tensor,
    wanted: Sequence[GradientEdge],
    *,
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of one number, None where it has none.

    Without what torch looks at first, which takes a twentieth of a small model's time.
    """
    if type(total) is not Tensor:
        return torch.autograd.grad(
            total, list(wanted), allow_unused=True,
            retain_graph=retain_graph, create_graph=create_graph,
        )  # fmt: skip
    keep = create_graph if retain_graph is None else retain_graph
    found: tuple[Tensor | None, ...] = _engine_run_backward(
        (total,), (torch.ones_like(total),), keep, create_graph, tuple(wanted), True,
        accumulate_grad=False,
    )  # fmt: skip
    return found


def outside_pass(work: Callable[[], Result]) -> Result:
    """Run `work` as if no backward pass were under way.

    Inside a pass, a direct call of a node leaves out the gradients that the pass does not want.
    The pass is known to its own thread only.
    """
    if pass_number() == -1:
        return work()
    outcome: list[Result] = []
    failure: list[BaseException] = []
    enabled = torch.is_grad_enabled()

    def run() -> None:
        try:
            with torch.set_grad_enabled(enabled):
                outcome.append(work())
        except BaseException as error:
            failure.append(error)

    # torch's settings are context variables, and a thread begins without the caller's
    thread = threading.Thread(target=copy_context().run, args=(run,), name="pergrad-node-call")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def inside_pass(losses: Tensor, wanted: Sequence[GradientEdge], work: Any) -> None:
    """Run `work()` inside a backward pass of torch's engine that computes nothing by itself.

    There, a direct call of a node computes only the gradients that lead to `wanted` (no weight
    gradients), and saved tensors of checkpointed blocks are recomputed once. None of the
    user's hooks runs: the pass stops at its first node, which is ours.
    """

    class Done(Exception):
        pass

    failure: list[BaseException] = []

    def run(_: Any) -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)
        raise Done

    with torch.enable_grad():
        total = losses.sum()
    assert total.grad_fn is not None
    handle = before(total.grad_fn, run)
    try:
        torch.autograd.grad(total, list(wanted), retain_graph=True, allow_unused=True)
    except Done:
        pass
    finally:
        handle.remove()
    if failure:
        raise failure[0]
