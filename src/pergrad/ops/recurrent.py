"""LSTM layers as one op: oneDNN's, which `nn.LSTM` takes in float32 on a CPU.

Owns: how ownership moves through one layer; the pass back through time to the cotangents of all
gates, of which every weight's gradient is an ordinary product of rows.
Does not know: layers and directions, which are an op each; cuDNN's, which are left to the fallback.

The op has saved what it read and what it returned, so that the gates of all steps can be had again
by two matrix products, and the cells one after the other, element by element. Back through time one
small product a step remains. That is done for all examples at once: none of it joins two of them.
"""

from functools import lru_cache

import torch
from torch import Tensor

from pergrad.factors.numeric import result_dtype
from pergrad.graph.layout import NOBODY, Layout, merge, smear
from pergrad.graph.ops import Op, Result, Why, declare, owners_of_all, resized, unknown
from pergrad.ops.registry import Served, Situation, rule
from pergrad.ops.rows import outer, partition, reduced

_LSTM = 2  # torch's number of the kind of cell
_INPUT, _HIDDEN, _BIASES = 1, 2, (3, 4)  # slots of the weights; the first states come after them

declare(
    "mkldnn_rnn_layer",
    needs=[
        "input", "weight0", "weight1", "weight2", "weight3", "hx_", "cx_", "result0",
        "reverse", "mode", "has_biases", "batch_sizes",
    ],
    weights=True,
)  # fmt: skip


@owners_of_all("mkldnn_rnn_layer")
def _lstm_layer(op: Op, outs: list[Layout | None]) -> list[Result]:
    """(T, B, C) inside, whatever batch_first says outside: an example owns sequences."""
    total: Layout | None = None
    for out in outs:  # all hidden states, the last one, the last cell
        if out is None:
            continue
        rank = len(out.shape)
        plain = smear(out, [d for d in range(rank) if d != rank - 2])
        if plain is None:
            return unknown(op)
        whole = Layout(op.out_shapes[1], plain.owner.reshape(plain.owner.shape[-2:]))
        total = whole if total is None else merge(total, whole)
        if total is None:
            return unknown(op)
    if total is None or op.attr("batch_sizes"):
        return unknown(op)
    results: list[Result] = []
    for i, shape in enumerate(op.in_shapes):
        if shape is None:
            results.append(None)
        elif i == 0:
            results.append(Layout(shape, total.owner[None]))
        elif i <= _BIASES[-1]:
            results.append(Why.CONTRACTED if op.parameter[i] else Why.UNKNOWN)
        else:
            results.append(resized(total, shape))
    return results


@rule("mkldnn_rnn_layer")
def lstm_layer(use: Situation) -> Served:
    """h[t] = o tanh(c[t]), c[t] = f c[t-1] + i g; i, f, g, o of W x[t] + b + U h[t-1] + d."""
    T, B, _ = use.saved("input").shape
    layout = _by_step(use.layouts, T, B)
    if use.attr("mode") != _LSTM or use.attr("batch_sizes") or layout is None:
        return {}
    rows = partition(layout, (0, 1), use.batch)
    if rows is None or not T or not B:
        return {}
    x, before = use.saved("input"), _before(use)
    gates = _cotangents(use, x, before)  # (T, B, 4H)
    served: Served = {}
    flat = gates.flatten(0, 1)[:, None]
    for slot, read in ((_INPUT, x), (_HIDDEN, before)):
        if slot in use.operands:
            read = read.to(gates.dtype).flatten(0, 1)[:, None]
            served[slot] = outer(flat, read, rows, use.operands[slot].shape)
    for slot in _BIASES:
        if slot in use.operands:
            served[slot] = reduced(gates, layout, use.operands[slot].shape, use.batch)
    return served


@lru_cache(maxsize=256)
def _by_step(layouts: tuple[Layout | None, ...], T: int, B: int) -> Layout | None:
    """Whose (T, B, 1) the steps are: an example that owns one output's row owns the sequence."""
    total = Layout((T, B, 1), torch.full((1, 1, 1), NOBODY, dtype=torch.int64, device="cpu"))
    for layout in layouts:
        if layout is None:
            continue
        one_row = smear(layout, [d for d in range(len(layout.shape)) if d != len(layout.shape) - 2])
        if one_row is None:
            return None
        owner = one_row.owner.reshape(1, -1, 1)
        merged = merge(total, Layout(total.shape, owner))
        if merged is None:
            return None
        total = merged
    return total


def _before(use: Situation) -> Tensor:
    """(T, B, H): the hidden state that each step has read."""
    y, first = use.saved("result0"), use.saved("hx_")[None]
    return torch.cat([y[1:], first] if use.attr("reverse") else [first, y[:-1]])


def _cotangents(use: Situation, x: Tensor, before: Tensor) -> Tensor:
    """(T, B, 4H): the gradient of the summed losses by what each gate takes its function of."""
    W, U = use.saved("weight0"), use.saved("weight1")
    given = [g for g in use.cotangents if g is not None]
    dtype = result_dtype(x, *given)
    W, U, x, before = (value.to(dtype) for value in (W, U, x, before))
    sums = x @ W.mT + before @ U.mT
    if use.attr("has_biases"):
        sums = sums + (use.saved("weight2") + use.saved("weight3")).to(dtype)
    T, B, H = before.shape
    order = range(T - 1, -1, -1) if use.attr("reverse") else range(T)
    i, f, g, o = sums.view(T, B, 4, H).unbind(2)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cells, c = _cells(i * g, f, use.saved("cx_").to(dtype), order)
    squashed = c.tanh()
    # what a cotangent of the cell is multiplied by at the gates i, f, g, and one of h at o
    slopes = torch.stack([g * i * (1 - i), cells * f * (1 - f), i * (1 - g * g)], 2)
    of_output = squashed * o * (1 - o)
    to_cell = o * (1 - squashed * squashed)
    arriving, last, cell = (None if v is None else v.to(dtype) for v in use.cotangents[:3])
    hidden = x.new_zeros(B, H) if last is None else last
    cell = x.new_zeros(B, H) if cell is None else cell
    found: list[Tensor] = [x] * T
    for t in reversed(order):
        if arriving is not None:
            hidden = hidden + arriving[t]
        cell = torch.addcmul(cell, hidden, to_cell[t])
        found[t] = torch.cat([(cell[:, None] * slopes[t]).flatten(1), hidden * of_output[t]], 1)
        hidden = found[t] @ U
        cell = cell * f[t]
    return torch.stack(found)


def _cells(fresh: Tensor, f: Tensor, first: Tensor, order: range) -> tuple[Tensor, Tensor]:
    """(T, B, H) twice: the cell before each step and after it."""
    before: list[Tensor] = [first] * len(order)
    after: list[Tensor] = [first] * len(order)
    c = first
    for t in order:
        before[t] = c
        c = after[t] = torch.addcmul(fresh[t], f[t], c)
    return torch.stack(before), torch.stack(after)
