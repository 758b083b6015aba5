"""Tensors that ops saved for their backward.

Owns: reading one, whether a checkpointed block has to recompute it, and torch's errors about freed
graphs and changed tensors in our words.
Does not know: what the tensors are used for.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from pergrad.errors import UnsupportedError, UsageError
from pergrad.graph.nodes.passes import pass_number
from pergrad.graph.nodes.reading import OWN, Node, fields, op_name, renamed


class _Patient(dict):
    """The handles of a checkpointed tensor, of which some reads do not use one up."""

    free_reads = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        if value is None and self.free_reads > 0:
            self.free_reads -= 1
        else:
            super().__setitem__(key, value)


def saved(node: Node, field: str, *, dense: bool = True) -> Any:
    """A tensor (or list of tensors) that the op saved for its backward; None if it saved none.

    Raises:
        UsageError: the graph was freed by an earlier backward, or the tensor was changed in place.
        UnsupportedError: this release of torch saves something else, or its memory was taken away.
    """
    try:
        data = getattr(getattr(node, "_raw_saved_" + field, None), "data", None)
        if not _is_at_hand(data):
            before_reading(node, (field,))
        value = getattr(node, "_saved_" + field)
        if dense and isinstance(value, Tensor) and value.layout in _SPARSE:
            return value.to_dense()  # most rules know no other numbers
        return value
    except AttributeError:
        return saved(node, renamed(node, field), dense=dense)
    except RuntimeError as error:
        raise translate(error) from error


_SPARSE = (
    torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc,
)  # fmt: skip


def _raw(node: Node, fields: Sequence[str]) -> list[Any]:
    """What stands for each saved tensor, not unpacked."""
    return [getattr(raw, "data", None) for raw in _raw_handles(node, fields)]


def _raw_handles(node: Node, fields: Sequence[str]) -> list[Any]:
    """torch's `SavedTensor` for each."""
    found: list[Any] = []
    try:
        for field in fields:
            raw = getattr(node, "_raw_saved_" + field, None)
            found += raw if isinstance(raw, (tuple, list)) else [raw]
    except RuntimeError as error:
        raise translate(error) from error
    return found


def _is_holder(data: Any) -> bool:
    """Whether this stands for a tensor that a checkpointed block will recompute."""
    return type(data).__name__ == "_Holder" and hasattr(data, "handles")


def saved_plainly(node: Node, field: str) -> bool:
    """Whether to read what the op saved costs nothing and calls nobody's function."""
    handles = [raw for raw in _raw_handles(node, (field,)) if raw is not None]
    plain = all(raw.unpack_hook is None for raw in handles)
    # nothing was saved in the place of a slice among indices
    return plain and all(raw.data is None or _is_at_hand(raw.data) for raw in handles)


def lie_dense(node: Node, fields: Iterable[str]) -> bool:
    """Whether it is plain to see that these saved vectors, if there, lie in memory without gaps."""
    try:
        for field in fields:
            raw = getattr(node, "_raw_saved_" + field, None)
            if raw is None or (data := raw.data) is None:
                continue
            if type(data) not in PLAIN or raw.unpack_hook is not None:
                return False
            if data.dim() == 1 and data.stride(0) != 1 and len(data) > 1:
                return False
    except RuntimeError as error:
        raise translate(error) from error
    return True


def is_checkpointed(node: Node) -> bool:
    """Whether a checkpointed block (use_reentrant=False) recomputes what the node saved."""
    try:
        for name in _raw_names(type(node)):
            raw = getattr(node, name, None)
            for each in raw if isinstance(raw, (tuple, list)) else (raw,):
                if _is_holder(getattr(each, "data", None)):
                    return True
    except RuntimeError as error:
        raise translate(error) from error
    return False


_RAW_NAMES: dict[type, tuple[str, ...]] = {}  # one entry per kind of torch's own nodes


def _raw_names(cls: type) -> tuple[str, ...]:
    """The attributes of a node that stand for its saved tensors."""
    found = _RAW_NAMES.get(cls)
    if found is None:
        found = tuple(["_raw_saved_" + field for field in fields(cls)[1]])
        if cls in OWN:  # a Function's may be made for every model
            _RAW_NAMES[cls] = found
    return found


@contextmanager
def selections_untouched(found: Iterable[Node]) -> Iterator[None]:
    """Selective checkpoints have, after this block, all they kept, whatever passes ran inside.

    One pass through such a block uses up what was kept, and torch refuses the next.
    """
    before = [
        (numbered, dict(numbered)) for kept in _selections(found) for numbered in kept.values()
    ]
    try:
        yield
    finally:
        for numbered, entries in before:
            numbered.clear()
            numbered.update(entries)


def _selections(found: Iterable[Node]) -> list[dict[Any, dict]]:
    """What the selective checkpoints keep above which these nodes lie: by op, by number of call."""
    module: Any = sys.modules.get("torch.utils.checkpoint")
    frames: dict[int, Any] = {}
    for node in found if module is not None else ():
        for raw in _raw_handles(node, fields(type(node))[1]):
            if _is_holder(getattr(raw, "data", None)):
                for held in _closed_over(raw.unpack_hook):
                    if isinstance(held, module._CheckpointFrame):
                        frames[id(held)] = held
    modes = {
        id(held): held
        for frame in frames.values()
        for held in _closed_over(frame.recompute_fn)
        if isinstance(held, module._CachedTorchDispatchMode)
    }
    return [mode.storage for mode in modes.values()]


def _closed_over(function: Any) -> list[Any]:
    found = []
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # of a name that has no value yet
            found.append(cell.cell_contents)
    return found


def before_reading(node: Node, fields: Sequence[str], *, another: bool = True) -> None:
    """Look at what stands for saved tensors before they are unpacked.

    A checkpointed one may be read once for each backward: with `another`, the node is left its own
    read. Of one whose memory is gone, torch itself would end the process.
    """
    for data in _raw(node, fields):
        if type(data) in PLAIN:
            if _is_freed(data):
                raise UnsupportedError(
                    f"A weight that the op `{op_name(node)}` needs has been freed since the "
                    "forward pass, as FullyShardedDataParallel does. Use `fully_shard` of "
                    "torch.distributed.fsdp, or keep the weights in memory until pergrad is done."
                )
        # outside a pass every read recomputes anyway
        elif another and _is_holder(data) and pass_number() != -1:
            if not isinstance(data.handles, _Patient):
                data.handles = _Patient(data.handles)
            data.handles.free_reads += 1


def _is_at_hand(data: Any) -> bool:
    """Whether this is an ordinary tensor with memory, which most are and which needs no care."""
    ordinary = type(data) in PLAIN and data.layout is torch.strided
    return ordinary and data.untyped_storage().size() > 0


def _is_freed(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.untyped_storage().size() == 0
        and tensor.numel() > 0
        and tensor.device.type != "meta"
    )


PLAIN = (Tensor, torch.nn.Parameter)
_FREED = "The graph of the losses has been freed by an earlier backward"
_FREED_REMEDY = (
    "Each pass over a graph frees it, one of pergrad's too. Pass retain_graph=True to the earlier "
    "call: `pergrad.norms(losses, model, retain_graph=True)`, then `losses.mean().backward()`; or "
    "let `pergrad.backward(losses, model, weights=1 / B)` do both in one pass; or run the forward "
    "pass again."
)


def translate(error: RuntimeError) -> Exception:
    """torch's words for a freed graph or a changed tensor, in ours; other errors unchanged."""
    text = str(error)
    if "second time" in text or "already been freed" in text:
        return UsageError(f"{_FREED}. {_FREED_REMEDY}")
    if "modified by an inplace operation" in text or "has been modified inplace" in text:
        return UsageError(
            "A tensor that the gradient needs was changed in place after the forward pass "
            f"(an optimizer step, `x += ...`?). Run the forward pass again. torch says: {text}"
        )
    if "selective activation checkpoint" in text:
        return UsageError(
            "The losses go through a selective activation checkpoint, which allows one backward "
            "pass for each forward pass, and there has been one. Call pergrad before `backward`, "
            "with retain_graph=True, or run the forward pass again."
        )
    return error


@contextmanager
def in_our_words() -> Iterator[None]:
    """What torch raises inside this block, translated."""
    try:
        yield
    except RuntimeError as error:
        translated = translate(error)
        if translated is error:
            raise
        raise translated from error
