"""Common mistakes in what a scan is given: what it is, and what to write instead.

Owns: the messages about data sets, functions of losses, devices and references of the wrong kind.
Does not know: how anything is computed or kept.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from pergrad.errors import UsageError
from pergrad.scans.text import message_of, printable

BY_COLUMN = {  # tables whose items are columns -> how their rows are had
    "pandas": 'list(data.itertuples(index=False, name=None)), or data.to_dict("records")',
    "polars": "data.rows(), or data.to_dicts()",
    "pyarrow": "data.to_pylist()",
}
ORDER = "The order is pergrad.Job(model, data, losses)."


def check_data(data: object, what: str) -> None:
    """A map-style data set has a length and items by number."""
    kind = type(data).__name__
    if isinstance(data, DataLoader):
        raise UsageError(
            f"`{what}` is a DataLoader, which gives batches in an order of its own. Pass its "
            "data set, loader.dataset, and its collate function as the job's `collate`; pergrad "
            "makes the batches."
        )
    if isinstance(data, (str, bytes)):
        raise UsageError(
            f"`{what}` is a {kind}, whose items are letters. Pass the examples themselves, such as "
            "a list or a Dataset that reads the file."
        )
    table = type(data).__module__.partition(".")[0]
    if table in BY_COLUMN:
        raise UsageError(
            f"`{what}` is a {kind} of {table}, whose items are columns, not examples. Pass its "
            f"rows: {BY_COLUMN[table]}."
        )
    if isinstance(data, Mapping) and set(data) != set(range(len(data))):
        _refuse_columns(data, what)
    if isinstance(data, tuple) and data and all(isinstance(each, Tensor) for each in data):
        name = what.rpartition(".")[2]
        raise UsageError(
            f"`{what}` is a tuple of tensors, which would be {len(data)} examples. If it is one "
            f"example, such as dataset[0], pass [{name}]; if the tensors have one row for each "
            f"example, torch.utils.data.TensorDataset(*{name}); if each is an example, "
            f"list({name})."
        )
    if isinstance(data, IterableDataset) or not (
        hasattr(data, "__len__") and hasattr(data, "__getitem__")
    ):
        raise UsageError(
            f"`{what}` is a {kind}, which does not have both a length and items by "
            "number. Scores are kept by an example's number, so pass a map-style data set: with "
            "len(data) and data[i], such as a list, a torch Dataset or a Hugging Face Dataset."
        )


def _refuse_columns(data: Mapping[Any, Any], what: str) -> None:
    if data and all(isinstance(each, Tensor) for each in data.values()):
        remedy = (
            "If each tensor has one row for each example, pass [dict(zip(data, row)) for row in "
            "zip(*data.values())], whose batches are such dicts again."
        )
    else:
        remedy = 'If it holds several data sets, pass one of them, such as data["train"].'
    names = ", ".join(repr(name) for name in list(data)[:4])
    raise UsageError(
        f"`{what}` is a {type(data).__name__} with items {names}, not by number from 0. {remedy}"
    )


def check_model(model: object, data: object, losses: object) -> None:
    """A model is a module."""
    if isinstance(model, nn.Module):
        return
    swapped = isinstance(data, nn.Module) or isinstance(losses, nn.Module)
    raise UsageError(
        f"`model` is a {type(model).__name__}, not a torch.nn.Module. "
        + (
            f"{ORDER} Swap the arguments, or name them."
            if swapped
            else "For a plain function, pass a Module that owns its parameters, and call the "
            "function in `losses`."
        )
    )


def check_losses_function(losses: Any, data: object) -> None:
    """A function of the model and a batch."""
    if not callable(losses):
        swapped = callable(data) and not hasattr(data, "__getitem__")
        raise UsageError(
            f"`losses` is a {type(losses).__name__}. Pass a function of the model and a "
            "batch that returns one loss per example, a tensor (B,)."
            + (f" {ORDER} Swap the arguments, or name them." if swapped else "")
        )
    if isinstance(losses, nn.modules.loss._Loss) or (
        getattr(losses, "__module__", None) == "torch.nn.functional"
    ):
        name = getattr(losses, "__name__", type(losses).__name__)
        raise UsageError(
            f"`losses` is {name}, a loss of outputs and targets. Pass a function of the model and "
            "a batch: def losses(model, batch): x, y = batch; return "
            'torch.nn.functional.cross_entropy(model(x), y, reduction="none").'
        )
    why = not_called_with_two(losses)
    if why is not None:
        raise UsageError(
            f"`losses` is called with the model and a batch, and {why}. Take the batch apart "
            "inside: def losses(model, batch): x, y = batch; ..."
        )


def not_called_with_two(function: Callable[..., Any]) -> str | None:
    """Why a function cannot be called with two arguments; None if it can, or nobody knows."""
    try:
        taken = inspect.signature(function)
    except (TypeError, ValueError):
        return None  # written in C, say: it will be seen when it is called
    try:
        taken.bind(None, None)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        return f"{name}{taken} cannot be called so: {error}"
    return None


def check_against(against: object) -> dict[str, Any]:
    """Names, as text, and references."""
    if isinstance(against, Mapping):
        named = {str(name): value for name, value in against.items()}
        if len(named) < len(against):
            raise UsageError(
                f"Two of the references {printable(list(against))} have one name as text, and so "
                "one column. Rename one of them."
            )
        return named
    kind = type(against).__name__
    first, *others = _wrapped(against).split(" or ")
    raise UsageError(
        f"`against` is a {kind}. Pass a mapping from the name of a column to what each example is "
        f'compared with: against={{"valid": {first}}}'
        + (f", or {others[0]} there." if others else ".")
    )


def check_reference(name: str, value: object) -> None:
    """Something that a direction can be read from."""
    kind = type(value).__name__
    if isinstance(value, (Tensor, Mapping)) or getattr(value, "ndim", 0) == 1:
        return
    tensors = isinstance(value, Sequence) and all(isinstance(each, Tensor) for each in value)
    if tensors and not isinstance(value, str):
        return
    raise UsageError(
        f"The reference against[{name!r}] is a {kind}, which has no gradient of its own. Pass "
        f"{_wrapped(value)}, a GradientMatrix, or a direction: a mapping from the parameters' "
        "names to tensors."
    )


def _wrapped(value: object) -> str:
    """How a value is written as a reference."""
    if isinstance(value, Tensor) or type(value).__module__.startswith("pergrad."):
        return "it"
    examples = hasattr(value, "__getitem__") and not isinstance(value, (str, Mapping))
    what = "it" if examples else "examples"
    return f"pergrad.MeanGradient({what}) or pergrad.Gradients({what})"


def hint(error: BaseException, data: Any, collate: object) -> str:
    """What is likely to be wrong where no example of a data set can be scored."""
    if "equal size" in message_of(error):
        return (
            "Examples of different sizes do not fit one tensor: give the Job a `collate` that pads "
            "them, or pass batch_size=1."
        )
    first = _first(data)
    if (
        collate is None
        and isinstance(first, (list, tuple))
        and first
        and all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in first)
    ):
        return (
            "An example is a list of numbers, which torch's collate function makes one tensor for "
            "each position of. Make it a tensor, or pass collate=torch.tensor."
        )  # fmt: skip
    if isinstance(data, list) and 1 < len(data) < 5 and all(isinstance(d, Tensor) for d in data):
        return (
            f"`data` is a list of {len(data)} tensors, so these are the examples. If they have one "
            "row for each example, pass torch.utils.data.TensorDataset(*data)."
        )
    return "Try `job.losses(job.model, batch)` on a batch of a few examples."


def _first(data: Any) -> Any:
    try:
        return data[0]
    except Exception:
        return None
