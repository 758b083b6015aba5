"""From a scalar loss down to the places where its examples still lie apart.

A training loop has one number: a mean over rows, divided by something, plus something else. This
file walks from that number down through sums and factors to the ops that reduced rows to it.

Owns: `take_apart`, the terms of a scalar, each with its factor and, where the op saved what it was
made from, its rows' values; and `start_layout`, the example of each element of a term.
Does not know: parameters' gradients, plans, measurements.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pergrad.errors import UnsupportedError, UsageError
from pergrad.graph import nodes
from pergrad.graph.layout import Layout, along, compressed
from pergrad.graph.ops import attribute, saved, traits
from pergrad.graph.walk import Edge, Graph, Slot
from pergrad.ops.joining import SINKS  # with it, what is read of an op's node is declared

_MEAN, _SUM = 1, 2  # how torch numbers reductions


@dataclass(slots=True)
class Term:
    """One summand of a scalar: a reduction over rows, and what it is multiplied by."""

    node: int
    op: str
    inputs: tuple[int, ...]  # the inputs of the op in which examples lie apart
    factor: Tensor | float
    shape: tuple[int, ...]  # of these inputs
    values: Callable[[], Tensor] | None  # each element's or row's share, if the op saved enough
    counted: Callable[[], Tensor] | None = None  # which rows count, if the op leaves some out
    mean: bool = False  # whether the op itself divides by what it counts


@dataclass(slots=True)
class Trunk:
    """What a scalar is the sum of."""

    terms: list[Term] = field(default_factory=list)
    others: list[int] = field(default_factory=list)  # nodes that no rule here takes apart
    constant: bool = False  # whether something without a gradient was added


def take_apart(graph: Graph) -> Trunk:
    """The terms of the scalar at the graph's root."""
    trunk = Trunk()
    _descend(graph, graph.root[0], graph.root[1], 1.0, trunk)
    if len(trunk.terms) + len(trunk.others) > 1:
        alone = _alone(graph, trunk)
        trunk.terms = [t for t in trunk.terms if t not in alone]
        trunk.others += [t.node for t in alone]
    return trunk


def _alone(graph: Graph, trunk: Trunk) -> list[Term]:
    """Terms whose rows are not known to be made of data.

    Nor are those of a constant matrix times one weight, beside another term that is: the loss is
    no different from a smoothness penalty's, unless data that it is made of are seen elsewhere.
    """
    known = _from_data(graph)
    starts = {t.node: [graph.edges[t.node][k][0] for k in t.inputs] for t in trunk.terms}
    starts |= {i: [child for child, _ in graph.edges[i] if child >= 0] for i in trunk.others}
    of_data = {
        i: graph.below(s, everything=True)
        for i, s in starts.items() if any(known[child] for child in s)
    }  # fmt: skip
    alone = [t for t in trunk.terms if t.node not in of_data]
    for term in trunk.terms:
        rows = of_data.get(term.node)
        if rows is None or term.op in ("nll_loss", "nll_loss2d"):  # classes are of examples
            continue
        leaves = [i for i in rows if nodes.leaf_variable(graph.nodes[i]) is not None]
        applied = any(traits(graph.op(i)).looks_up for i in rows) or any(known[i] for i in leaves)
        rivals = [other for i, other in of_data.items() if i != term.node]
        inner = {i for i in rows if known[i]}
        if rivals and len(leaves) == 1 and not applied and not inner & set().union(*rivals):
            alone.append(term)
    return alone


def _from_data(graph: Graph) -> list[bool]:
    """Of each node, whether its rows are known to be made of data, and not of parameters.

    A penalty on a weight may have as many rows as there are examples, or a multiple. What it is
    compared with, or multiplied by, is no data: only what a weight is applied to is, or looked up.
    """
    found = [False] * len(graph.nodes)
    for i in range(len(graph.nodes) - 1, -1, -1):
        below, op = graph.edges[i], graph.op(i)
        leaf = nodes.leaf_variable(graph.nodes[i])
        if leaf is not None:
            found[i] = not isinstance(leaf, nn.Parameter) and (i, 0) not in graph.targets
        elif op in _PRODUCTS and _PRODUCTS[op] < len(below) and below[_PRODUCTS[op]][0] < 0:
            found[i] = True
        else:
            outside = op not in _NO_DATA
            found[i] = traits(op).looks_up or any(
                found[child] if child >= 0 else outside for child, _ in below
            )
    return found


# Where the rows of a product come in; the other side is the weight.
_PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "mv": 0, "addmv": 1}
# What a penalty does to a weight before it is reduced.
_BY_ELEMENT = {
    "add", "sub", "rsub", "mul", "div", "pow", "where", "masked_fill", "lerp", "addcmul", "addcdiv",
    "maximum", "minimum", "fmod", "remainder", "atan2", "hypot", "prod", "cat", "stack", "dot",
}  # fmt: skip


def _descend(graph: Graph, i: int, number: int, factor: Tensor | float, trunk: Trunk) -> None:
    """Add what lies below one scalar, times a factor, to the trunk."""
    op, node, below = graph.op(i), graph.nodes[i], graph.edges[i]
    live = [k for k, (child, _) in enumerate(below) if child >= 0]
    if op in _SAME:
        _descend(graph, *below[0], factor, trunk)
    elif op in SINKS:
        _descend(graph, *below[number], factor, trunk)
    elif op == "neg":
        _descend(graph, *below[0], -factor, trunk)
    elif op in ("add", "sub"):
        trunk.constant |= len(live) < 2
        alpha = attribute(op, node, "alpha")
        for k in live:
            sign = 1.0 if k == 0 else (alpha if op == "add" else -alpha)
            _descend(graph, *below[k], factor * sign, trunk)
    elif op in ("mul", "div") and (other := _constant(graph, i, live)) is not None:
        _descend(graph, *below[live[0]], factor * (other if op == "mul" else 1 / other), trunk)
    elif op in _REDUCTIONS and not graph.shape((i, number)):
        _reduced(graph, i, factor, trunk)
    elif op in _LOSSES and attribute(op, node, "reduction") in (_MEAN, _SUM):
        shape = graph.shape(below[live[0]]) if live else ()
        values, nll = _LOSSES[op], op.startswith("nll")
        trunk.terms.append(
            Term(
                i, op, tuple(live), factor, shape, lambda: values(op, node),
                partial(_not_ignored, op, node) if nll else None,
                attribute(op, node, "reduction") == _MEAN,
            )
        )  # fmt: skip
    else:
        trunk.others.append(i)


_SAME = {
    "to_copy", "clone", "alias", "view", "reshape_alias", "unsafe_view", "squeeze", "unsqueeze",
    "lift_fresh", "expand",
}  # fmt: skip
_REDUCTIONS = {"sum", "mean", "sum_dim", "mean_dim"}
_STACKS = {"stack", "cat"}


def _constant(graph: Graph, i: int, live: list[int]) -> Any:
    """The number by which an op multiplies or divides a scalar; None if that has a gradient."""
    node, op = graph.nodes[i], graph.op(i)
    if len(live) != 1 or (op == "div" and live[0] == 1):
        return None
    name = "other" if live[0] == 0 else "self"
    value = saved(op, node, name)  # a tensor, or a number
    if isinstance(value, Tensor):
        # a Python number stands there in its own dtype: 1 / 3 would be a float32
        return value.detach().reshape(()).double() if value.numel() == 1 else None
    return value


def _reduced(graph: Graph, i: int, factor: Tensor | float, trunk: Trunk) -> None:
    """A sum or mean down to a scalar: of scalars put side by side, or of rows."""
    child, number = graph.edges[i][0]
    shape = graph.shape((child, number))
    mean = graph.op(i).startswith("mean")
    count: int = prod(shape)
    factor = factor / count if mean and count else factor
    inside = graph.edges[child]
    scalars = all(c < 0 or all(s == 1 for s in graph.shape((c, n))) for c, n in inside)
    if not shape:
        _descend(graph, child, number, factor, trunk)
    elif graph.op(child) in _STACKS and scalars and len(inside) == count:
        trunk.constant |= any(c < 0 for c, _ in inside)
        for c, n in inside:
            if c >= 0:
                _descend(graph, c, n, factor, trunk)
    else:
        counted = _unmasked(graph, (child, number), shape)
        trunk.terms.append(Term(i, graph.op(i), (0,), factor, shape, None, counted))


def _unmasked(graph: Graph, slot: Slot, shape: tuple[int, ...]) -> Callable[[], Tensor] | None:
    """Which elements of what is reduced a mask leaves in; None if there is no mask."""
    child, number = slot
    while child >= 0 and graph.shape((child, number)) == shape:
        op, node, below = graph.op(child), graph.nodes[child], graph.edges[child]
        live = [k for k, (c, _) in enumerate(below) if c >= 0]
        if op == "masked_fill" and live == [0]:
            mask = saved(op, node, "mask")
            return lambda: mask.logical_not().expand(shape)
        if op not in {"mul", "div", "neg", *_SAME} or len(live) != 1:
            return None
        if op == "mul":
            other = saved(op, node, "other" if live[0] == 0 else "self")
            if isinstance(other, Tensor) and other.numel() > 1:
                return lambda: (other != 0).expand(shape)
        child, number = below[live[0]]
    return None


# --- What an op saved, once more without the reduction --------------------------------------------


def _nll(op: str, node: Any) -> Tensor:
    """(R,) or (R, H, W): minus the log-probability of each row's class."""
    values = F.nll_loss(
        saved(op, node, "self"), saved(op, node, "target"), saved(op, node, "weight"),
        ignore_index=attribute(op, node, "ignore_index"), reduction="none",
    )  # fmt: skip
    if attribute(op, node, "reduction") == _MEAN:
        return values / saved(op, node, "total_weight")
    return values


def _not_ignored(op: str, node: Any) -> Tensor:
    """(R,) or (R, H, W): whether the row's label is one."""
    return saved(op, node, "target") != attribute(op, node, "ignore_index")


def _of_two(
    function: Callable[..., Tensor], *numbers: str, tensors: tuple[str, ...] = ()
) -> Callable[[str, Any], Tensor]:
    """A loss of an input and a target, and of further numbers and tensors, by their names."""

    def values(op: str, node: Any) -> Tensor:
        more = {name: attribute(op, node, name) for name in numbers}
        more |= {name: saved(op, node, name) for name in tensors}
        pair = saved(op, node, "self"), saved(op, node, "target")
        found = function(*pair, reduction="none", **more)
        mean = attribute(op, node, "reduction") == _MEAN  # over all elements
        return found / max(1, found.numel()) if mean else found

    return values


_LOSSES: dict[str, Callable[[str, Any], Tensor]] = {
    "nll_loss": _nll,
    "nll_loss2d": _nll,
    "mse_loss": _of_two(F.mse_loss),
    "smooth_l1_loss": _of_two(F.smooth_l1_loss, "beta"),
    "huber_loss": _of_two(F.huber_loss, "delta"),
    "binary_cross_entropy": _of_two(F.binary_cross_entropy, tensors=("weight",)),
    "binary_cross_entropy_with_logits": _of_two(
        F.binary_cross_entropy_with_logits, tensors=("weight", "pos_weight")
    ),
    "soft_margin_loss": _of_two(F.soft_margin_loss),
    "multi_margin_loss": _of_two(F.multi_margin_loss, "p", "margin", tensors=("weight",)),
    "multilabel_margin_loss": _of_two(F.multilabel_margin_loss),
}


# Ops whose operands without a gradient say nothing about where rows come from.
_NO_DATA = {*_PRODUCTS, *_BY_ELEMENT, *_LOSSES, *_REDUCTIONS, *_SAME}


# --- Whose rows -----------------------------------------------------------------------------------


def start_layout(graph: Graph, term: Term, examples: int, batch_dim: int) -> Layout:
    """The example of each element of what a term reduces.

    Raises:
        UsageError: the rows are no multiple of the examples.
    """
    shape = term.shape
    if not shape:
        raise UnsupportedError(
            f"The loss comes from `{term.op}` of a single number, in which no examples lie apart. "
            "Give pergrad.reading the losses (B,) in its place."
        )
    dims = len(shape)
    flat = term.op == "nll_loss"  # (R, classes), whatever the rows were before
    if not -dims <= batch_dim < dims and not flat and dims > 1:
        raise UsageError(f"batch_dim is {batch_dim}, but `{term.op}` reduces a tensor {shape}.")
    if batch_dim and not flat and dims > 1 and shape[batch_dim] == examples:
        return along(shape, batch_dim % dims, torch.arange(examples, device="cpu"))
    rows = shape[0]
    chosen = selected_rows(graph, term, examples) if batch_dim == 0 else None
    if chosen is not None:
        return compressed(shape, chosen.reshape(-1, *[1] * (dims - 1)))
    if examples == 0 or rows % examples:
        raise UsageError(
            f"The loss `{term.op}` is made of {rows} rows, which {examples} examples do not divide."
            " Pass the number of examples of this very batch as `examples`, or the losses (B,), for"
            " instance `pergrad.per_example(values, ids=...)` for packed sequences."
        )
    each = rows // examples
    _check_whole(graph, term, examples, each, batch_dim)
    return _equal_shares(shape, examples, bool(batch_dim))


@lru_cache(maxsize=8)  # a training loop has the same shapes step by step
def _equal_shares(shape: tuple[int, ...], examples: int, in_turns: bool) -> Layout:
    numbers, each = torch.arange(examples, device="cpu"), shape[0] // examples
    return along(shape, 0, numbers.repeat(each) if in_turns else numbers.repeat_interleave(each))


def _check_whole(graph: Graph, term: Term, examples: int, each: int, batch_dim: int) -> None:
    """No example is a piece of a sequence, where the graph shows how rows were made of sequences.

    Two texts of six tokens are twelve rows, which four examples divide, too: what is left of the
    number of examples when the last batch is shorter.

    Raises:
        UsageError: it is.
    """
    shape = _before_flattening(graph, term)
    if shape is None or each == 1:
        return
    dims = [size for size in shape if size != 1]
    if dims and dims[-1 if batch_dim else 0] % examples:
        raise UsageError(
            f"The loss `{term.op}` is made of {term.shape[0]} rows, which were {shape} before they "
            f"were flattened, and {examples} examples do not divide its dimension "
            f"{'of the batch' if batch_dim else 0}: they would be pieces of sequences. Pass the "
            "number of examples of this very batch as `examples` (the last one may be shorter), or "
            "the losses (B,)."
        )


def _before_flattening(graph: Graph, term: Term) -> tuple[int, ...] | None:
    """The dimensions that became the rows of a loss, if the graph shows it."""
    rows = term.shape[0]
    at = graph.edges[term.node][term.inputs[0]]
    while at[0] >= 0:
        op, below = graph.op(at[0]), graph.edges[at[0]]
        live = [slot for slot in below if slot[0] >= 0 and not graph.pure[slot[0]]]
        if len(live) != 1:
            return None
        shape = graph.shape(live[0])
        if op in _FLATTENS and shape[:1] != (rows,):
            kept = len(graph.shape(at)) - 1
            lead = shape[: len(shape) - kept]
            return lead if prod(lead) == rows else None
        if op not in _ROWWISE | _FLATTENS or shape[:1] != (rows,):
            return None
        at = live[0]
    return None


_FLATTENS = {"view", "reshape_alias", "unsafe_view", "view_as_alias"}
# Between the rows of a loss and the place where they were picked: row by row.
_ROWWISE = {
    "log_softmax", "softmax", "to_copy", "clone", "alias", "neg", "exp", "log", "sigmoid",
    "log_sigmoid_forward", "tanh", "relu", "gelu", "silu", "native_layer_norm", "addmm",
    "softplus", "abs", "pow", "view_as_alias", "logsumexp", "gather",
}  # fmt: skip


def selected_rows(graph: Graph, term: Term, examples: int) -> Tensor | None:
    """The example of each row, if a mask or an index picked the rows; None if none did.

    `logits[labels != -100]` leaves as many rows to an example as it has labels.
    """
    at = graph.edges[term.node][term.inputs[0]]
    while at[0] >= 0:
        op, below = graph.op(at[0]), graph.edges[at[0]]
        if op == "index":
            return _picked(graph, at[0], examples)
        live = [slot for slot in below if slot[0] >= 0 and not graph.pure[slot[0]]]
        same = len(live) == 1 and graph.shape(live[0])[:1] == graph.shape(at)[:1]
        if op not in _ROWWISE or not same:
            return None
        at = live[0]
    return None


def _picked(graph: Graph, i: int, examples: int) -> Tensor | None:
    (source,) = graph.edges[i]
    shape = graph.shape(source)
    indices = list(saved(graph.op(i), graph.nodes[i], "indices"))
    if not indices or indices[0] is None or examples == 0 or not shape or shape[0] % examples:
        return None
    numbers = torch.arange(examples, device="cpu").repeat_interleave(shape[0] // examples)
    dims = 0  # dimensions that are indexed: a mask takes several
    for index in indices:
        dims += 0 if index is None else index.dim() if index.dtype == torch.bool else 1
    if any(index is None for index in indices):
        return None
    owners = numbers.reshape(-1, *[1] * (dims - 1)).expand(shape[:dims])
    picked = owners[tuple(index.cpu() for index in indices)]
    return picked if picked.dim() == 1 else None


def start_edges(terms: list[Term], layouts: list[Layout]) -> dict[Edge, Layout]:
    """Where to begin: for each term, each of the inputs in which examples lie apart."""
    return {
        (term.node, k): layout
        for term, layout in zip(terms, layouts, strict=True)
        for k in term.inputs
    }
