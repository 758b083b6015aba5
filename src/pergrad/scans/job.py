"""What to score: a model, its data, and the loss of each example.

Owns: `Job`, `MeanGradient` and `Gradients`, and the messages about what is wrong with them.
Does not know: where scores go, or how they are computed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from pergrad.errors import UsageError
from pergrad.inputs import Params, check_params, meant
from pergrad.scans.mistakes import check_data, check_losses_function, check_model

Made = TypeVar("Made")


def _names_checked(kind: type[Made]) -> type[Made]:
    """A class that says what a misspelt argument is called; its signature is as it was."""
    make = kind.__init__

    @wraps(make)
    def init(self: Made, *given: Any, **named: Any) -> None:
        known = [name for name in signature(make).parameters if name != "self"]
        wrong = [name for name in named if name not in known]
        if wrong:
            raise UsageError(
                f"pergrad.{kind.__name__} has no argument {', '.join(wrong)}."
                f"{meant(wrong, known)} The arguments are {', '.join(known)}."
            )
        make(self, *given, **named)

    kind.__init__ = init  # type: ignore[assignment]
    return kind


@_names_checked
@dataclass(frozen=True)
class Job:
    """What `pergrad.scan` scores: a model, a data set, and how the losses follow from them.

    Args:
        model: the model. A scan leaves it as it was.
        data: map-style: `len(data)`, and `data[i]` for i from 0. Items are fetched with
            `data.__getitems__(list)` where there is one.
        losses: a function of the model and a collated batch, to a tensor (B,): one loss per
            example of the batch, attached to its graph. The tensors of the batch have been moved to
            the device of the model.
        collate: from a list of items to a batch; by default torch's.
        params: which parameters to take gradients for, as in `pergrad.norms`; by default those of
            the model that require grad.
        key: the stable name of example i, a string, by which it can be found in other versions of
            the data set; by default its number is all there is.
        show: how a person sees example i in a report: an image (PIL or array), a text, or a dict
            of such with a "label".
        outputs: for `pergrad.curvature`: a function of the model and a batch, to what the
            likelihood is over: logits (B, C), or (B, T, C) with positions, attached to their graph.
        likelihood: "categorical" (softmax over C), or "gaussian" with unit variance, whose loss is
            half the squared distance from the outputs (B,), (B, C) or (B, T, C).
        weights: for outputs with positions: a function of a batch to (B, T), how much each position
            counts in the example's loss: 0 if it is ignored, 1/n for a mean. Default: all 1.

    Raises:
        UsageError: the data set has no length or no items by number, or is empty; or something
            that has to be called cannot be.

    For example:

        >>> import torch, pergrad
        >>> data = [(torch.randn(4), i % 3) for i in range(10)]
        >>> def losses(model, batch):
        ...     x, y = batch
        ...     return torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        >>> job = pergrad.Job(torch.nn.Linear(4, 3), data, losses)
        >>> len(job)
        10
    """

    model: nn.Module
    data: Any
    losses: Callable[[nn.Module, Any], Tensor]
    collate: Callable[[list[Any]], Any] | None = None
    params: Params | None = None
    key: Callable[[int], str] | None = None
    show: Callable[[int], Any] | None = None
    outputs: Callable[[nn.Module, Any], Tensor] | None = None
    likelihood: Literal["categorical", "gaussian"] = "categorical"
    weights: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        check_model(self.model, self.data, self.losses)
        check_losses_function(self.losses, self.data)
        check_data(self.data, "data")
        if len(self.data) == 0:
            raise UsageError("The data set `data` is empty. Pass at least one example.")
        if self.likelihood not in ("categorical", "gaussian"):
            raise UsageError(
                f'`likelihood` is {self.likelihood!r}. Pass "categorical" or "gaussian".'
            )
        for name in ("collate", "key", "show", "outputs", "weights"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise UsageError(f"`{name}` is a {type(value).__name__}. Pass a function or None.")
        if self.params is not None:
            check_params(self.params)
        if not isinstance(self.params, (nn.Module, Mapping, Tensor, list, type(None))):
            # an iterator, such as model.parameters(), is used up by reading it once
            object.__setattr__(self, "params", list(self.params))

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.data)


@dataclass(frozen=True)
class MeanGradient:
    """The mean of the gradients of a data set, as a reference for `pergrad.scan(against=...)`.

    Computed under the job that is scanned: with its model, losses, collate and parameters. An
    example's inner product with the mean gradient of a validation set says by how much, to first
    order, a small step on that example lowers the validation loss.

    Args:
        data: map-style, with items as in the job's data set.

    Raises:
        UsageError: the data set has no length or no items by number, or is empty.

    For example:

        >>> import pergrad
        >>> len(pergrad.MeanGradient([1.0, 2.0, 3.0]))
        3
    """

    data: Any

    def __post_init__(self) -> None:
        check_data(self.data, "MeanGradient.data")
        if len(self.data) == 0:
            raise UsageError(
                "MeanGradient got an empty data set, which has no mean. Pass at least one example."
            )

    def __len__(self) -> int:
        """How many examples the mean is over."""
        return len(self.data)


@dataclass(frozen=True)
class Gradients:
    """The gradients of some examples, as references for `pergrad.scan(against=...)`.

    Computed under the job that is scanned, as `MeanGradient` is, and so in the scan's mode: with
    dropout off and batch norm by its running statistics, unless the scan says otherwise. Gives the
    columns `dot:NAME:0`, `dot:NAME:1`, ... and `cosine:NAME:0`, ..., one for each example; of a
    single example `dot:NAME` and `cosine:NAME`.

    Args:
        data: map-style, with items as in the job's data set.

    Raises:
        UsageError: the data set has no length or no items by number, or is empty.

    For example:

        >>> import pergrad
        >>> len(pergrad.Gradients([1.0, 2.0, 3.0]))
        3
    """

    data: Any

    def __post_init__(self) -> None:
        check_data(self.data, "Gradients.data")
        if len(self.data) == 0:
            raise UsageError("Gradients got an empty data set. Pass at least one example.")

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.data)
