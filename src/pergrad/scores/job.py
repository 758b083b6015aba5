"""What to score: a model, its data, and the loss of each example.

Owns: `Job` and `MeanGradient`, and the messages about what is wrong with them.
Does not know: where scores go, or how they are computed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from pergrad.errors import UsageError
from pergrad.inputs import Params


def _check_data(data: object, what: str) -> None:
    """A map-style data set has a length and items by number."""
    if isinstance(data, IterableDataset) or not (
        hasattr(data, "__len__") and hasattr(data, "__getitem__")
    ):
        raise UsageError(
            f"`{what}` is a {type(data).__name__}, which does not have both a length and items by "
            "number. Scores are kept by an example's number, so pass a map-style data set: with "
            "len(data) and data[i], such as a list, a torch Dataset or a Hugging Face Dataset."
        )


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

    Raises:
        UsageError: the data set has no length or no items by number, or is empty; or something
            that has to be called cannot be.

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

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise UsageError(
                f"`model` is a {type(self.model).__name__}, not a torch.nn.Module. For a plain "
                "function, pass a Module that owns its parameters, and call the function in "
                "`losses`."
            )
        _check_data(self.data, "data")
        if len(self.data) == 0:
            raise UsageError("The data set `data` is empty. Pass at least one example.")
        if not callable(self.losses):
            raise UsageError(
                f"`losses` is a {type(self.losses).__name__}. Pass a function of the model and a "
                "batch that returns one loss per example, a tensor (B,)."
            )
        for name in ("collate", "key", "show"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise UsageError(f"`{name}` is a {type(value).__name__}. Pass a function or None.")
        if not isinstance(self.params, (nn.Module, Mapping, Tensor, list, type(None))):
            try:  # an iterator, such as model.parameters(), is used up by reading it once
                object.__setattr__(self, "params", list(self.params))
            except TypeError:
                raise UsageError(
                    f"`params` is a {type(self.params).__name__}. Pass a module, a mapping from "
                    "names to tensors, or an iterable of tensors."
                ) from None

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

        >>> import pergrad
        >>> len(pergrad.MeanGradient([1.0, 2.0, 3.0]))
        3
    """

    data: Any

    def __post_init__(self) -> None:
        _check_data(self.data, "MeanGradient.data")
        if len(self.data) == 0:
            raise UsageError(
                "MeanGradient got an empty data set, which has no mean. Pass at least one example."
            )

    def __len__(self) -> int:
        """How many examples the mean is over."""
        return len(self.data)
