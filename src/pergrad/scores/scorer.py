"""From a block of examples to a table of their scores.

Owns: fetching and collating, the model's mode and the random state during scoring, what to do when
memory runs out or an example cannot be scored, and the columns' numbers.
Does not know: files, or which blocks are left to do.
"""

import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from pergrad import api, inputs
from pergrad.errors import PergradError, UsageError
from pergrad.factors.workspace import free_bytes
from pergrad.matrix import GradientMatrix
from pergrad.scores import manifest
from pergrad.scores.job import Job
from pergrad.scores.store import schema
from pergrad.scores.work import Mode, Reference, Work


@contextmanager
def prepared(model: nn.Module, mode: Mode, device: str | None = None) -> Iterator[None]:
    """The model in a mode and on a device, autograd on; all of it and all random states as before
    afterwards, also after an exception.
    """
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.init()  # so that its random state is there to be kept
    modes = [(module, module.training) for module in model.modules()]
    # batch norm in training mode changes its buffers, and moving a model replaces them
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    homes = {id(p): p.device for p in [*model.parameters(), *model.buffers()]}
    states = _random_states()
    try:
        if device is not None:
            model.to(device)
        if mode != "as is":
            model.train(mode == "train")
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        if device is not None and len(set(homes.values())) == 1:
            model.to(next(iter(homes.values())))
        for module, name, buffer, value in buffers:
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
        _set_random_states(states)


def _random_states() -> dict[str, Any]:
    states = {"torch": torch.get_rng_state(), "random": random.getstate()}
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    states["numpy"] = np.random.get_state()
    return states


def _set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["random"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
    if "mps" in states:
        torch.mps.set_rng_state(states["mps"])
    np.random.set_state(states["numpy"])


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


def fetch(job: Job, data: Any, block: Sequence[int], seed: int) -> Any:
    """The collated batch of some examples."""
    seed_for(seed, block[0])
    many = getattr(data, "__getitems__", None)
    items = many(list(block)) if callable(many) else [data[i] for i in block]
    return (job.collate or default_collate)(items)


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


GIVE_UP_AFTER = 64  # failures in a row from the start
MOST_LETTERS = 2000  # of an error that is stored


@dataclass(frozen=True, slots=True)
class Fetched:
    """A batch that was fetched ahead of time."""

    block: range
    batch: Any


class Scorer:
    """Scores blocks of examples, one at a time, inside `prepared(...)`.

    A block is cut into pieces of at most `batch_size`, which is halved when memory runs out. What
    raises is cut in halves until the examples at fault are alone; these get a row with the error.
    """

    def __init__(self, work: Work, smaller: Callable[[int], None] | None = None) -> None:
        self.work = work
        self.batch_size = work.settings.batch_size
        self._smaller = smaller or (lambda size: None)
        self._params = manifest.parameters_of(work.job)
        self._home = home_of(self._params)
        self._columns = manifest.columns(work.job, work.settings, work.references)
        self._schema = schema(self._columns)
        self._dtype: type[np.generic] = (
            np.float64 if self._columns["loss"]["type"] == "double" else np.float32
        )
        self._numbers = [n for n, c in self._columns.items() if c["type"] in ("float", "double")]
        # With weights that are not finite every example would be looked at alone, for nothing.
        self._finite = all(
            bool(p.isfinite().all()) for p in [*self._params.values(), *work.job.model.parameters()]
        )
        self._hopeful = work.proven
        self._failed = 0
        self._nulls: pa.Array | None = None
        self._warned = False

    def score(self, block: range, fetched: Fetched | None = None) -> pa.Table:
        """A row for every example of the block, in order.

        Raises:
            PergradError: it is the model or the losses that cannot be served, not an example.
        """
        values = np.full((len(self._numbers), len(block)), np.nan, dtype=self._dtype)
        errors: dict[int, str] = {}
        size = self.batch_size
        short = False
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
                at = piece[0] - block[0]
                values[:, at : at + len(piece)] = found
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
                errors[piece[0]] = f"{type(error).__name__}: {error}"[:MOST_LETTERS]
                self._count_failure(piece[0], error)
        if short:
            self.batch_size = max(1, self.batch_size // 2)
            self._smaller(self.batch_size)
        if together is not None and not errors and not self._warned:
            self._warned = True
            warnings.warn(
                f"The examples {block[0]} to {block[-1]} can be scored, but not in one batch: "
                f"{type(together).__name__}: {together}. Their scores are right, and slow to get. "
                "If they differ in size, give the Job a `collate` that pads them, or batch_size=1.",
                stacklevel=2,
            )
        self._alone(block, values, errors)
        return self._table(block, values, errors)

    def _count_failure(self, index: int, error: BaseException) -> None:
        """It is not the examples if none of them can be scored."""
        self._failed += 1
        if not self._hopeful and self._failed >= min(GIVE_UP_AFTER, len(self.work.job)):
            raise UsageError(
                f"None of the first {self._failed} examples could be scored, so it is hardly they "
                f"that are at fault. Example {index} failed with {type(error).__name__}: {error}. "
                "Try `job.losses(job.model, batch)` on a batch of a few "
                "examples."
            ) from error

    def _attempt(
        self, piece: range, ready: Fetched | None
    ) -> tuple[np.ndarray, None] | tuple[None, Exception]:
        """Numbers (columns, examples), or what went wrong if that may be an example's fault."""
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
        if ready is None:
            batch = fetch(work.job, work.job.data, piece, work.settings.seed)
        else:
            batch = ready.batch
        if self._home is not None and self._home.type != "cpu":
            batch = to_device(batch, self._home)
        seed_for(work.settings.seed, piece[0])
        losses = work.job.losses(work.job.model, batch)
        if isinstance(losses, Tensor) and losses.dim() == 1 and len(losses) != len(piece):
            raise UsageError(_wrong_count(len(losses), len(piece)))
        rows = self._gradient_columns(losses)
        return torch.stack([_wide(losses), *rows]).numpy()

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

    def _alone(self, block: range, values: np.ndarray, errors: Mapping[int, str]) -> None:
        """Score again, each alone, the examples whose numbers are not finite: in some ops one bad
        input makes its neighbours' numbers NaN.
        """
        if not self._finite or len(block) == 1:
            return
        for at in np.flatnonzero(~np.isfinite(values).all(0)):
            if block[at] not in errors:
                found, _ = self._attempt(block[at : at + 1], None)
                if found is not None:
                    values[:, at] = found[:, 0]

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


def mean_gradient(job: Job, data: Any, batch_size: int, seed: int) -> dict[str, Tensor]:
    """The mean gradient of a data set, by name: float64 sums of ordinary backward passes.

    Raises:
        UsageError: an example cannot be scored, or the losses are not one for each.
    """
    params = manifest.parameters_of(job)
    home = home_of(params)
    wide = torch.float32 if home is not None and home.type == "mps" else torch.float64
    total = {n: torch.zeros_like(p, dtype=wide) for n, p in params.items()}
    for lo in range(0, len(data), batch_size):
        block = range(lo, min(lo + batch_size, len(data)))
        try:
            batch = fetch(job, data, block, seed)
            if home is not None and home.type != "cpu":
                batch = to_device(batch, home)
            seed_for(seed, lo)
            losses = inputs.check_losses(job.losses(job.model, batch))
            grads = torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True)
        except PergradError:
            raise
        except Exception as error:
            raise UsageError(
                f"The mean gradient needs every example of its data set, and those from {lo} to "
                f"{block[-1]} raised {type(error).__name__}: {error}. Take out the ones at fault."
            ) from error
        if len(losses) != len(block):
            raise UsageError(_wrong_count(len(losses), len(block)))
        for sum_, grad in zip(total.values(), grads, strict=True):
            if grad is not None:
                sum_ += grad.detach()
    dtype = api.result_dtype(params)
    return {n: (sum_ / len(data)).to(dtype) for n, sum_ in total.items()}


def _wrong_count(got: int, wanted: int) -> str:
    return (
        f"`losses` returned {got} numbers for a batch of {wanted} examples. Return one loss per "
        "example, in the batch's order."
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
    owned = {p.untyped_storage().data_ptr() for p in [*params.values(), *job.model.parameters()]}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an op's own output would keep the op, and itself, alive

    block = range(min(2, len(job)))
    try:
        batch = fetch(job, job.data, block, seed)
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
