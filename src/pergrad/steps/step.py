"""`compiled`: a step whose questions are compiled, for small models and for steps taken often.

Owns: the face, how a call finds its graph, and what is done where torch follows no further.
Does not know: how a graph is recorded (`record`), what is asked (`asked`).
"""

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from pergrad import inputs
from pergrad.clipping import Clip
from pergrad.engine.accumulation import accumulate
from pergrad.engine.run import none_reached
from pergrad.errors import FallbackWarning, UnsupportedError, UsageError, users_line
from pergrad.graph.nodes import capture
from pergrad.inputs import Direction, Params
from pergrad.steps.asked import GRAM, NORMS, NORMS_BY_PARAMETER, Asked, Results, dots, weighted
from pergrad.steps.record import Graph, parameters_among


def compiled(
    function: Callable[..., Tensor], params: Params | None = None, *, backend: str = "inductor"
) -> "CompiledStep":
    """A step: from a batch to what is asked of its losses, compiled as one graph.

        step = pergrad.compiled(function, model)
        step(*batch)[b] = | d function(*batch)[b] / d params |

    The first call with inputs of a kind (shapes, dtypes, `model.train()` or `.eval()`, values of
    Python that the function reads) is served as any other. Then the forward pass, the cotangents
    and what is asked are recorded together, without the weight gradients, and compiled; the result
    is held against that of the first call. Later calls run no Python of the function's, nor of
    pergrad's. For small models, whose steps are mostly Python: a perceptron of 64-64-10 takes half
    a plain step instead of three or four. Large models gain little, and lose pergrad's own kernels.

    Args:
        function: batch -> losses (B,), attached to their graph: `lambda x, y: F.cross_entropy(
            model(x), y, reduction="none")`. It takes what you pass to the step, has one result,
            and writes to nothing.
        params: as in `norms`. None (default) for every nn.Parameter that requires grad and that
            the function uses.
        backend: which backend of torch.compile makes code of the record. "inductor" (default)
            needs a C++ compiler on the CPU; "eager" compiles nothing and needs none.

    Returns:
        A CompiledStep: `step(*batch)` and `step.norms(*batch)` are the norms (B,);
        `step.norms_by_parameter`, `step.gram`, `step.dots(*batch, against=direction)`,
        `step.backward(*batch, weights=...)`.

    Raises:
        UsageError: function is not callable, there is no such backend, or params are none.
        UsageError, MixedExamplesError: at a call: as `norms`.
        UnsupportedError: at a call: the function cannot be followed, recorded or compiled, with the
            reason and its line.

    Cost: the first call with each kind of inputs compiles, which takes seconds to a minute; torch
        keeps eight kinds. Memory of a forward pass and its cotangents.

        >>> import torch, pergrad
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.Flatten(0))
        >>> step = pergrad.compiled(model, backend="eager")         # its outputs are the losses
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> step(x), step(2 * x)
        (tensor([5., 1.]), tensor([10.,  2.]))
        >>> step
        CompiledStep(Sequential, 1 kind of inputs: norms)
    """
    if not callable(function):
        raise UsageError(
            f"`function` is a {type(function).__name__}. Pass a function from a batch to its losses"
            ', such as `lambda x, y: F.cross_entropy(model(x), y, reduction="none")`.'
        )
    if isinstance(function, torch.nn.Module) and params is None:
        params = function
    known = capture.backends()
    if backend not in known:
        raise UsageError(f"There is no backend {backend!r}; torch has {', '.join(known)}.")
    return CompiledStep(function, params, backend)


class CompiledStep:
    """What `compiled` returns: the verbs, with a batch in the place of losses."""

    def __init__(
        self, function: Callable[..., Tensor], params: Params | None, backend: str
    ) -> None:
        self._function, self._params, self._backend = function, params, backend
        self._graphs: list[Graph] = []
        self._now = _Now()
        self._followed = capture.followed(function, self._receive)
        self._names: dict[int, str] = {}  # of the parameters that count, by id
        self._others: dict[int, Tensor] = {}  # those that do not
        self._held: dict[str, Tensor] = {}
        self._told = False
        if params is not None:
            self._ask_names()

    def __repr__(self) -> str:
        name = getattr(self._function, "__name__", type(self._function).__name__)
        count = len(self._graphs)
        asked = sorted({str(key[0]) for graph in self._graphs for key in graph.records})
        kinds = f"{count} kind{'' if count == 1 else 's'} of inputs"
        return f"CompiledStep({name}, {kinds}{': ' if asked else ''}{', '.join(asked)})"

    def __call__(self, *batch: Any, **named: Any) -> Tensor:
        """The norms (B,), as `norms`."""
        return self.norms(*batch, **named)

    def norms(self, *batch: Any, **named: Any) -> Tensor:
        """The L2 norm of the gradient of each loss (B,), as `pergrad.norms`.

        Raises:
            UsageError, MixedExamplesError, UnsupportedError: as in `compiled`.
        """
        return self._asked(NORMS, batch, named).results[0]

    def norms_by_parameter(self, *batch: Any, **named: Any) -> dict[str, Tensor]:
        """name -> (B,), as `pergrad.norms_by_parameter`.

        Raises:
            UsageError, MixedExamplesError, UnsupportedError: as in `compiled`.
        """
        answer = self._asked(NORMS_BY_PARAMETER, batch, named)
        found = dict(zip(answer.named, answer.results, strict=True))
        if self._params is None:
            return found
        like = answer.results[0]
        return {name: found.get(name, torch.zeros_like(like)) for name in self._held}

    def gram(self, *batch: Any, **named: Any) -> Tensor:
        """All inner products between the gradients of the batch (B, B), as `pergrad.gram`.

        Raises:
            UsageError, MixedExamplesError, UnsupportedError: as in `compiled`.
        """
        return self._asked(GRAM, batch, named).results[0]

    def dots(self, *batch: Any, against: Direction, **named: Any) -> Tensor:
        """Inner products of the gradients with a direction (B,), as `pergrad.dots`.

        Args:
            *batch: what the function takes.
            **named: the same, by name.
            against: a direction as in `pergrad.dots`; its numbers may be others at each call.

        Raises:
            UsageError: the direction does not fit, or the step was made without `params`.
            MixedExamplesError, UnsupportedError: as in `compiled`.
        """
        if self._params is None:
            raise UsageError(
                "A direction is one in the space of parameters: pass them, as in "
                "`pergrad.compiled(function, model)`."
            )
        if not isinstance(against, (Tensor, Mapping, Sequence)):
            raise UsageError(
                f"`against` is a {type(against).__name__}. A compiled step takes a direction: a "
                "mapping from names to tensors, a sequence of tensors, or one flat tensor. For a "
                "GradientMatrix use `pergrad.dots(function(...), model, against=J)`."
            )
        shapes = {name: tuple(p.shape) for name, p in self._held.items()}
        devices = {name: p.device for name, p in self._held.items()}
        asked = dots(inputs.direction(against, shapes, devices))
        return self._asked(asked, batch, named).results[0]

    def backward(
        self, *batch: Any, weights: Tensor | float | Clip | None = None, **named: Any
    ) -> Tensor:
        """Add the weighted sum of the gradients to `.grad`; return the norms (B,).

        As `pergrad.backward`, hooks after accumulation included.

        Args:
            *batch: what the function takes.
            **named: the same, by name.
            weights: None for ones, a tensor (B,), one number for all, or `pergrad.clip(max_norm)`.
                A clip by layer, by a quantile, or a function of your own would decide in Python:
                take the norms first, `step(x)`, and pass the weights.

        Raises:
            UsageError: weights that are none of these, or a parameter that is no leaf.
            MixedExamplesError, UnsupportedError: as in `compiled`; `.grad` is left alone.
        """
        clip = isinstance(weights, Clip) and weights.by is None and weights.quantile is None
        number = isinstance(weights, (int, float)) and not isinstance(weights, bool)
        if not (weights is None or clip or number or isinstance(weights, Tensor)):
            raise UsageError(
                f"`weights` is {weights!r}, which decides in Python at every call. Take the norms "
                "first, `norms = step(x)`, and pass `weights=` as a tensor (B,); or use "
                "`pergrad.backward(function(...), model, weights=...)`."
            )
        if isinstance(weights, Tensor):
            weights = weights.detach()
        answer = self._asked(weighted(weights), batch, named)
        norms, *sums = answer.results
        for p, value in zip(answer.named.values(), sums, strict=True):
            if value.shape == p.shape:  # else it is not reached
                accumulate(p, value)
        return norms

    def _asked(self, asked: Asked, batch: tuple[Any, ...], given: dict[str, Any]) -> "_Answer":
        now = self._now
        arguments = frozenset[int]()
        if self._params is None:
            arguments = frozenset(map(id, pytree.tree_leaves((batch, given))))
        now.call = call = _Call(asked, arguments)
        try:
            returned = self._followed(*batch, **given)
        except Exception as error:
            why = capture.not_followed(error)
            if why is None:
                raise
            return self._by_hand(asked, why, error, batch, given)
        finally:
            now.call = None
        if call.answer is None or not isinstance(returned, Tensor):
            raise UsageError(_NO_LOSSES.format(type(returned).__name__))
        return call.answer

    def _receive(
        self, module: fx.GraphModule, _: Sequence[Tensor]
    ) -> Callable[..., tuple[Tensor, ...]]:
        """What is run for one graph of the function."""
        names, more = (
            capture.input_names(module, self._function),
            capture.results_of(module) != 1,
        )
        graph = Graph(module, self._backend, names)
        self._graphs.append(graph)

        def run(*inputs: Any) -> tuple[Tensor, ...]:
            call = self._now.call
            assert call is not None
            if more:
                raise UnsupportedError(_MORE)
            chosen = self._chosen(graph, inputs, call.arguments)
            named = {name: inputs[place] for place, name in chosen.items()}
            results = graph.answer(call.asked, inputs, chosen)
            call.answer = _Answer(results, named)
            return (results[0],)

        return run

    def _chosen(
        self, graph: Graph, inputs: Sequence[Tensor], arguments: frozenset[int]
    ) -> dict[int, str]:
        """The parameters among the inputs of a graph, by place."""
        if self._params is None:
            return parameters_among(graph, inputs, arguments)
        found = self._look(inputs)
        if found is None:  # a parameter that is not known: was one replaced?
            self._ask_names()
            self._others |= {id(t): t for t in inputs if id(t) not in self._names}
            found = self._look(inputs)
        if not found:
            raise UsageError(none_reached(self._held))
        return found

    def _look(self, inputs: Sequence[Tensor]) -> dict[int, str] | None:
        found = {}
        for place, t in enumerate(inputs):
            if t.requires_grad:
                name = self._names.get(id(t))
                if name is not None:
                    found[place] = name
                elif id(t) not in self._others and isinstance(t, torch.nn.Parameter):
                    return None
        return found

    def _ask_names(self) -> None:
        assert self._params is not None
        if not isinstance(self._params, (torch.nn.Module, Mapping, Tensor)):
            inputs.check_params(self._params)
            self._params = list(self._params)  # an iterator ends
        self._held = inputs.named(self._params)
        self._names = {id(p): name for name, p in self._held.items()}

    def _by_hand(
        self,
        asked: Asked,
        why: str,
        error: Exception,
        batch: tuple[Any, ...],
        given: dict[str, Any],
    ) -> "_Answer":
        """Without a graph, if torch has as many as it keeps; else say why there is none."""
        name = getattr(self._function, "__name__", type(self._function).__name__)
        if why != "limit":
            with torch.random.fork_rng(), torch.enable_grad():
                self._function(*batch, **given)  # an error of the function's own says more
            raise UnsupportedError(
                f"torch.compile cannot follow `{name}`: {why}. Use "
                f"`pergrad.{asked.name}({name}(...), model)`, which follows whatever Python does."
            ) from error
        if self._params is None:
            raise UnsupportedError(
                f"`{name}` has been compiled for {len(self._graphs)} kinds of inputs, which is all "
                "that torch keeps. Pad batches to few sizes, or pass the parameters, "
                "`pergrad.compiled(function, model)`, so that others are served without a graph."
            ) from error
        if not self._told:
            self._told = True
            warnings.warn(
                f"`{name}` has been compiled for {len(self._graphs)} kinds of inputs, which is all "
                "that torch keeps: others are served exactly, but at the price of a call of "
                f"`pergrad.{asked.name}`. Pad batches to few sizes to have all compiled.",
                FallbackWarning,
                stacklevel=users_line(),
            )
        self._ask_names()
        with torch.enable_grad():
            losses = inputs.check_losses(self._function(*batch, **given))
        return _Answer(asked.answer(losses, self._held, asked.tensors), self._held)


@dataclass(slots=True)
class _Answer:
    """Results, and the parameters that they are of."""

    results: Results
    named: dict[str, Tensor]


@dataclass(slots=True)
class _Call:
    """What is asked now, and its answer."""

    asked: Asked
    arguments: frozenset[int]  # tensors that are passed, by id
    answer: _Answer | None = None


class _Now(threading.local):
    """The call of this thread."""

    call: _Call | None = None


_NO_LOSSES = (
    "The function returned a {}, which no op of torch's has computed from its inputs, or more than "
    "that. A compiled step wants the losses alone, (B,), one per example: "
    '`return F.cross_entropy(model(x), y, reduction="none")`.'
)
_MORE = (
    "The function returns or keeps more than its losses (a second result, an attribute, an entry "
    "of a list), which a compiled step does not compute. Return the losses alone, (B,), and keep "
    "nothing; or use `pergrad.norms(function(...), model)`."
)
