"""Where the backward graph of a compiled region sums over examples: the factor of what is summed.

Owns: `end_at`, for each op of aten that does so, the values it needs and the factor made of them.
Does not know: autograd's nodes, what becomes of the sum further down the graph (`reading`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pergrad.factors import Dense, Factor, Outer
from pergrad.graph import nodes
from pergrad.graph.layout import Layout
from pergrad.graph.ops import positive
from pergrad.ops.compiled.owners import Call, name_of
from pergrad.ops.fallback import direct
from pergrad.ops.registry import Operand, Situation, rule_for
from pergrad.ops.rows import outer, partition, reduced, row_owners, rows_by_id

Make = Callable[[Sequence[Any], int], Factor | None]


@dataclass(frozen=True, slots=True)
class End:
    """A value that is a sum over examples: what has to be known, and the factor of its terms."""

    op: str
    shape: tuple[int, ...]
    needs: tuple[fx.Node, ...]
    make: Make  # of the values of `needs`, and the number of examples


Ends = Callable[[Call, int], End | None]
_TABLE: dict[str, Ends] = {}


def _of(*names: str) -> Callable[[Ends], Ends]:
    def add(function: Ends) -> Ends:
        for name in names:
            _TABLE[name] = function
        return function

    return add


def end_at(call: Call, number: int = 0) -> End | None:
    """The end at an op (at one of its results), if there is a factor for it."""
    function = _TABLE.get(call.name)
    return None if function is None else function(call, number)


def apart(node: fx.Node, layout: Layout) -> End:
    """A value in which every element belongs to one example."""

    def make(values: Sequence[Any], batch: int) -> Factor | None:
        return direct(values[0], layout, batch)

    return End("leaf", layout.shape, (node,), make)


@_of("sum")
def _sum(call: Call, _: int) -> End:
    node, layout, shape = call.linear[0], call.layout(), call.shape
    rank = len(layout.shape)
    dims = [positive(d, rank) for d in call.get("dim") or range(rank)]
    wide = tuple(1 if d in dims else n for d, n in enumerate(layout.shape))

    def make(values: Sequence[Any], batch: int) -> Factor:
        found = reduced(values[0], layout, wide, batch)
        return Dense(found.values.reshape(batch, *shape))

    return End("sum", shape, (node,), make)


def _source(node: fx.Node) -> tuple[fx.Node, bool]:
    """A matrix, or the one of which it is the transpose: that is written to memory already."""
    turned = False
    while node.op == "call_function":
        name = name_of(node)
        if name == "t" or (name == "permute" and list(node.args[1]) == [1, 0]):  # type: ignore[arg-type]
            node, turned = node.args[0], not turned  # type: ignore[assignment]
        else:
            break
    return node, turned


@_of("mm")
def _mm(call: Call, _: int) -> End | None:
    """(p, R) @ (R, q): each of the R rows is an example's, or a position's of one."""
    left, right = call.arguments["self"], call.arguments["mat2"]
    layout, on_left = call.layout(), left in call.linear
    if row_owners(layout, (1 if on_left else 0,)) is None:
        return None
    shape = call.shape
    (one, one_turned), (two, two_turned) = _source(left), _source(right)

    def make(values: Sequence[Any], batch: int) -> Factor | None:
        rows = partition(layout, (1 if on_left else 0,), batch)
        assert rows is not None
        g = values[0] if one_turned else values[0].mT
        a = values[1].mT if two_turned else values[1]
        if rows.foldable:
            return Outer(rows.fold(g, 1), rows.fold(a, 1), shape)
        return outer(g[:, None], a[:, None], rows, shape)

    return End("mm", shape, (one, two), make)


@_of("bmm")
def _bmm(call: Call, _: int) -> End | None:
    """The same for each of several matrices."""
    left, right = call.arguments["self"], call.arguments["mat2"]
    layout, on_left = call.layout(), left in call.linear
    dims = (2 if on_left else 1,)
    if row_owners(layout, dims) is None:
        return None
    shape = call.shape

    def make(values: Sequence[Any], batch: int) -> Factor | None:
        rows = partition(layout, dims, batch)
        assert rows is not None
        return outer(values[0].permute(2, 0, 1), values[1].permute(1, 0, 2), rows, shape)

    return End("bmm", shape, (left, right), make)


def _by_rule(
    call: Call, name: str, slot: int, fields: dict[str, Any], grad: str, shape: Sequence[int]
) -> End:
    """What the rule of the op itself makes of it. Fields are nodes of the graph, or numbers."""
    node, layout = call.arguments[grad], call.layout()
    needed = {field: value for field, value in fields.items() if isinstance(value, fx.Node)}
    plain = {field: value for field, value in fields.items() if field not in needed}
    rule = rule_for(name)
    assert rule is not None

    def make(values: Sequence[Any], batch: int) -> Factor | None:
        stand = nodes.Stand(**plain, **dict(zip(needed, values[1:], strict=True)))
        operands = {slot: Operand(tuple(shape))}
        return rule(Situation(stand, name, batch, [values[0]], (layout,), operands))[slot]

    return End(call.name, tuple(shape), (node, *needed.values()), make)


# For each op of a backward whose results but the first are gradients of parameters: the op that has
# the rule, its cotangent, plain arguments by the rule's names, and tensors by the fields it saves.
_BACKWARDS: dict[str, tuple[str, str, dict[str, str], dict[str, str]]] = {
    "convolution_backward": (
        "convolution", "grad_output",
        {n: n for n in ("stride", "padding", "dilation", "transposed", "groups")},
        {"input": "input"},
    ),
    "native_layer_norm_backward": (
        "native_layer_norm", "grad_out", {"normalized_shape": "normalized_shape"},
        {"input": "input", "result1": "mean", "result2": "rstd"},
    ),
    "_fused_rms_norm_backward": (
        "fused_rms_norm", "grad_out", {"normalized_shape": "normalized_shape"},
        {"input": "input", "result1": "rstd"},
    ),
    "native_group_norm_backward": (
        "native_group_norm", "grad_out", {"group": "group"},
        {"input": "input", "result1": "mean", "result2": "rstd"},
    ),
    "native_batch_norm_backward": (
        "native_batch_norm", "grad_out", {"training": "train", "eps": "eps"},
        {
            "input": "input", "result1": "save_mean", "result2": "save_invstd",
            "running_mean": "running_mean", "running_var": "running_var",
        },
    ),
}  # fmt: skip


@_of(*_BACKWARDS)
def _backward(call: Call, number: int) -> End | None:
    shape = call.shapes[number]
    if number == 0 or shape is None:
        return None
    rule, grad, plain, saved = _BACKWARDS[call.name]
    fields = {field: call[name] for field, name in plain.items()}
    fields |= {field: call.arguments[name] for field, name in saved.items()}
    return _by_rule(call, rule, number, fields, grad, shape)


@_of("embedding_dense_backward")
def _embedding(call: Call, _: int) -> End:
    fields = {
        "indices": call.arguments["indices"],
        "padding_idx": call["padding_idx"],
        "scale_grad_by_freq": call["scale_grad_by_freq"],
        "sparse": False,
    }
    return _by_rule(call, "embedding", 0, fields, "grad_output", call.shape)


@_of("_embedding_bag_backward")
def _embedding_bag(call: Call, _: int) -> End | None:
    if call["scale_grad_by_freq"] or call["sparse"]:
        return None
    saved = ("indices", "offsets", "per_sample_weights")
    fields = {field: call.arguments.get(field) for field in saved}
    fields |= {field: call[field] for field in ("scale_grad_by_freq", "mode", "sparse")}
    fields |= {"result2": call.arguments["bag_size"], "result3": call.arguments["maximum_indices"]}
    fields["padding_idx"] = call.get("padding_idx", -1)
    return _by_rule(call, "embedding_bag", 0, fields, "grad", call.shape)


@_of("index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate")
def _put(call: Call, _: int) -> End | None:
    """Rows that are added to a table of zeros; with a mask, only some of them."""
    layout, shape = call.layout(), call.shape
    index, mask = call.arguments["indices"][0], call.arguments.get("mask")
    rank = call.values[index].dim()
    if row_owners(layout, tuple(range(rank))) is None:
        return None

    def make(values: Sequence[Any], batch: int) -> Factor | None:
        g, ids = values[:2]
        rows = partition(layout, tuple(range(rank)), batch)
        assert rows is not None
        ids = torch.where(ids < 0, ids + shape[0], ids).long()
        if len(values) == 3:
            inside: Tensor = values[2].reshape(values[2].shape[:rank])
            ids = torch.where(inside, ids, -1)
        return rows_by_id(ids.reshape(-1), g.reshape(ids.numel(), *shape[1:]), rows, shape)

    needs = (call.arguments["values"], index)
    return End(call.name, shape, needs if mask is None else (*needs, mask), make)
