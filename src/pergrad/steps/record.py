"""One graph of a user's function, and what was recorded and compiled for each question asked of it.

Owns: which inputs are parameters, the first call and its checks, and when a record does not count.
Does not know: the questions (`asked`), how a graph comes about (`graph.nodes.capture`).

The first call is served as any other, which finds and verifies the plan. Then the same is recorded
for any numbers, compiled, run on the numbers of that call, and held against what was found.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from pergrad import inputs as given
from pergrad.errors import PergradError, UnsupportedError, UsageError
from pergrad.graph import nodes, plan
from pergrad.graph.nodes import capture
from pergrad.recording import Recording
from pergrad.steps.asked import Asked, Named, Results

_Result = TypeVar("_Result")


@dataclass(slots=True)
class Record:
    """What was compiled for one question."""

    run: Callable[..., Any]

    def __call__(self, inputs: Sequence[Tensor]) -> Results | None:
        """The answer; None where numbers are beyond what it can tell."""
        with capture.nothing_cast():
            doubtful, *results = self.run(*inputs)
        return None if doubtful else tuple(results)


@dataclass(slots=True)
class Graph:
    """A function's graph for one kind of inputs."""

    graph: fx.GraphModule
    backend: str
    names: list[str]  # of the inputs, as the user would write them
    records: dict[tuple[object, ...], Record] = field(default_factory=dict)

    def answer(self, asked: Asked, inputs: Sequence[Tensor], chosen: dict[int, str]) -> Results:
        """What is asked, of the losses of these inputs; `chosen` are the parameters among them.

        Raises:
            UsageError, MixedExamplesError, UnsupportedError: as the verb, or it cannot be recorded.
        """
        key = (*asked.key, *chosen.items())
        # a hook of the user's on a parameter is Python that may do anything
        hooked = any(nodes.tensor_hooks(inputs[place]) for place in chosen)
        record = None if hooked else self.records.get(key)
        if record is not None:
            found = record((*inputs, *asked.tensors))
            if found is not None:
                return found
        losses = self._losses(inputs)
        results = asked.answer(losses, _named(inputs, chosen), asked.tensors)
        if record is None and not hooked and losses.shape[0]:
            self.records[key] = self._recorded(asked, inputs, chosen, results)
        return results

    def _losses(self, inputs: Sequence[Tensor]) -> Tensor:
        versions = [nodes.version(t) for t in inputs]
        with torch.enable_grad():
            (losses,) = self.graph(*inputs)
        written = [
            name for name, t, version in zip(self.names, inputs, versions, strict=True)
            if nodes.version(t) != version
        ]  # fmt: skip
        if written:
            raise UnsupportedError(
                f"The function writes to `{written[0]}` whenever it runs, which a compiled step "
                "would do once more for an example that it has to look at again. Use "
                "`pergrad.norms(function(...), model)`, or keep it from writing (`model.eval()`)."
            )
        return given.check_losses(losses)

    def _recorded(
        self, asked: Asked, inputs: Sequence[Tensor], chosen: dict[int, str], results: Results
    ) -> Record:
        every = (*inputs, *asked.tensors)
        count, recording = len(inputs), Recording()

        def answer(*every: Tensor, again: bool = True) -> tuple[Tensor, ...]:
            own = [
                t.detach().requires_grad_() if real.requires_grad else t
                for t, real in zip(every, inputs, strict=False)
            ]
            with torch.enable_grad(), recording.active(again=again) as flags:
                (losses,) = self.graph(*own)
                found = asked.answer(losses, _named(own, chosen), every[count:])
            doubtful = torch.stack(flags).any() if flags else losses.new_zeros((), dtype=torch.bool)
            return doubtful, *(t.detach() for t in found)

        with torch.random.fork_rng():
            # The same way once with numbers: whatever it works out and keeps is worked out here.
            self._tried(asked, lambda: answer(*every, again=False))
            with plan.nothing_remembered():
                graph = self._tried(asked, lambda: capture.recorded(answer, every))
        try:
            with capture.nothing_cast():
                run = capture.compiled_from(graph, every, self.backend)
                first = Record(run)
                with torch.random.fork_rng():
                    again = first(every)
        except Exception as error:
            raise UnsupportedError(
                f'torch\'s backend "{self.backend}" cannot compile the step: '
                f"{_line(error)}. The default needs a C++ compiler on the CPU; "
                '`pergrad.compiled(..., backend="eager")` needs none.'
            ) from error
        if again is not None and not capture.draws(graph):
            _compare(asked, results, again)
        return first

    def _tried(self, asked: Asked, action: Callable[[], _Result]) -> _Result:
        try:
            return action()
        except PergradError:
            raise
        except Exception as error:
            reason = capture.reading_refused(error) or _line(error)
            raise UnsupportedError(
                f"`{asked.name}` of this function cannot be recorded: {reason}. Use "
                f"`pergrad.{asked.name}(function(...), model)`, which needs no record."
            ) from error


def parameters_among(
    graph: Graph, inputs: Sequence[Tensor], arguments: frozenset[int]
) -> dict[int, str]:
    """By place among the inputs: every nn.Parameter that requires grad, under a readable name.

    Raises:
        UsageError: another tensor requires grad, and only the user can tell whether it counts.
    """
    found = {}
    for place, (name, t) in enumerate(zip(graph.names, inputs, strict=True)):
        if not t.requires_grad:
            continue
        if isinstance(t, nn.Parameter):
            found[place] = name
        elif id(t) not in arguments:
            raise UsageError(
                f"`{name}` requires grad and is no nn.Parameter: does it count? Pass those that "
                "do, as in `pergrad.compiled(function, params)`."
            )
    if not found:
        raise UsageError(
            "The function uses no nn.Parameter that requires grad, so there is no gradient to "
            "measure. Call `model.requires_grad_(True)`, or pass the tensors you mean, as in "
            "`pergrad.compiled(function, params)`."
        )
    return found


def _named(inputs: Sequence[Tensor], chosen: dict[int, str]) -> Named:
    return {name: inputs[place] for place, name in chosen.items()}


def _compare(asked: Asked, wanted: Results, got: Results) -> None:
    """Hold a compiled step against the verb: a defect of either would be a silent one."""
    for want, have in zip(wanted, got, strict=True):
        want, have = (t.to_dense() if t.is_sparse else t for t in (want, have))
        bound = torch.finfo(want.dtype).eps ** 0.5
        scale = want.abs().amax().clamp_min(torch.finfo(want.dtype).tiny) if want.numel() else 0
        with contextlib.suppress(AssertionError):
            torch.testing.assert_close(
                have, want, rtol=0, atol=float(bound * scale), equal_nan=True
            )
            continue
        raise UnsupportedError(
            f"The compiled `{asked.name}` differs from the one that is not by more than rounding, "
            "so it is not used. Does the function depend on anything random that is not torch's, "
            f"or on the time? Otherwise use `pergrad.{asked.name}(function(...), model)`, and "
            "please report it with this function."
        )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
