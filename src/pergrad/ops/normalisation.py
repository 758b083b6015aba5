"""Normalisation layers: scale and shift of layer, RMS, group and batch norm.

Owns: the factor of the scale (the sum of g times the normalised input) and of the shift (of g).
Does not know: how the gradient gets to the layer's input.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from pergrad.factors import Dense
from pergrad.factors.numeric import result_dtype
from pergrad.factors.workspace import chunks, lent, scratch
from pergrad.graph.layout import Layout, along, reduce_to, smear
from pergrad.graph.ops import (
    Op,
    Result,
    Why,
    attribute,
    contracted,
    declare,
    or_why,
    owners,
    resized,
)
from pergrad.kernels import fused
from pergrad.ops.registry import Served, Situation, by_row, rule
from pergrad.ops.rows import in_order, partition, reduced
from pergrad.recording import is_recorded


def _wide(x: Tensor) -> Tensor:
    return x.to(result_dtype(x))


def _scale_and_shift(use: Situation, normalised: Tensor | None, shape: tuple[int, ...],
                     slots: tuple[int, int]) -> Served:  # fmt: skip
    """`shape` aligns the parameter with the input's dimensions."""
    g, layout = _wide(use.g), use.layout
    served: Served = {}
    for slot, values in ((slots[0], normalised), (slots[1], 1.0)):
        if slot in use.operands:
            assert values is not None
            factor = reduced(g * values if slot == slots[0] else g, layout, shape, use.batch)
            served[slot] = Dense(factor.values.reshape(use.batch, *use.operands[slot].shape))
    return served


declare(
    "native_layer_norm", needs=["normalized_shape", "input", "result1", "result2"], weights=True
)
declare("fused_rms_norm", needs=["normalized_shape", "input", "result1"], weights=True)
# Computed from parameters alone, as torch.nn.utils.parametrizations.weight_norm calls it.
declare("weight_norm_interface")


@owners("native_layer_norm", "fused_rms_norm")
def _layer_norm(op: Op, out: Layout) -> list[Result]:
    count = len(op.attr("normalized_shape"))
    rank = len(out.shape)
    data, *rest = op.in_shapes
    plain = smear(out, range(rank - count, rank))
    results: list[Result] = [None if data is None else resized(plain, data)]
    for shape in rest:
        results.append(None if shape is None else or_why(reduce_to(out, shape), Why.SHARED))
    return results


@rule("native_layer_norm")
def layer_norm(use: Situation) -> Served:
    """y = weight * (x - mean) * rstd + bias over the last dimensions."""
    shape = tuple(use.attr("normalized_shape"))
    normalised = None
    if 1 in use.operands:
        x = use.saved("input")
        mean, rstd = use.saved("result1"), use.saved("result2")
        if not use.tracing():
            summed = _by_position(use, x, mean, rstd, shape)
            if summed is not None:
                return summed
        x = _wide(x)
        dims = list(range(x.dim() - len(shape), x.dim()))
        if use.tracing():
            mean, rstd = _live_statistics(x, dims, rstd)
        normalised = (x - mean) * rstd
    return _scale_and_shift(use, normalised, shape, (1, 2))


def _worth_a_call(numbers: int) -> bool:
    """Whether an example is so long that torch's own kernel, called for it alone, is faster.

    It makes no temporaries. But a call costs something, and more when threads share the example.
    """
    return numbers >= (2**14 if torch.get_num_threads() == 1 else 2**17)


def _by_position(
    use: Situation, x: Tensor, mean: Tensor | None, rstd: Tensor, shape: tuple[int, ...]
) -> Served | None:
    """Scale and shift of layers with one mean and one deviation for each position.

    Σ_t rstd_t (x_t - mean_t) g_t, by torch's own kernel for long examples, else the sum over
    positions as a product of matrices: one temporary, cache-sized. None if the examples' positions
    do not lie in order.
    """
    count = x.dim() - len(shape)
    rows = partition(use.layout, tuple(range(count)), use.batch)
    size = prod(shape)
    if rows is None or not rows.foldable:
        return None
    positions = prod(x.shape[:count])
    g, x = (rows.fold(y.reshape(positions, size)) for y in (use.g, x))  # (B, T, size)
    rstd = rows.fold(rstd.reshape(positions, 1))
    mean = None if mean is None else rows.fold(mean.reshape(positions, 1))
    B, T, _ = g.shape
    dtype = result_dtype(x, g)
    found: dict[int, list[Tensor]] = {slot: [] for slot in use.operands if slot in (1, 2)}
    alike = x.is_cpu and x.dtype == g.dtype == dtype and not is_recorded()
    kernel = fused(x.device, dtype) if alike and B * T * size else None
    if kernel is not None and kernel.reads(g, x) and g.stride(2) == x.stride(2) == 1:
        centres = None if mean is None else mean.to(dtype).contiguous()
        sums = kernel.layer(g, x, centres, rstd.to(dtype).contiguous())
        return {k: Dense(sums[k - 1][0].view(B, *shape), sums[k - 1][1]) for k in found}
    if mean is not None and alike and _worth_a_call(T * size):
        like = x.new_empty(size)
        wanted = (False, 1 in found, 2 in found)
        for b in range(B):
            sums = torch.ops.aten.native_layer_norm_backward(
                g[b], x[b], (size,), mean[b], rstd[b], like, like, wanted
            )
            for slot, rows_ in found.items():
                rows_.append(sums[slot])
        return {slot: Dense(torch.stack(x).reshape(B, *shape)) for slot, x in found.items()}
    cut = chunks(B, T * size * dtype.itemsize, scratch(g.device))
    with lent(cut[0].stop * T * size if cut else 0, dtype, g.device) as room:
        for part in cut:
            here = g[part].to(dtype)
            if 1 in found:
                scaled = _centred(x[part], None if mean is None else mean[part], here, room)
                found[1].append(torch.bmm(rstd[part].to(dtype).mT, scaled)[:, 0])
            if 2 in found:
                found[2].append(here.sum(1))
    return {
        slot: Dense((torch.cat(x) if len(x) > 1 else x[0]).reshape(B, *shape))
        for slot, x in found.items()
    }


def _centred(x: Tensor, mean: Tensor | None, g: Tensor, room: Tensor) -> Tensor:
    """(x - mean) g, of g's shape, in the room given. x and its mean may be folded otherwise."""
    out = room[: x.numel()].view(x.shape)
    if mean is None:
        return torch.mul(x, g, out=out)
    torch.sub(x, mean, out=out)
    return out.view(g.shape).mul_(g)


def _live_statistics(x: Tensor, dims: list[int], rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1/std as functions of x: torch saves them as constants."""
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square().mean(dims, keepdim=True)
    epsilon = (rstd.detach().to(x.dtype) ** -2 - variance).detach()
    return mean, (variance + epsilon).rsqrt()


@rule("fused_rms_norm")
def rms_norm(use: Situation) -> Served:
    """y = weight * x * rrms over the last dimensions."""
    shape = tuple(use.attr("normalized_shape"))
    x, rrms = use.saved("input"), use.saved("result1")
    summed = None if use.tracing() else _by_position(use, x, None, rrms, shape)
    if summed is not None:
        return summed
    x = _wide(x)
    if use.tracing():
        dims = list(range(x.dim() - len(shape), x.dim()))
        square = x.square().mean(dims, keepdim=True)
        rrms = (square + (rrms.detach().to(x.dtype) ** -2 - square).detach()).rsqrt()
    return _scale_and_shift(use, x * rrms, shape, (1, -1))


def _per_channel(x: Tensor) -> tuple[int, ...]:
    return (x.shape[1], *[1] * (x.dim() - 2))


declare("native_group_norm", needs=["input", "result1", "result2", "group"], weights=True)


@owners("native_group_norm")
def _group_norm(op: Op, out: Layout) -> list[Result]:
    data, *rest = op.in_shapes
    plain = smear(out, range(1, len(out.shape)))
    return [None if data is None else resized(plain, data), *contracted(rest)]


@rule("native_group_norm")
def group_norm(use: Situation) -> Served:
    """Statistics per example and group of channels; scale and shift per channel."""
    g = use.g
    normalised = None
    if 1 in use.operands:
        x = use.saved("input")
        mean, rstd = use.saved("result1")[..., None], use.saved("result2")[..., None]
        if not use.tracing() and use.layout.varying == (0,) and in_order(use.layout, use.batch):
            return _by_channel(use, x, mean, rstd)
        x = _wide(x)
        folded = x.reshape(x.shape[0], use.attr("group"), -1)
        if use.tracing():
            mean, rstd = _live_statistics(folded, [2], rstd)
        normalised = ((folded - mean) * rstd).reshape(x.shape)
    return _scale_and_shift(use, normalised, _per_channel(g), (1, 2))


@by_row("native_layer_norm", "native_group_norm")
def _rows_and_statistics(use: Situation) -> tuple[str, ...] | None:
    if use.name == "native_layer_norm" and use.g.dim() == len(use.attr("normalized_shape")):
        return None  # one row, of which the first dimension is a part
    return ("input", "result1", "result2") if 1 in use.operands else ()


def _by_channel(use: Situation, x: Tensor, mean: Tensor, rstd: Tensor) -> Served:
    """Scale and shift of a group norm: rstd Σ_s (x_s - mean) g_s, over the pixels of a channel.

    By torch's own kernel, to which the channels of all examples are those of one, so that it sums
    over no example; else in one temporary, cache-sized.
    """
    g = use.g
    B, C = g.shape[:2]
    N = mean.shape[1]
    dtype = result_dtype(x, g)
    alike = x.is_cpu and x.dtype == g.dtype == dtype and not is_recorded()
    if alike and x.is_contiguous() and g.is_contiguous():
        sums = torch.ops.aten.native_group_norm_backward.default(
            g.view(1, B * C, -1), x.view(1, B * C, -1), mean.reshape(1, -1), rstd.reshape(1, -1),
            x.new_empty(B * C), 1, B * C, g[0, 0].numel(), B * N, (False, True, True),
        )  # fmt: skip
        return {k: Dense(sums[k].view(B, C)) for k in use.operands if k in (1, 2)}
    found: dict[int, list[Tensor]] = {slot: [] for slot in use.operands if slot in (1, 2)}
    each = g[0].numel()
    cut = chunks(B, each * dtype.itemsize, scratch(g.device))
    with lent(cut[0].stop * each if cut else 0, dtype, g.device) as room:
        for part in cut:
            here = g[part].to(dtype).reshape(-1, C, each // C)
            if 1 in found:
                folded = x[part].reshape(len(here), N, -1)
                scaled = _centred(folded, mean[part], here, room)
                sums = scaled.sum(2).view(-1, N, C // N)
                found[1].append(sums.mul_(rstd[part]).view(-1, C))
            if 2 in found:
                found[2].append(here.sum(2))
    return {slot: Dense(torch.cat(rows)) for slot, rows in found.items()}


_BATCH_NORM = (
    "native_batch_norm", "native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm",
    "native_batch_norm_legit_no_training", "batch_norm_with_update", "batch_norm_no_update",
)  # fmt: skip
_FIELDS = ("input", "weight", "eps", "result1", "result2", "running_mean", "running_var")
declare(*_BATCH_NORM[-3:], needs=_FIELDS, weights=True)
declare(*_BATCH_NORM[:-3], needs=(*_FIELDS, "training"), weights=True)

# What these do is in their names.
_TRAINING = {"native_batch_norm_legit_no_training": False, "batch_norm_no_update": False,
             "batch_norm_with_update": True}  # fmt: skip


def in_training(name: str, node: Any) -> bool:
    """Whether a batch norm takes its statistics from the batch."""
    known = _TRAINING.get(name)
    return attribute(name, node, "training") if known is None else known


def _in_training(op: Op | Situation) -> bool:
    return in_training(op.name, op.node)


@owners(*_BATCH_NORM)
def _batch_norm(op: Op, out: Layout) -> list[Result]:
    data, *rest = op.in_shapes
    training = _in_training(op)
    others = [d for d in range(len(out.shape)) if d != 1]
    channel = smear(out, others)  # instance norm is a batch norm over (1, B*C, ...)
    first: Result = None
    if data is not None:
        first = or_why(channel, Why.MIXING) if training else resized(out, data)
    results = [first]
    for shape in rest:
        if shape is None:
            results.append(None)
        elif channel is None:
            results.append(Why.SHARED)
        else:
            dims = [d for d in range(len(out.shape)) if d != 1]
            results.append(along(shape, 0, channel.owner.amax(dims).expand(shape)))
    return results


@rule(*_BATCH_NORM)
def batch_norm(use: Situation) -> Served:
    """Running statistics in eval mode, the batch's in training mode: constants at this node."""
    g = use.g
    normalised = None
    if 1 in use.operands:
        x = _wide(use.saved("input"))
        shape = _per_channel(g)
        training = _in_training(use)
        eps = use.attr("eps")
        if training:
            mean, rstd = use.saved("result1"), use.saved("result2")
            if use.tracing():
                dims = [d for d in range(x.dim()) if d != 1]
                live_mean, live = _live_statistics(x, dims, rstd.reshape(shape))
                normalised = (x - live_mean) * live
        else:
            mean = use.saved("running_mean")
            rstd = (_wide(use.saved("running_var")) + eps).rsqrt()
        if normalised is None:
            normalised = (x - _wide(mean).reshape(shape)) * _wide(rstd).reshape(shape)
    return _scale_and_shift(use, normalised, _per_channel(g), (1, 2))


@by_row(*_BATCH_NORM)
def _images(use: Situation) -> tuple[str, ...] | None:
    if _in_training(use):
        return None
    return ("input",) if 1 in use.operands else ()
