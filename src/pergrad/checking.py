"""The careful user's check: pergrad against the naive loop, on their own model.

Owns: `check` and its report.
Does not know: rules or factors. It compares what the verbs return with plain autograd.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from pergrad import api, inputs
from pergrad.engine.run import OptionsGiven
from pergrad.engine.user_state import retained_untouched
from pergrad.errors import UsageError
from pergrad.graph import nodes, sharded
from pergrad.graph.walk import walk
from pergrad.inputs import Params


@dataclass(frozen=True, slots=True)
class Check:
    """Largest differences between pergrad and the naive loop; prints as a table.

    Errors are relative: of norms to the example's norm, of inner products to the product of the
    two norms, of one parameter's norm to the example's norm.
    """

    errors: dict[str, float]  # what was compared -> largest relative error
    by_parameter: dict[str, float]  # name -> largest relative error of its norm
    noise: float  # what rounding alone explains in this dtype
    examples: int

    @property
    def max_error(self) -> float:
        """The largest error of all, relative to the example's norm."""
        return max([*self.errors.values(), *self.by_parameter.values()], default=0.0)

    @property
    def ok(self) -> bool:
        """Whether rounding explains every difference."""
        return self.max_error <= self.noise

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        rows = [(what, f"{error:.1e}") for what, error in self.errors.items()]
        worst = sorted(self.by_parameter.items(), key=lambda item: -item[1])[:5]
        rows += [(f"norm of {name}", f"{error:.1e}") for name, error in worst]
        width = max(len(what) for what, _ in [*rows, ("compared with the loop", "")])
        lines = [f"{'compared with the loop'.ljust(width)}  largest relative error"]
        lines += [f"{what.ljust(width)}  {error}" for what, error in rows]
        verdict = "ok" if self.ok else "NOT explained by rounding"
        lines.append(f"{self.examples} examples, rounding explains {self.noise:.1e}: {verdict}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


def check(
    losses: Tensor,
    params: Params,
    *,
    examples: int = 4,
    rerun: Callable[[int], Tensor] | None = None,
    **options: Unpack[OptionsGiven],
) -> Check:
    """Compare norms, Gram and norms by parameter with the naive loop on a few examples.

    The loop is one `torch.autograd.grad` per example through the same graph. With `rerun` also one
    forward and backward per example alone, which shows whether examples influence each other.

    Args:
        losses: (B,), as in `pergrad.norms`. The graph is retained.
        params: as in `pergrad.norms`.
        examples: how many examples the loop runs, spread over the batch.
        rerun: i -> the loss of example i computed alone; for models without randomness.
        **options: create_graph, on_mixing, check_layout, chunk_bytes, as in `pergrad.norms`.

    Returns:
        A Check: `.ok`, `.max_error`, `.noise`, `.by_parameter`; prints as a table.

    Raises:
        UsageError: as in `pergrad.norms`, or examples is not a positive number.

    Cost: `examples` backward passes and their gradients (examples times the model in memory).

        >>> import torch, pergrad
        >>> model = torch.nn.Linear(3, 1)
        >>> x = torch.randn(8, 3)
        >>> assert pergrad.check(model(x).squeeze(1), model).ok
    """
    if not isinstance(examples, int) or examples < 1:
        raise UsageError(f"examples is {examples!r}; pass how many to loop over, 1 or more.")
    named = sharded.whole(inputs.named(params))
    losses = inputs.check_losses(losses)
    with sharded.gathered(losses, named.values(), retain_graph=True):
        return _compared(losses, named, examples, rerun, options)


def _compared(
    losses: Tensor,
    named: Mapping[str, Tensor],
    examples: int,
    rerun: Callable[[int], Tensor] | None,
    options: OptionsGiven,
) -> Check:
    """The comparison itself."""
    batch = losses.shape[0]
    count = min(examples, batch)
    chosen = (
        torch.linspace(0, batch - 1, count, device="cpu").round().long().unique() if count else []
    )
    options = {**options, "retain_graph": True}
    norms = api.norms(losses, named, **options).double()
    parts = api.norms_by_parameter(losses, named, **options)
    gram = api.gram(losses, named, **options).double()
    with torch.enable_grad(), retained_untouched():
        rows = [_loop(losses[int(i)], named, retain=True) for i in chosen]
    errors: dict[str, float] = {}
    by_parameter: dict[str, float] = dict.fromkeys(named, 0.0)
    for n, i in enumerate(chosen):
        row = rows[n]
        scale = _norm(row)
        _note(errors, "norms", abs(float(norms[i]) - scale), scale)
        for name in named:
            error = abs(float(parts[name][i]) - float(row[name].norm()))
            by_parameter[name] = max(by_parameter[name], _relative(error, scale))
        for m, j in enumerate(chosen):
            inner = sum(float((row[k] * rows[m][k]).sum()) for k in named)
            _note(errors, "gram", abs(float(gram[i, j]) - inner), scale * _norm(rows[m]))
        if rerun is not None:
            with torch.enable_grad(), retained_untouched():
                alone = _alone(rerun, int(i), named)
            difference = {k: alone[k] - row[k] for k in named}
            _note(errors, "loop against each example alone", _norm(difference), scale)
    return Check(errors, by_parameter, _noise(losses, named), len(chosen))


def _loop(loss: Tensor, named: Mapping[str, Tensor], *, retain: bool) -> dict[str, Tensor]:
    try:
        grads = torch.autograd.grad(
            loss, list(named.values()), retain_graph=retain, allow_unused=True
        )
    except RuntimeError as error:
        raise nodes.translate(error) from error
    return {
        name: (torch.zeros_like(p) if g is None else g.to_dense()).detach().double()
        for (name, p), g in zip(named.items(), grads, strict=True)
    }


def _alone(rerun: Callable[[int], Tensor], i: int, named: Mapping[str, Tensor]) -> dict:
    loss = rerun(i)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise UsageError(
            f"rerun({i}) has to return the loss of example {i} computed alone, a tensor with one "
            "element and a graph."
        )
    return _loop(loss.reshape(()), named, retain=False)


def _norm(row: Mapping[str, Tensor]) -> float:
    return float(sum(float(part.square().sum()) for part in row.values())) ** 0.5


def _relative(error: float, scale: float) -> float:
    if error == 0:
        return 0.0
    return error / scale if scale else float("inf")


def _note(errors: dict[str, float], what: str, error: float, scale: float) -> None:
    errors[what] = max(errors.get(what, 0.0), _relative(error, scale))


def _noise(losses: Tensor, named: Mapping[str, Tensor]) -> float:
    """What rounding may do to a norm on its way through the graph, in its narrowest dtype.

    Errors of n ops add up like sqrt(n) units in the last place. In single precision there is room
    for cancellation; in half precision that much room would excuse anything.
    """
    graph = walk(losses, named)
    inside = [i for i, leads in enumerate(graph.leads) if leads]
    dtypes = {m.dtype for i in inside for m in graph.metas(i) if m.dtype.is_floating_point}
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    return (2 if eps > 1e-4 else 64) * eps * len(inside) ** 0.5
