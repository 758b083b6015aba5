"""A function followed by torch's own tracers: its graph, and what is compiled from a graph.

Owns: dynamo, which follows the user's Python under guards; `make_fx`, which records the aten ops of
what is made of that; and the backend that compiles the record.
Does not know: losses, gradients, what a graph computes.
"""

import os
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx

Receive = Callable[[fx.GraphModule, Sequence[Tensor]], Callable[..., tuple[Tensor, ...]]]

_OURS = threading.local()


def followed(function: Callable[..., Any], receive: Receive) -> Callable[..., Any]:
    """The function, followed once for every kind of input and state that torch's guards tell apart.

    `receive` gets each graph, and returns what is run in its place. A call raises what
    `not_followed` knows.
    """
    import torch._dynamo

    _watch_hooks()

    def whole(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # Copied, for code of its own, to which torch attaches what it has followed: else all steps
    # share a limit. A function that others have wrapped, or an object, is called from such code.
    plain = isinstance(function, FunctionType) and not vars(function)
    alone = _copied(function if plain else whole)
    compiled = torch.compile(alone, backend=receive, fullgraph=True, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        _OURS.calls = getattr(_OURS, "calls", 0) + 1
        try:
            return compiled(*args, **kwargs)
        finally:
            _OURS.calls -= 1

    return call


def _copied(function: Any) -> Any:
    copy = FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _watch_hooks() -> None:
    """Let torch's guards look at modules' hooks, in functions that are followed here alone.

    torch leaves them out to save time, so a hook that is added later would be ignored. The setting
    is read while a function is compiled; set at each call it would cost as much as a small model.
    """
    from torch._dynamo.callback import callback_handler

    if _begin not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_begin)
        callback_handler.register_end_callback(_end)


def _begin(*_: Any) -> None:
    import torch._dynamo.config as config

    if getattr(_OURS, "calls", 0):
        _OURS.before = config.skip_nnmodule_hook_guards
        config.skip_nnmodule_hook_guards = False


def _end(*_: Any) -> None:
    import torch._dynamo.config as config

    if getattr(_OURS, "calls", 0) and hasattr(_OURS, "before"):
        config.skip_nnmodule_hook_guards = _OURS.before
        del _OURS.before


def not_followed(error: Exception) -> str | None:
    """Why torch could not follow a function, in a line; None if the error is none of torch's."""
    from torch._dynamo import exc

    if isinstance(error, exc.FailOnRecompileLimitHit):
        return "limit"
    if not isinstance(error, exc.TorchDynamoException):
        return None
    text = str(error)
    told = re.search(r"Explanation: (.+)", text)
    line = (told.group(1) if told else text.strip().splitlines()[0]).strip().rstrip(".")
    _, _, code = text.partition("from user code:")
    ours = (os.path.dirname(torch.__file__), __file__)
    where = [
        f"{file}:{number}" for file, number in re.findall(r'File "([^"]*)", line (\d+)', code)
        if not file.startswith(ours)
    ]  # fmt: skip
    return f"{line} ({where[-1]})" if where else line


def input_names(graph: fx.GraphModule, function: Callable[..., Any]) -> list[str]:
    """Where each input of a followed graph comes from, as one would write it: `model.0.weight`."""
    free = getattr(getattr(function, "__code__", None), "co_freevars", ())
    found = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            source = getattr(node.meta.get("grapharg"), "source", None)
            name = getattr(source, "name", node.name)
            found.append(_readable(name() if callable(name) else name, free))
    return found


def _readable(source: str, free: Sequence[str]) -> str:
    """How a user would write a source of dynamo's.

    L['function'].__closure__[0].cell_contents._modules['0']._parameters['weight'] of a function
    whose first free variable is `model` is model.0.weight.
    """

    def cell(match: re.Match[str]) -> str:
        number = int(match.group(1))
        return free[number] if number < len(free) else match.group()

    text = re.sub(r"^L\['function'\]\.__closure__\[(\d+)\]\.cell_contents", cell, source)
    text = re.sub(r"^L\['function'\]\.?", "", text)
    text = re.sub(r"\b[LG]\[['\"](\w+)['\"]\]", r"\1", text)
    return re.sub(
        r"\.?_(?:modules|parameters|buffers)\[['\"]([^'\"]+)['\"]\]", r".\1", text
    ).lstrip(".")


def results_of(graph: fx.GraphModule) -> int:
    """How many results a followed graph returns."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    return len(output.args[0])


def reading_refused(error: Exception) -> str | None:
    """Whether a record failed because somebody read numbers, and where; None if otherwise."""
    from torch._subclasses.fake_tensor import DataDependentOutputException
    from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicShape
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    if isinstance(error, (DataDependentOutputException, DynamicShape)):
        return f"what is done depends on the numbers that `{error.func}` reads"
    if isinstance(error, GuardOnDataDependentSymNode):
        return "what is done depends on numbers that Python reads"
    return None


def draws(graph: fx.GraphModule) -> bool:
    """Whether a recorded graph draws random numbers."""
    return any(
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
        for node in graph.graph.nodes
    )


def recorded(function: Callable[..., Any], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The aten ops of function(*inputs), for any numbers in them: whoever reads one fails."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def backends() -> list[str]:
    """The names of torch.compile's backends."""
    from torch._dynamo.backends.registry import list_backends

    return list_backends(exclude_tags=())


def compiled_from(
    graph: fx.GraphModule, inputs: Sequence[Tensor], backend: str
) -> Callable[..., Any]:
    """Code for a recorded graph. Random numbers are those that torch draws without a compiler."""
    import torch._inductor.config
    from torch._dynamo.backends.registry import lookup_backend

    settings = torch._inductor.config.patch(fallback_random=True)
    with torch.no_grad(), settings, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own code, which nobody here can change
        return lookup_backend(backend)(graph, list(inputs))


def nothing_cast() -> AbstractContextManager[object]:
    """Autocast off where it is on: its casts are in the record already."""
    on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    stack = ExitStack()
    for kind in on:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
