"""The backward graph of a region compiled by torch.compile, read and run.

Owns: where torch keeps the graph, what the region hands to it, and which of its results is whose.
Does not know: what the ops in the graph do, parameters.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from pergrad.errors import UnsupportedError
from pergrad.graph.nodes.calls import raw_call
from pergrad.graph.nodes.reading import Node, is_compiled, op_name

_Function = TypeVar("_Function", bound=Callable[..., Any])


def never_compiled(function: _Function) -> _Function:
    """A function that torch.compile never traces, nor what it calls, wherever it is called from.

    For what Python itself calls at any time, as a garbage collection does: also from a forward pass
    whose Python torch is compiling. Unlike torch.compiler.disable it does not import the compiler.
    """
    from torch._C._dynamo import eval_frame

    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


def region_class(node: Node) -> Any:
    """What torch has made of the region: alive as long as the compiled function is."""
    return node._forward_cls


def region_graph(node: Node) -> fx.GraphModule | str:
    """The backward of the region as a graph of aten ops; or why there is none."""
    held: Any = getattr(region_class(node), "_lazy_backward_info", None)
    graph = getattr(held, "bw_module", None)
    if graph is None and hasattr(held, "bw_module_fn"):
        try:
            graph = held.bw_module_fn()
        except Exception as error:  # whatever goes wrong in torch's cache
            return f"torch's cache does not give its backward graph ({type(error).__name__})"
    if not isinstance(graph, fx.GraphModule):
        return "torch keeps no backward graph of it"
    if not hasattr(region_class(node), "_backward_impl"):
        return f"torch {torch.__version__} runs compiled regions otherwise than pergrad knows"
    return graph


def made_by_inductor(node: Node) -> bool:
    """Whether the region's code was made by inductor, torch.compile's default backend."""
    function, seen = getattr(region_class(node), "compiled_fw", None), 0
    while function is not None and seen < 8:
        if type(function).__module__.startswith("torch._inductor"):
            return True
        function, seen = getattr(function, "__wrapped__", None), seen + 1
    return False


_PATCHED = threading.RLock()


@contextmanager
def _backward_replaced(node: Node, function: Callable[[Any, list[Any]], Any]) -> Iterator[None]:
    """Within this block and thread, the node's backward runs `function` on what it would run on."""
    cls = region_class(node)
    here = threading.get_ident()

    def instead(ctx: Any, arguments: list[Any]) -> Any:
        if ctx is not node or threading.get_ident() != here:
            return before.__func__(ctx, arguments)
        return function(ctx, arguments)

    with _PATCHED:
        before = cls.__dict__["_backward_impl"]
        cls._backward_impl = staticmethod(instead)
        try:
            yield
        finally:
            cls._backward_impl = before


_KEPT: WeakKeyDictionary[type, int] = WeakKeyDictionary()  # how many passes want a region kept


@contextmanager
def compiled_regions_kept(nodes: Iterable[Node]) -> Iterator[None]:
    """Within this block the compiled ones of `nodes` may run again and again.

    Code that torch compiled for a backward that runs once writes over tensors that the region has
    saved, and torch's guard against a second run looks at a setting, not at the code. So such
    tensors are copied before each run.
    """
    classes = {region_class(node): node for node in nodes if is_compiled(node)}
    if not classes:
        yield
        return
    import torch._functorch.config as config

    for cls, node in classes.items():
        # not hasattr: every Function inherits another `metadata`
        if not {"_backward_impl", "metadata"} <= set(vars(cls)):
            if cls.__name__ == "CompiledFunctionBackward":  # torch's own refusal, as a node
                raise UnsupportedError(
                    "The losses are made of a derivative that was taken with create_graph=True "
                    "through a region compiled by torch.compile, and torch compiles no second "
                    "derivative: a backward pass of yours would fail, too. Compute the losses "
                    'under `with torch.compiler.set_stance("force_eager"):`.'
                )
            raise UnsupportedError(
                f"torch {torch.__version__} runs the region `{op_name(node)}` compiled by "
                "torch.compile otherwise than pergrad knows, and it would run more than once. "
                'Compute the losses under `with torch.compiler.set_stance("force_eager"):`.'
            )
    with ExitStack() as stack:
        for cls in classes:
            stack.enter_context(_saved_kept(cls))
        stack.enter_context(config.patch(donated_buffer=False))
        yield


@contextmanager
def _saved_kept(cls: Any) -> Iterator[None]:
    """Within this block the region's backward runs on copies of what it may write over."""
    with _PATCHED:
        before = cls.__dict__["_backward_impl"]
        count = _KEPT[cls] = _KEPT.get(cls, 0) + 1
        if count == 1:

            def instead(ctx: Any, arguments: list[Any]) -> Any:
                given_away = cls.metadata.bw_donated_idxs or ()
                kept = [
                    _copied(a) if i in given_away and isinstance(a, Tensor) else a
                    for i, a in enumerate(arguments)
                ]
                return before.__func__(ctx, kept)

            instead.kept = before  # type: ignore[attr-defined]
            cls._backward_impl = staticmethod(instead)
    try:
        yield
    finally:
        with _PATCHED:
            _KEPT[cls] -= 1
            if not _KEPT[cls]:
                cls._backward_impl = cls.__dict__["_backward_impl"].__func__.kept


def _copied(x: Tensor) -> Tensor:
    """A copy that lies in memory as x does, which compiled code relies on; a clone may not."""
    once = x[tuple(slice(0, 1) if step == 0 else slice(None) for step in x.stride())]
    copy = torch.empty_strided(once.shape, once.stride(), dtype=x.dtype, device=x.device)
    return copy.copy_(once).expand(x.shape)


class _Result:
    """Stands for one result of the graph."""

    def __init__(self, number: int) -> None:
        self.number = number


def region_arguments(
    node: Node, cotangents: Sequence[Tensor | None], count: int = 0
) -> tuple[list[Any], list[int | None]]:
    """What the graph is run on for these cotangents; and, for each edge, the result that is its.

    `count`: how many results the graph has; without it, none is asked for.
    """
    taken: list[Any] = []

    def take(_: Any, arguments: list[Any]) -> Any:
        taken.extend(arguments)
        if not count:
            raise _Enough
        return tuple(_Result(n) for n in range(count))

    with _backward_replaced(node, take):
        try:
            results: Sequence[Any] = raw_call(node, cotangents)
        except _Enough:
            results = ()
    return taken, [r.number if isinstance(r, _Result) else None for r in results]


class _Enough(Exception):
    """Nothing but the arguments was wanted."""


class _Recording(fx.Interpreter):
    """Keeps what every node returned."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = result = super().run_node(n)
        return result


def shapes_within(module: fx.GraphModule, arguments: Sequence[Any]) -> dict[fx.Node, Any]:
    """What every node of the graph returns for such arguments: tensors without numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    recording = _Recording(module)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        recording.run(*fakes)
    return recording.values


def with_reshapes(module: fx.GraphModule) -> fx.GraphModule:
    """A copy that takes tensors as they lie: inductor decides how, and knows that views hold."""
    graph = fx.Graph()
    result = graph.graph_copy(module.graph, {})
    graph.output(result)
    for node in graph.nodes:
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
    return fx.GraphModule(module, graph)


def arguments_by_name(call: fx.Node) -> dict[str, Any]:
    """The arguments of an op in the graph, as its schema calls them, without those left out."""
    if not isinstance(call.target, torch._ops.OpOverload):
        return dict(call.kwargs)
    names = [argument.name for argument in call.target._schema.arguments]
    return dict(zip(names, call.args, strict=False)) | dict(call.kwargs)


def changes_something(target: Any) -> bool:
    """Whether an op of the graph writes to its arguments, or draws random numbers."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags


class Stand:
    """Stands for a node of another op: what that op would have saved, by name."""

    def __init__(self, **saved: Any) -> None:
        for field, value in saved.items():
            setattr(self, "_saved_" + field, value)
