"""Hooks that the user has registered inside a graph.

Owns: finding which of them belong to which node, without calling any; whether a hook can change a
gradient, by its code; what a hook is called in a message.
Does not know: layouts, passes, factors.

A node does not show the hooks on the tensors that it made. But torch calls them where a gradient
is asked for that is given at the very same place: so they are put aside, and a recorder in their
stead is told of a marked gradient, which says where it is.
"""

import dis
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType
from typing import Any

import torch
from torch import Tensor

from pergrad.graph import nodes
from pergrad.graph.nodes import Meta
from pergrad.graph.walk import Graph, Slot

Hook = Callable[..., Any]


@dataclass(frozen=True, slots=True, eq=False)
class Hooks:
    """The hooks at one place: of a tensor, before a node runs, or after it has run."""

    kind: str  # "tensor", "before" or "after"
    node: int
    output: int  # of the node, for a tensor's
    functions: "OrderedDict[int, Hook]"

    @property
    def changing(self) -> list[Hook]:
        """Those that may change a gradient."""
        return [hook for hook in self.functions.values() if may_change(hook)]


def hooks_in(
    graph: Graph, candidates: Iterable[OrderedDict], tensors: Iterable[Tensor]
) -> tuple[list[Hooks], list[OrderedDict]]:
    """Hooks above requested parameters, and the candidates that are not among them."""
    index = {node: i for i, node in enumerate(graph.nodes) if graph.leads[i]}
    left = {id(d): d for d in candidates if d}
    # Most likely where the tensor is now; not so if it was changed in place since.
    likely = {index.get(t.grad_fn, -1) for t in tensors if nodes.tensor_hooks(t)} - {-1}
    found: list[Hooks] = []

    def look(at: Iterable[int]) -> None:
        for functions, (i, output) in _located(graph, at, list(left.values())):
            found.append(Hooks("tensor", i, output, functions))
            del left[id(functions)]

    look(likely)
    if left:
        inner = [i for i in index.values() if graph.edges[i]]
        for i in inner:
            for first, functions in nodes.hooks_of_node(graph.nodes[i]):
                found.append(Hooks("before" if first else "after", i, 0, functions))
                left.pop(id(functions), None)
        look(i for i in inner if i not in likely)
    return found, list(left.values())


def _located(
    graph: Graph, inner: Iterable[int], candidates: list[OrderedDict]
) -> list[tuple[OrderedDict, tuple[int, int]]]:
    """The output of a node to which hooks belong of a tensor that nobody has any more."""
    markers: dict[int, int] = {}  # where a marked gradient lies in memory -> output number
    seen: list[tuple[OrderedDict, int]] = []

    def recorder(functions: OrderedDict, hook: Hook) -> Hook:
        def record(*gradients: Any) -> Any:
            g = gradients[0]
            number = markers.get(g.data_ptr()) if isinstance(g, Tensor) else None
            if number is None:  # another thread's pass
                return hook(*gradients)
            seen.append((functions, number))
            return None

        return record

    if not candidates:
        return []
    before = [(functions, dict(functions)) for functions in candidates]
    # torch may not be asked for the gradient of an output that was never made, as those of a
    # convolution's second derivative; nodes do not tell which, but who goes on from them does.
    used = {slot for edges in graph.edges for slot in edges} | {graph.root}
    found: dict[int, tuple[OrderedDict, tuple[int, int]]] = {}
    try:
        for functions, hooks in before:
            replace(functions, {k: recorder(functions, hook) for k, hook in hooks.items()})
        for i in inner:
            marks = _marks(i, graph.metas(i), used)
            markers = {mark.data_ptr(): n for n, mark in marks.items()}
            seen.clear()
            edges = [graph.edge((i, n)) for n in marks]
            nodes.call_tensor_hooks(edges, list(marks.values()))
            found |= {id(functions): (functions, (i, n)) for functions, n in seen}
            if len(found) == len(candidates):
                break
    finally:
        for functions, hooks in before:
            replace(functions, hooks)
    return list(found.values())


def _marks(node: int, metas: Sequence[Meta], used: Container[Slot]) -> dict[int, Tensor]:
    """A gradient for each output, each of one number at a place in memory of its own."""
    return {
        n: torch.zeros((), dtype=m.dtype, device=m.device).expand(m.shape)
        for n, m in enumerate(metas)
        if (node, n) in used and (m.dtype.is_floating_point or m.dtype.is_complex)
    }


def replace(functions: "OrderedDict[int, Hook]", by: "dict[int, Hook]") -> None:
    """Other functions for the hooks that are still there, in the same order."""
    for k, hook in by.items():
        if k in functions:
            functions[k] = hook


# Methods of Python's own containers that return nothing.
_RETURN_NOTHING = {"add", "append", "appendleft", "extend", "insert", "print", "put", "update"}


def may_change(hook: Hook) -> bool:
    """Whether a hook might return a gradient: whether its code has a way to return anything."""
    if isinstance(hook, BuiltinFunctionType):
        return hook.__name__ not in _RETURN_NOTHING
    closed = _of_module(hook)
    if closed is not None:
        return any(map(may_change, closed))
    code = _code(hook)
    return code is None or _returns(code)


def _of_module(hook: Hook) -> list[Hook] | None:
    """The user's hooks on a module behind a hook of torch's that calls them."""
    if getattr(hook, "__module__", None) != "torch.utils.hooks":
        return None
    for cell in getattr(hook, "__closure__", None) or ():
        owner = cell.cell_contents
        if hasattr(owner, "user_hooks") and hasattr(owner, "user_pre_hooks"):
            return [*owner.user_hooks, *owner.user_pre_hooks]
    return None


def _inner(hook: Hook) -> Hook:
    """The function behind a bound method, functools.partial, torch's wrapper, or an object."""
    for _ in range(8):
        if type(hook).__module__ == "torch.nn.modules.module" and hasattr(hook, "hook"):
            hook = hook.hook
        elif hasattr(hook, "func") and hasattr(hook, "keywords"):
            hook = hook.func
        elif hasattr(hook, "__func__"):
            hook = hook.__func__
        elif not hasattr(hook, "__code__") and hasattr(type(hook).__call__, "__code__"):
            hook = type(hook).__call__
        else:
            break
    return hook


def _code(hook: Hook) -> CodeType | None:
    code = getattr(_inner(hook), "__code__", None)
    return code if isinstance(code, CodeType) else None


def _returns(code: CodeType) -> bool:
    """Whether code returns anything but the constant None."""
    if code.co_flags & 0x2A0:  # a generator, a coroutine, both
        return True
    steps = list(dis.get_instructions(code))
    for before, step in zip([None, *steps], steps, strict=False):
        if step.opname == "RETURN_CONST":
            if step.argval is not None:
                return True
        elif step.opname == "RETURN_VALUE" and (
            before is None
            or step.is_jump_target
            or before.opname != "LOAD_CONST"
            or before.argval is not None
        ):
            return True
    return False


def name_of(hook: Hook) -> str:
    """The user's function and where it stands: `mask` (model.py:12)."""
    closed = _of_module(hook)
    if closed:
        hook = next(filter(may_change, closed), closed[0])
    inner = _inner(hook)
    name = getattr(inner, "__qualname__", None) or type(inner).__qualname__
    code = _code(hook)
    if code is None:
        return f"`{name}`"
    file = code.co_filename.replace("\\", "/").rsplit("/", 1)[-1]
    return f"`{name}` ({file}:{code.co_firstlineno})"
