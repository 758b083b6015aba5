"""Whose gradient stands where, behind ops that look rows up, or put them, by indices.

Owns: the ops of aten that take tensors of indices, and what is known of these: nothing, unless a
tensor of indices counts 0, 1, 2, ...
Does not know: what is done about results that are sums over examples (`ends`).
"""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from pergrad.graph.layout import NOBODY, Layout, merge, smear
from pergrad.graph.ops import positive
from pergrad.ops.compiled.owners import (
    SUMMED,
    UNREAD,
    Call,
    State,
    broadcast,
    either,
    name_of,
    of_ops,
    sized,
)


@of_ops("embedding_dense_backward", "_embedding_bag_backward")
def _embedding(call: Call) -> State:
    layout = call.layout()
    return UNREAD if layout.is_constant and int(layout.owner.max()) == NOBODY else SUMMED


@of_ops("index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate")
def _put(call: Call) -> State:
    values, table = call.arguments["values"], call.arguments["self"]
    if values not in call.linear or any(n not in (values, table) for n in call.linear):
        return UNREAD
    found = _within(call)
    if found is None:
        return SUMMED if call.linear == [values] and _whole_rows(call) else UNREAD
    before = broadcast(call.layout(table), call.shape) if table in call.linear else found
    if not isinstance(before, Layout):
        return UNREAD
    return either(merge(before, found), UNREAD)


def _within(call: Call) -> Layout | None:
    """Owners of what is put, if wherever it is put along the indexed dimensions is its own."""
    indices = call.arguments["indices"]
    read = [d for d, i in enumerate(indices) if i is not None]
    if not read or read != list(range(read[0], read[-1] + 1)):
        return None
    used = [call.values[indices[d]] for d in read]
    if any(index.dtype == torch.bool for index in used):
        return None
    layout, first = call.layout(call.arguments["values"]), read[0]
    dims = max(index.dim() for index in used)
    lead = len(call.shape) - len(read) + dims - len(layout.shape)
    wide = Layout((1,) * lead + layout.shape, layout.owner[(None,) * lead])
    # hidden[arange(B), last]: the first index stays where it is, the second moves within its row
    counted = dims == 1 and len(read) > 1 and _counts(indices[first], used[0], call.shape[first])
    plain = wide if counted else smear(wide, range(first, first + dims))
    if plain is None:
        return None
    owner = plain.owner
    here = [owner.shape[first], *[1] * (len(read) - 1)] if counted else [1] * len(read)
    sizes = [*owner.shape[:first], *here, *owner.shape[first + dims :]]
    found = sized(Layout(tuple(sizes), owner.reshape(sizes)), call.shape)
    return found if isinstance(found, Layout) else None


def _counts(node: fx.Node, value: Tensor, size: int) -> bool:
    """Whether a tensor of indices is 0, 1, 2, ..., `size` - 1.

    `reading` puts such a tensor in the place of one without numbers if the region has saved it.
    """
    if tuple(value.shape) != (size,):
        return False
    if node.op == "call_function" and name_of(node) == "arange":
        return list(node.args) in ([size], [0, size], [0, size, 1])
    return not isinstance(value, FakeTensor) and torch.equal(value.cpu(), torch.arange(size))


def _whole_rows(call: Call) -> bool:
    """Whether rows are added to a table of zeros, by one index along its first dimension."""
    indices, values = call.arguments["indices"], call["values"]
    accumulates = call.get("accumulate", call.name.startswith("_unsafe_masked"))
    if not accumulates or len(indices) != 1 or not _zeros(call.arguments["self"]):
        return False
    index = call.values[indices[0]]
    shape = (*index.shape, *call.shape[1:])
    mask = call.get("mask")
    inside = mask is None or all(n == 1 for n in mask.shape[index.dim() :])
    return index.dtype != torch.bool and tuple(values.shape) == shape and inside


def _zeros(node: Any) -> bool:
    """Whether a value was made of zeros, by an op or before the graph was compiled."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        kept = attrgetter(str(node.target))(node.graph.owning_module)
        return not isinstance(kept, FakeTensor) and not bool(kept.any())
    name = name_of(node) if isinstance(node, fx.Node) else ""
    value = node.args[-1] if name in ("full", "full_like", "new_full") else None
    if name == "full":
        value = node.args[1]
    return name in ("zeros", "new_zeros", "zeros_like") or value == 0


@of_ops("gather", "index_select", "index", "_unsafe_index", "scatter_add", "scatter", "index_add")
def _indexed(call: Call) -> State:
    """Indices are data: what is read holds for any of them."""
    table = call.arguments.get("self")
    layout = call.layout()
    if call.name in ("gather", "index_select"):
        if call.linear != [table]:
            return UNREAD
        dim = positive(call["dim"], len(layout.shape))
        return sized(smear(layout, [dim]), call.shape)
    if call.name in ("scatter_add", "scatter"):
        source = call.arguments.get("src")
        if call.linear != [source]:
            return UNREAD
        dim = positive(call["dim"], len(layout.shape))
        if any(n != m for d, (n, m) in enumerate(zip(layout.shape, call.shape, strict=True))
               if d != dim):  # fmt: skip
            return UNREAD
        return sized(smear(layout, [dim]), call.shape)
    if call.name in ("index", "_unsafe_index"):
        if call.linear != [table]:
            return UNREAD
        indices = call.arguments["indices"]
        read = [d for d, i in enumerate(indices) if i is not None]
        plain = smear(layout, read)
        if plain is None or not read or read != list(range(read[0], read[-1] + 1)):
            return UNREAD
        more = len(call.shape) - len(layout.shape) + len(read)  # dimensions of the indices
        owner = plain.owner
        sizes = [*owner.shape[: read[0]], *[1] * more, *owner.shape[read[-1] + 1 :]]
        return sized(Layout(tuple(sizes), owner.reshape(sizes)), call.shape)
    return UNREAD
