"""Norms of examples read in the user's own backward pass.

Owns: `reading`, and `Reading`, what it gives: how a loss was taken apart, weights, norms.
Does not know: how a pass is read (`engine.reading_pass`), what a run makes of the norms.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Unpack

import torch
from torch import Tensor

from pergrad import inputs
from pergrad.api import result_dtype
from pergrad.engine.reading_pass import UserPass
from pergrad.engine.run import Options, PassOptions
from pergrad.errors import UsageError
from pergrad.graph import sharded
from pergrad.graph.plan import NotMeasuredError
from pergrad.graph.walk import walk
from pergrad.inputs import Params
from pergrad.matrix import root
from pergrad.training.summands import Summands, summands


def reading(
    losses_or_loss: Tensor,
    model: Params,
    examples: int | None = None,
    *,
    batch_dim: int = 0,
    rest: bool = False,
    **options: Unpack[PassOptions],
) -> "Reading":
    """The norms of examples, read while your own backward pass runs.

        with pergrad.reading(losses, model) as read:
            losses.mean().backward()                        # whatever pass you run anyway
        read.norms                                          # (B,)

    No pass of pergrad's own, no retained graph; `.grad` is the same to the bit. Nothing is raised
    inside the block or by it: what cannot be read is raised where a number is asked for. The pass
    may be `pergrad.backward` with the same losses, which clips them.

    Nothing in a graph tells a batch from other rows: a summand of a scalar loss that is made of
    fixed probes, as many as the examples or a multiple, is taken for theirs, probe b for example
    b's. Give the losses (B,) instead, whose graph alone is read, or the loss without the penalty,
    whose backward pass then comes behind the block.

    Args:
        losses_or_loss: the losses (B,); or the scalar loss, which is taken apart from its graph
            into parts, one for each example, whose sum it is.
        model: the model, or parameters, as in `norms`.
        examples: how many examples a scalar loss is made of; its rows belong to them in equal
            shares. None: each row is one.
        batch_dim: where the example is among the dimensions of the rows: 0 for (B, T), 1 for
            (T, B), also after both have been flattened into one.
        rest: whether a scalar loss may have summands that belong to no example, such as a penalty
            on the weights. They are left out.
        **options: on_mixing, check_layout, chunk_bytes as in `norms`.

    Returns:
        A context manager that gives a Reading, whose numbers can be asked for after the block:

        - norms: (B,), of the gradient of `losses[b]`, or of part b: what multiplies it in the pass
          (1 / B after a mean, accumulation, a GradScaler) is divided out. NaN where that is 0.
        - norms_by_parameter: name -> (B,), likewise.
        - weighted_norms: (B,), of what went into `.grad`.
        - weights: (B,), what was divided out.
        - factor: one number, what stood above a scalar loss; 1 if losses were given.
        - losses: (B,), detached: the losses, or the parts where their values can be had.
        - tokens: (B,), how many rows of a scalar loss are the example's and count: the tokens of a
          text that are not ignored. 1 if losses were given.
        - unit: one number, what the loss of one row is multiplied by in the scalar: 1 / N for a
          mean of N rows. losses / (unit * tokens) are the examples' own mean losses.
        - how: in words, how the loss was taken apart.
        - failure: why there is no number, or None.

        Each but the last two raises what went wrong.

    Cost: 5 to 15 % of a step; the first step of each form of graph is planned and verified, at
        about two more.
    Source: docs/how-it-works.md.

        >>> import torch, pergrad
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> losses = model(x).squeeze(1)
        >>> with pergrad.reading(losses, model) as read:
        ...     losses.mean().backward()
        >>> read.norms
        tensor([5., 1.])
        >>> model.weight.grad
        tensor([[1.5000, 2.5000]])
    """
    return Reading(losses_or_loss, model, examples, batch_dim, rest, options)


class Reading:
    """What was read in one backward pass; see `reading`."""

    def __init__(
        self,
        losses_or_loss: Tensor,
        model: Params,
        examples: int | None,
        batch_dim: int,
        rest: bool,
        options: Mapping[str, Any],
    ) -> None:
        self._given = losses_or_loss, model, examples, batch_dim, rest, options
        self._pass: UserPass | None = None
        self._summands: Summands | None = None
        self._sq_norms: dict[str, Tensor] = {}
        self._losses: Tensor | None = None
        self._over = False
        self.failure: BaseException | None = None
        self._names: list[str] = []
        self._like = torch.zeros(0)

    def __enter__(self) -> "Reading":
        try:
            self._begin(*self._given)
        except Exception as error:
            self.failure = error.with_traceback(None)
        del self._given
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._over = True
        if self._pass is None:
            return
        self._pass.finish()
        if self.failure is None:
            self.failure = self._pass.failure
        if error is not None:
            self.failure = UsageError(
                f"The block of pergrad.reading was left by {type(error).__name__}, so its backward "
                "pass may be incomplete. Read the next one."
            )
        if self.failure is not None:
            self._sq_norms.clear()

    def _begin(
        self,
        losses: Tensor,
        model: Params,
        examples: int | None,
        batch_dim: int,
        rest: bool,
        options: Mapping[str, Any],
    ) -> None:
        chosen = check_options(options)
        named = sharded.whole(inputs.named(model))
        self._names = list(named)
        gathered = sharded.is_sharded(*named.values())
        if gathered:
            # Only passes of ours would need gathered weights; ranks may differ in who needs one.
            chosen = replace(chosen, check_layout="never")
        scalar = isinstance(losses, Tensor) and losses.dim() == 0 and losses.requires_grad
        if isinstance(losses, Tensor) and losses.dim() == 0 and not scalar:
            raise UsageError(
                "The loss has no graph: it was computed under torch.no_grad() or detached. Pass it "
                "as it comes out of the forward pass, before backward."
            )
        checked = losses if scalar else inputs.check_losses(losses)
        graph = walk(checked, named)
        if scalar:
            self._summands = summands(checked, graph, examples, batch_dim, rest)
            self._losses = self._summands.values
        elif examples is not None and examples != len(losses):
            raise UsageError(f"`losses` has {len(losses)} entries, but examples is {examples}.")
        else:
            self._losses = losses.detach()
        dtype = result_dtype(named)
        self._like = torch.zeros(graph.batch, dtype=dtype, device=losses.device)
        if graph.batch == 0:
            return
        found, like = self._sq_norms, self._like

        def add(name: str, squares: Tensor) -> None:  # refers to no `self`: that would be a circle
            squares = squares.to(like.device, torch.promote_types(like.dtype, squares.dtype))
            found[name] = found[name] + squares if name in found else squares

        try:
            self._pass = UserPass(checked, graph, named, chosen, add)
        except NotMeasuredError as error:
            if not gathered:
                raise
            raise UsageError(
                f"The op {error.place} does not tell from its structure which rows belong to which "
                "example, and to measure it the sharded parameters would have to be gathered once "
                "more, within your step. Compute the loss by ops of torch (of trl's SFT with "
                "`compute_loss_func=`), or take the norms before the backward pass, on all ranks: "
                "`pergrad.norms(losses, model, retain_graph=True)`."
            ) from None

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure
        if not self._over:
            raise UsageError(
                "The numbers of pergrad.reading are there after its `with` block. Ask behind it."
            )
        if self._summands is not None:
            self._summands.check()

    @property
    def weighted_norms(self) -> Tensor:
        """(B,): the norm of what each example added to `.grad`."""
        self._check()
        return root(sum(self._sq_norms.values(), self._like)).to(self._like)

    @property
    def weights(self) -> Tensor:
        """(B,): what the gradient of each loss, or part, was multiplied by."""
        self._check()
        seed = None if self._pass is None else self._pass.seed
        if seed is None:
            return torch.zeros_like(self._like)
        return (seed if self._summands is None else seed.expand(len(self._like))).to(self._like)

    @property
    def factor(self) -> float:
        """What a scalar loss was multiplied by in the pass."""
        self._check()
        if self._summands is None:
            return 1.0
        return float(self.weights[0]) if len(self._like) else 1.0

    @property
    def norms(self) -> Tensor:
        """(B,): the norm of the gradient of each loss, or part."""
        return _divided(self.weighted_norms, self.weights)

    @property
    def norms_by_parameter(self) -> dict[str, Tensor]:
        """Name -> (B,): the same, parameter by parameter."""
        self._check()
        weights = self.weights
        return {
            name: _divided(root(self._sq_norms.get(name, self._like)).to(self._like), weights)
            for name in self._names
        }

    @property
    def losses(self) -> Tensor:
        """(B,): the losses, or the parts of a scalar one."""
        self._check()
        if self._losses is None:
            assert self._summands is not None
            raise self._summands.no_values()
        return self._losses

    @property
    def scalar(self) -> Tensor | None:
        """A scalar loss as it was before the pass, detached; None if losses were given."""
        return None if self._summands is None else self._summands.loss

    @property
    def has_losses(self) -> bool:
        """Whether the values of the losses, or parts, can be had."""
        return self._losses is not None

    @property
    def tokens(self) -> Tensor:
        """(B,): how many rows of a scalar loss are the example's and count."""
        self._check()
        ones = torch.ones_like(self._like, dtype=torch.float64)
        return ones if self._summands is None else self._summands.tokens

    @property
    def unit(self) -> float:
        """What the loss of one row is multiplied by in a scalar loss."""
        self._check()
        return 1.0 if self._summands is None else float(self._summands.unit)

    @property
    def how(self) -> str:
        """How the loss was taken apart, in words."""
        if self.failure is not None:
            return f"not read: {self.failure}"
        words = "losses given" if self._summands is None else self._summands.how
        if self._over and self._pass is not None:
            lost = int((self.weights == 0).sum())
            if lost:
                words += (
                    f"; the weight of {lost} of {len(self._like)} examples is 0, so what arrived "
                    "does not tell their norms (NaN)"
                )
        return words


def _divided(norms: Tensor, weights: Tensor) -> Tensor:
    """NaN where the weight is 0."""
    nan = torch.full_like(norms, float("nan"))
    return torch.where(weights == 0, nan, norms / weights.abs())


_KNOWN = ("on_mixing", "check_layout", "chunk_bytes")
_NAMES = ("examples", "batch_dim", "rest", *_KNOWN)  # beside the losses and the model


def check_options(options: Mapping[str, Any]) -> Options:
    """What a reading's further options say.

    Raises:
        UsageError: there is no such option, or its value makes no sense.
    """
    wrong = [name for name in options if name not in _KNOWN]
    if wrong:
        raise UsageError(
            f"pergrad.reading and a watch have no option {', '.join(wrong)}: their pass is yours."
            f"{inputs.meant(wrong, (*_NAMES, 'keys', 'step'))} The options are {', '.join(_NAMES)};"
            " a watch's are keys and step, too."
        )
    return Options(**options)
