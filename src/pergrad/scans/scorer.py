"""From a block of examples to a table of their scores.

Owns: fetching and collating, the random state of a block, what to do when memory runs out or an
example cannot be scored, and the columns' numbers.
Does not know: files, or which blocks are left to do.
"""

import copy
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate, get_worker_info

from pergrad import api
from pergrad.errors import PergradError, UsageError
from pergrad.factors.workspace import free_bytes
from pergrad.matrix import GradientMatrix
from pergrad.scans import checkpoints, manifest
from pergrad.scans.form import MEANS, mean_of, means_of
from pergrad.scans.job import Job
from pergrad.scans.mistakes import hint
from pergrad.scans.model_state import prepared as prepared  # where others look for it
from pergrad.scans.store import schema
from pergrad.scans.tensors import all_finite, plain_parts
from pergrad.scans.text import message_of
from pergrad.scans.work import Reference, Work


def seed_for(seed: int, first: int) -> None:
    """The same random numbers for a block whenever and wherever it is scored."""
    value = (seed * 0x9E3779B97F4A7C15 + first) % 2**63
    # not torch.manual_seed, which formats a traceback for each kind of device there might be
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch would help."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and (
        "not enough memory" in str(error) or "DefaultCPUAllocator" in str(error)
    )


def fetch(
    collate: Callable[[list[Any]], Any] | None, data: Any, block: Sequence[int], seed: int
) -> Any:
    """The collated batch of some examples."""
    seed_for(seed, block[0])
    if collate is None and (batch := _rows_of_tensors(data, block)) is not None:
        return batch
    many = getattr(data, "__getitems__", None)
    items = many(list(block)) if callable(many) else [data[i] for i in block]
    if isinstance(items, list) and len(items) != len(block):
        raise UsageError(
            f"`data.__getitems__` returned {len(items)} items for {len(block)} numbers. Return one "
            "for each number, in their order."
        )
    return (collate or default_collate)(items)


def _rows_of_tensors(data: Any, block: Sequence[int]) -> list[Tensor] | None:
    """A batch of a TensorDataset as torch's collate makes it, in one piece; None where it cannot.

    An item at a time takes longer than the gradients of a small model.
    """
    tensors = data.tensors if type(data) is TensorDataset else ()
    if not tensors or get_worker_info() is not None:
        return None
    if any(type(t) is not Tensor or t.layout != torch.strided for t in tensors):
        return None
    if isinstance(block, range) and block.step == 1 and block.start >= 0:
        some = slice(block.start, block.stop)
        return [t[some].clone(memory_format=torch.contiguous_format) for t in tensors]
    return [t[list(block)].contiguous() for t in tensors]


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch on a device: its tensors in tuples, lists and mappings, or by a `to` of its own."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping) and not hasattr(batch, "to"):
        moved = {k: to_device(v, device) for k, v in batch.items()}
        return moved if type(batch) is dict else _rebuilt(batch, moved)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(v, device) for v in batch))
    if type(batch) in (tuple, list):
        return type(batch)(to_device(v, device) for v in batch)
    return batch.to(device) if callable(getattr(batch, "to", None)) else batch


def _rebuilt(batch: Any, moved: dict[Any, Any]) -> Any:
    """A mapping of the user's own class, if it can be made from a dict."""
    try:
        return type(batch)(moved)
    except TypeError:
        return moved


def home_of(params: Mapping[str, Tensor]) -> torch.device | None:
    """The one device of all parameters; None if there are several."""
    devices = {p.device for p in params.values()}
    return devices.pop() if len(devices) == 1 else None


PATIENCE = 32  # blocks with a smaller batch before a larger one is tried; doubled where that fails
GIVE_UP_AFTER = 64  # failures in a row from the start


@dataclass(frozen=True, slots=True)
class Fetched:
    """A batch that was fetched ahead of time."""

    block: range
    batch: Any


class Scorer:
    """Scores blocks of examples, one at a time, inside `prepared(...)`.

    A block is cut into pieces of at most `batch_size`, which is halved when memory runs out. What
    raises is cut in halves until the examples at fault are alone; these get a row with the error.
    Memory that runs out for such an example alone is its fault, and halves nothing for the others.
    After some blocks in which it was enough, larger batches are tried again.
    """

    def __init__(self, work: Work, smaller: Callable[[int], None] | None = None) -> None:
        self.work = work
        self.batch_size = work.settings.batch_size
        self._smaller = smaller or (lambda size: None)
        self._enough = 0  # blocks in a row in which memory was enough for a smaller batch
        self._patience = PATIENCE
        self._params = manifest.parameters_of(work.job)
        self._home = home_of(self._params)
        self._columns = manifest.columns(work)
        self._schema = schema(self._columns)
        self._dtype: type[np.generic] = (
            np.float64 if self._columns["loss"]["type"] == "double" else np.float32
        )
        self._numbers = [n for n, c in self._columns.items() if c["type"] in ("float", "double")]
        # With weights that are not finite every example would be looked at alone, for nothing.
        self._finite = all_finite([*self._params.values(), *work.job.model.parameters()])
        self._states = [point.load(work.job.model) for point in work.checkpoints]
        self._watched = self._rows_of_finite_weights()
        self._hopeful = work.proven
        self._failed = 0
        self._nulls: pa.Array | None = None
        self._warned = False
        self._apart = False  # whether examples have been seen to have losses of their own

    def score(self, block: range, fetched: Fetched | None = None) -> pa.Table:
        """A row for every example of the block, in order.

        Raises:
            PergradError: it is the model or the losses that cannot be served, not an example.
        """
        values = np.full((len(self._numbers), len(block)), np.nan, dtype=self._dtype)
        errors: dict[int, str] = {}
        tried = size = self._size()
        short, blamed = False, False  # whether memory ran out, and for an example alone
        together: Exception | None = None  # why examples could not be scored in one batch
        todo = [block[lo : lo + size] for lo in range(0, len(block), size)][::-1]
        while todo:
            piece = todo.pop()
            if len(piece) > size:
                todo += [piece[lo : lo + size] for lo in range(0, len(piece), size)][::-1]
                continue
            ready = fetched if fetched is not None and fetched.block == piece else None
            found, error = self._attempt(piece, ready)
            if error is None:
                assert found is not None
                at = piece[0] - block[0]
                values[: len(found), at : at + len(piece)] = found
                self._hopeful = True
            elif out_of_memory(error) and not self.work.settings.automatic and len(piece) > 1:
                raise UsageError(
                    f"Memory ran out on a batch of {len(piece)} examples. Scores so far are kept. "
                    'Run the scan again with a smaller batch_size, or with batch_size="auto".'
                ) from error
            elif out_of_memory(error) and len(piece) > 1:
                size, short = max(1, len(piece) // 2), True
                todo.append(piece)
            elif len(piece) > 1:
                together = together or error
                half = len(piece) // 2
                todo += [piece[half:], piece[:half]]
            else:
                errors[piece[0]] = message_of(error)
                if out_of_memory(error):
                    size, blamed = tried, True  # what follows may well go together
                self._count_failure(piece[0], error)
        self._learn(short and not blamed, min(tried, len(block)))
        if together is not None and not errors and not self._warned:
            self._warned = True
            warnings.warn(
                f"The examples {block[0]} to {block[-1]} can be scored, but not in one batch: "
                f"{message_of(together)}. Their scores are right, and slow to get. "
                "If they differ in size, give the Job a `collate` that pads them, or batch_size=1.",
                stacklevel=2,
            )
        if not self._apart and not errors:
            self._tell_apart(block, values)
        self._alone(block, values, errors)
        for mean, over in means_of(self._numbers).items():
            rows = [values[self._numbers.index(name)] for name in over]
            values[self._numbers.index(mean)] = mean_of(rows)
        return self._table(block, values, errors)

    def _size(self) -> int:
        """How many examples to try at once: the batch size, or after a while twice that."""
        if self._enough < self._patience:
            return self.batch_size
        return min(2 * self.batch_size, self.work.settings.batch_size)

    def _learn(self, short: bool, tried: int) -> None:
        """What a block has told of memory: whether it was too little for as many as were tried."""
        larger = tried > self.batch_size
        if short and larger:
            self._patience, self._enough = 2 * self._patience, 0
        elif short or larger:
            self.batch_size, self._enough = tried if larger else max(1, self.batch_size // 2), 0
            self._smaller(self.batch_size)
        else:
            self._enough += 1

    def _count_failure(self, index: int, error: BaseException) -> None:
        """It is not the examples if none of them can be scored."""
        self._failed += 1
        if not self._hopeful and self._failed >= min(GIVE_UP_AFTER, len(self.work.job)):
            raise UsageError(
                f"None of the first {self._failed} examples could be scored, so it is hardly they "
                f"that are at fault. Example {index} failed with {message_of(error)}. "
                + hint(error, self.work.job.data, self.work.job.collate)
            ) from error

    def _attempt(
        self, piece: range, ready: Fetched | None
    ) -> tuple[np.ndarray, None] | tuple[None, Exception]:
        """Numbers (columns but the means, examples), or what went wrong if that may be an example's
        fault.
        """
        try:
            return self._numbers_of(piece, ready), None
        except (PergradError, Warning):
            raise  # about the model or the losses (a warning, if warnings are errors)
        except Exception as error:
            if isinstance(error, getattr(torch, "AcceleratorError", ())):
                raise  # the device is lost, whatever is tried next
            error.__traceback__ = None  # it holds the batch and the graph
            return None, error

    def _numbers_of(self, piece: range, ready: Fetched | None) -> np.ndarray:
        work = self.work
        batch = self._batch(piece) if ready is None else self._here(ready.batch)
        if not self._states:
            losses = self._losses(batch, piece)
            return torch.stack([_wide(losses), *self._gradient_columns(losses)]).numpy()
        # each pass has a batch of its own: a function of losses may change it
        losses = self._losses(self._another(batch, piece), piece)
        rows = [_wide(losses), *self._gradient_columns(losses)]
        with checkpoints.weights_kept([work.job.model]):
            for state in self._states:
                checkpoints.put(work.job.model, state)
                losses = self._losses(self._another(batch, piece), piece)
                norms = api.norms(losses, self._params, **work.settings.options)
                rows += [_wide(losses), _wide(norms)]
        return torch.stack(rows).numpy()

    def _batch(self, piece: range) -> Any:
        work = self.work
        return self._here(fetch(work.job.collate, work.job.data, piece, work.settings.seed))

    def _here(self, batch: Any) -> Any:
        """A batch on the device of the model."""
        if self._home is None or self._home.type == "cpu":
            return batch
        return to_device(batch, self._home)

    def _another(self, batch: Any, piece: range) -> Any:
        """The batch once more, also where it cannot be copied."""
        try:
            return copy.deepcopy(batch)
        except Exception:
            return self._batch(piece)

    def _losses(self, batch: Any, piece: range) -> Tensor:
        """One loss for each example, with the random numbers of its block."""
        seed_for(self.work.settings.seed, piece[0])
        losses = self.work.job.losses(self.work.job.model, batch)
        if isinstance(losses, Tensor) and losses.dim() == 1 and len(losses) != len(piece):
            raise UsageError(wrong_count(len(losses), len(piece)))
        return losses

    def _gradient_columns(self, losses: Tensor) -> list[Tensor]:
        """The norm, the norm of each group, then product and cosine with each reference: float64 on
        the CPU, as some devices have no float64.
        """
        settings, options = self.work.settings, self.work.settings.options
        if not self.work.references and not settings.groups:
            return [_wide(api.norms(losses, self._params, **options))]
        if not self.work.references:
            return self._norms(api.norms_by_parameter(losses, self._params, **options))
        J = api.gradients(losses, self._params, **options)
        found = self._norms(J.norms_by_parameter()) if settings.groups else [_wide(J.norms())]
        norms = found[0]
        for reference in self.work.references:
            for dots, norm in _products(J, reference):
                scale = norms * norm
                found += [dots, torch.where(scale == 0, 0.0, dots / scale)]
        return found

    def _norms(self, parts: Mapping[str, Tensor]) -> list[Tensor]:
        """Of all parameters, then of each group."""
        rows = {n: _wide(part) for n, part in parts.items()}
        return [
            torch.linalg.vector_norm(torch.stack([rows[n] for n in names]), dim=0)
            for names in [tuple(parts), *self.work.settings.groups.values()]
        ]

    def _tell_apart(self, block: range, values: np.ndarray) -> None:
        """Refuse one number that was repeated for all: alone, an example has another loss.

        Raises:
            UsageError: that is what the losses are.
        """
        loss, norm = values[0], values[1]
        self._apart = bool((loss != loss[0]).any() or (norm != norm[0]).any())
        if self._apart or len(block) == 1 or not norm[0] > 0:
            return
        found, _ = self._attempt(block[:1], None)
        if found is not None and not np.isclose(found[0, 0], loss[0], rtol=1e-3, atol=0):
            raise UsageError(
                f"`losses` returned one number, {loss[0]:.6g}, for each of the examples {block[0]} "
                f"to {block[-1]}, and for example {block[0]} alone {found[0, 0]:.6g}: that is a "
                "mean or sum of the batch, given to all of them. Return each example's own loss: "
                'reduction="none".'
            )

    def _alone(self, block: range, values: np.ndarray, errors: Mapping[int, str]) -> None:
        """Score again, each alone, the examples whose numbers are not finite: in some ops one bad
        input makes its neighbours' numbers NaN.
        """
        if not self._watched or len(block) == 1:
            return
        for at in np.flatnonzero(~np.isfinite(values[self._watched]).all(0)):
            if block[at] not in errors:
                found, _ = self._attempt(block[at : at + 1], None)
                if found is not None:
                    values[: len(found), at] = found[:, 0]

    def _rows_of_finite_weights(self) -> list[int]:
        """Of the numbers, those that are not finite for an example's own reasons alone."""
        alike = {f"@{p.name}": all_finite(state.values())
                 for p, state in zip(self.work.checkpoints, self._states, strict=True)}  # fmt: skip
        return [
            k
            for k, name in enumerate(self._numbers)
            if name not in MEANS
            and alike.get(name[4:] if name.startswith(("loss@", "norm@")) else "", self._finite)
        ]

    def _table(self, block: range, values: np.ndarray, errors: Mapping[int, str]) -> pa.Table:
        bad = np.array([i in errors for i in block]) if errors else None
        arrays = {"index": pa.array(np.arange(block.start, block.stop))}
        if self.work.job.key is not None:
            arrays["key"] = pa.array([manifest.key_of(self.work.job, i) for i in block])
        for name, row in zip(self._numbers, values, strict=True):
            arrays[name] = pa.array(row, mask=bad)
        said = [errors.get(i) for i in block] if errors else None
        arrays["error"] = pa.array(said, pa.string()) if said else self._no_errors(len(block))
        return pa.Table.from_arrays([arrays[n] for n in self._schema.names], schema=self._schema)

    def _no_errors(self, count: int) -> pa.Array:
        """Nulls; the same array for all blocks of one length."""
        if self._nulls is None or len(self._nulls) != count:
            self._nulls = pa.nulls(count, pa.string())
        return self._nulls


def _wide(column: Tensor) -> Tensor:
    """float64, on the CPU."""
    return column.detach().cpu().double()


def _products(J: GradientMatrix, reference: Reference) -> Iterator[tuple[Tensor, float]]:
    """Inner products (B,) with each row of a reference, and that row's norm."""
    if isinstance(reference.value, GradientMatrix):
        yield from zip(_wide(J @ reference.value.T).T, reference.norms, strict=True)
    else:
        yield _wide(J @ reference.value), reference.norms[0]


def wrong_count(got: int, wanted: int) -> str:
    """That there is not one loss for each example."""
    return (
        f"`losses` returned {got} numbers for a batch of {wanted} examples. Return one loss per "
        "example, in the batch's order"
        + (': no mean that was given a dimension, but reduction="none".' if got == 1 else ".")
    )


MOST_EXAMPLES = 1024
FALLBACK_SIZE = 32
_SHARE_OF_FREE = 8  # at most one part in eight
# Beyond this, larger batches are hardly faster, and a block should not take minutes.
_ACTIVATIONS = {"cpu": 2**29, "other": 2**32}
_TIMES_SAVED = 4  # what a pass needs in all, in units of what the forward pass saved


def sensible_batch_size(job: Job, seed: int) -> int:
    """A power of two, from the memory that the first examples' forward pass saves for backward."""
    params = manifest.parameters_of(job)
    home = home_of(params) or torch.device("cpu")
    owned = {
        part.untyped_storage().data_ptr()
        for p in [*params.values(), *job.model.parameters()]
        for part in plain_parts(p)
    }
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an op's own output would keep the op, and itself, alive

    block = range(min(2, len(job)))
    try:
        batch = fetch(job.collate, job.data, block, seed)
        seed_for(seed, 0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            job.losses(job.model, batch if home.type == "cpu" else to_device(batch, home))
    except Exception:
        return FALLBACK_SIZE  # what is wrong will be seen when these examples are scored
    each = max(1, sum(saved.values()) // len(block)) * _TIMES_SAVED
    most = _ACTIVATIONS["cpu" if home.type == "cpu" else "other"]
    free = free_bytes(home)
    budget = most if free is None else min(most, free // _SHARE_OF_FREE)
    return 2 ** int(math.log2(min(MOST_EXAMPLES, max(1, budget // each))))
