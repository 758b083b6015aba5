"""Ops' backward passes that are ops of the graph themselves: gradient penalties, forces, scores.

Owns: how ownership moves through them; the factors of kernels and scales that a gradient with
respect to the data has gone through.
Does not know: the ops whose backward passes they are.

Such a node returns the gradients of all of an op's inputs. Rules and owners serve the one of its
data. The gradient of a weight, itself a sum over examples, is differentiated again only where
tasks have steps of their own.
"""

import re

from torch import Tensor

from pergrad.factors import Dense
from pergrad.factors.numeric import result_dtype
from pergrad.graph import nodes
from pergrad.graph.layout import Layout, along, compressed, merge, reduce_to, smear
from pergrad.graph.ops import (
    Op,
    Reads,
    Result,
    Why,
    declare,
    or_why,
    owners,
    owners_of_all,
    positive,
    resized,
    unknown,
)
from pergrad.ops.convolution import kernel_factor
from pergrad.ops.registry import Served, Situation, rule
from pergrad.ops.rows import partition, reduced

# --- By element -----------------------------------------------------------------------------------

_BY_ELEMENT = tuple(f"{name}_backward" for name in """
binary_cross_entropy elu gelu hardshrink hardswish hardtanh huber_loss leaky_relu log_sigmoid
mse_loss native_dropout rrelu_with_noise sigmoid smooth_l1_loss soft_margin_loss softplus
softshrink tanh threshold
""".split())  # fmt: skip
declare(*_BY_ELEMENT, "prelu_kernel_backward", reads=Reads.LARGER)


@owners_of_all(*_BY_ELEMENT, "prelu_kernel_backward")
def _by_element(op: Op, outs: list[Layout | None]) -> list[Result]:
    out = _together(outs)
    if out is None:
        return unknown(op)
    return [
        None if shape is None else or_why(reduce_to(out, shape), Why.SHARED)
        for shape in op.in_shapes
    ]


def _together(outs: list[Layout | None]) -> Layout | None:
    """The owners at all outputs, of one shape, as one map; None where they disagree."""
    used = [out for out in outs if out is not None]
    total: Layout | None = used[0]
    for out in used[1:]:
        if total is not None:
            total = merge(total, out) if out.shape == total.shape else None
    return total


@rule(*_BY_ELEMENT, "prelu_kernel_backward", calls_node=True)
def by_element(use: Situation) -> Served:
    """The node's own backward before torch's engine sums the broadcast away."""
    out = _together(list(use.layouts))
    if out is None:
        return {}
    results = nodes.raw_call(use.node, use.cotangents)
    served: Served = {}
    for slot, operand in use.operands.items():
        values = results[slot]
        if values is not None and tuple(values.shape) == out.shape:
            served[slot] = reduced(values, out, operand.shape, use.batch)
    return served


# --- Along a dimension ----------------------------------------------------------------------------

_ALONG_ONE = ("softmax_backward_data", "log_softmax_backward_data", "glu_backward")
declare(*_ALONG_ONE, needs=["dim"])


@owners(*_ALONG_ONE)
def _along_one(op: Op, out: Layout) -> list[Result]:
    if not out.shape:
        return [None if shape is None else out for shape in op.in_shapes]
    plain = smear(out, [positive(op.attr("dim"), len(out.shape))])
    return [None if shape is None else resized(plain, shape) for shape in op.in_shapes]


_OF_CLASSES = ("nll_loss_backward", "nll_loss2d_backward")
declare(*_OF_CLASSES)


@owners(*_OF_CLASSES)
def _loss_of_classes(op: Op, out: Layout) -> list[Result]:
    """From a gradient of logarithms (N, C, ...) to one of losses (N, ...), or of their sum."""
    plain = smear(out, [1]) if len(out.shape) > 1 else None
    results: list[Result] = []
    for shape in op.in_shapes:
        if shape is None or plain is None:
            results.append(None if shape is None else Why.UNKNOWN)
        elif len(shape) == len(out.shape):
            results.append(out)
        else:
            losses = Layout((out.shape[0], *out.shape[2:]), plain.owner.squeeze(1))
            results.append(or_why(reduce_to(losses, shape), Why.SHARED))
    return results


# --- Images ---------------------------------------------------------------------------------------

_SPATIAL = tuple(f"{name}_backward" for name in """
avg_pool2d avg_pool3d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d
adaptive_max_pool3d max_pool2d max_pool2d_with_indices max_pool3d_with_indices
fractional_max_pool2d fractional_max_pool3d
reflection_pad1d reflection_pad2d reflection_pad3d
replication_pad1d replication_pad2d replication_pad3d
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_nearest_exact1d
upsample_nearest_exact2d upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
upsample_bilinear2d_aa upsample_bicubic2d upsample_bicubic2d_aa upsample_trilinear3d
upsample_lanczos2d_aa
""".split())  # fmt: skip
declare(*_SPATIAL)


@owners(*_SPATIAL)
def _spatial(op: Op, out: Layout) -> list[Result]:
    found = re.search(r"([123])d", op.name)
    assert found is not None
    rank = len(out.shape)
    plain = smear(out, range(rank - int(found[1]), rank))
    return [None if shape is None else resized(plain, shape) for shape in op.in_shapes]


_GRIDS = (
    "grid_sampler2d_backward", "grid_sampler3d_backward", "grid_sampler2d_cpu_fallback_backward",
    "cudnn_grid_sampler_backward",
)  # fmt: skip
declare(*_GRIDS)


@owners_of_all(*_GRIDS)
def _grids(op: Op, outs: list[Layout | None]) -> list[Result]:
    """Images and grids lie along the first dimension of every input and output."""
    images = [None if out is None else smear(out, range(1, len(out.shape))) for out in outs]
    if any(out is not None and image is None for out, image in zip(outs, images, strict=True)):
        return unknown(op)
    firsts = [along((image.shape[0],), 0, image.owner.reshape(-1).expand(image.shape[0]))
              for image in images if image is not None]  # fmt: skip
    total = _together(list(firsts))
    if total is None:
        return unknown(op)
    return [
        None if shape is None else along(shape, 0, total.owner.expand(shape[0]))
        for shape in op.in_shapes
    ]


# --- Parts of a tensor, put back into zeros -------------------------------------------------------

declare("select_backward", needs=["dim", "index"])
declare("slice_backward", needs=["dim", "start", "end", "step"])
declare("unfold_backward", needs=["dim", "size", "step"])
declare("diagonal_backward", needs=["dim1", "dim2", "offset"])


@owners("select_backward")
def _select(op: Op, out: Layout) -> list[Result]:
    dim = positive(op.attr("dim"), len(out.shape))
    at = positive(op.attr("index"), out.shape[dim]) if out.owner.shape[dim] > 1 else 0
    return _cut(op, out.owner.select(dim, at))


@owners("slice_backward")
def _slice(op: Op, out: Layout) -> list[Result]:
    dim = positive(op.attr("dim"), len(out.shape))
    part = slice(op.attr("start"), op.attr("end"), op.attr("step"))
    owner = out.owner
    return _cut(op, owner[(slice(None),) * dim + (part,)] if owner.shape[dim] > 1 else owner)


@owners("diagonal_backward")
def _diagonal(op: Op, out: Layout) -> list[Result]:
    one, two = op.attr("dim1"), op.attr("dim2")
    wide = list(out.owner.shape)
    for dim in (one, two):
        wide[dim] = out.shape[dim]
    return _cut(op, out.owner.expand(wide).diagonal(op.attr("offset"), one, two))


@owners("unfold_backward")
def _unfold(op: Op, out: Layout) -> list[Result]:
    dim = positive(op.attr("dim"), len(out.shape))
    owner = out.owner
    if owner.shape[dim] == 1:
        return _cut(op, owner.unsqueeze(-1))
    return _cut(op, owner.unfold(dim, op.attr("size"), op.attr("step")))


def _cut(op: Op, owner: Tensor) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    return [compressed(shape, owner)]


# --- Convolutions ---------------------------------------------------------------------------------

_FIELDS = ("grad_output", "stride", "padding", "dilation", "transposed", "groups")
_OTHER_CONVOLUTIONS = ("convolution_backward_overrideable", "slow_conv2d_backward")
declare("convolution_backward", needs=_FIELDS, reads=Reads.MISSING, weights=True)
declare(*_OTHER_CONVOLUTIONS, reads=Reads.MISSING, weights=True)


@owners("convolution_backward", *_OTHER_CONVOLUTIONS)
def _convolution(op: Op, out: Layout) -> list[Result]:
    """Of the gradient of its input, which does not depend on the input itself."""
    plain = smear(out, range(1, len(out.shape)))
    results: list[Result] = []
    for slot, shape in enumerate(op.in_shapes):
        if shape is None:
            results.append(None)
        elif slot == 2:
            results.append(Why.CONTRACTED)
        else:
            results.append(resized(plain, shape))
    return results


@rule("convolution_backward")
def convolution(use: Situation) -> Served:
    """grad_input = conv(grad_output, kernel), transposed: what meets in the kernel is the
    cotangent, in the place of the convolution's input, and grad_output.
    """
    u = _of_data(use)
    if u is None or list(use.operands) != [2]:
        return {}
    rows = partition(use.layout, (0,), use.batch)
    if rows is None:
        return {}
    return {2: kernel_factor(use, use.saved("grad_output"), u, rows)}


# --- Normalisation --------------------------------------------------------------------------------

declare(
    "native_layer_norm_backward",
    needs=["grad_out", "input", "mean", "rstd", "normalized_shape"],
    weights=True,
)
_SCALE_OF_LAYER, _SHIFT_OF_LAYER, _SCALE_OF_BATCH = 4, 5, 2  # among the inputs


@owners("native_layer_norm_backward")
def _layer_norm(op: Op, out: Layout) -> list[Result]:
    rank = len(out.shape)
    plain = smear(out, range(rank - len(op.attr("normalized_shape")), rank))
    results: list[Result] = []
    for slot, shape in enumerate(op.in_shapes):
        if shape is None or plain is None:
            results.append(None if shape is None else Why.UNKNOWN)
        elif slot < _SCALE_OF_LAYER:
            results.append(resized(plain, shape))
        else:
            results.append(or_why(reduce_to(plain, shape), Why.SHARED))
    return results


@rule("native_layer_norm_backward")
def layer_norm(use: Situation) -> Served:
    """grad_input = P(weight * grad_out), P a symmetric map at each position: P(cotangent) meets
    grad_out in the scale.
    """
    u = _of_data(use)
    if u is None or not set(use.operands) <= {_SCALE_OF_LAYER, _SHIFT_OF_LAYER}:
        return {}
    served: Served = dict.fromkeys(use.operands)  # nothing depends on the shift
    if _SCALE_OF_LAYER not in served:
        return served
    shape = tuple(use.attr("normalized_shape"))
    dims = list(range(u.dim() - len(shape), u.dim()))
    u, x, g = _wide(u), _wide(use.saved("input")), _wide(use.saved("grad_out"))
    # Differentiated again, torch takes these two for constants at this node; so do we, for the
    # derivatives of a loop's numbers are the ones that were asked for.
    rstd = use.saved("rstd")
    normalised = (x - use.saved("mean")) * rstd
    along_it = (u * normalised).mean(dims, keepdim=True)
    projected = (u - u.mean(dims, keepdim=True) - normalised * along_it) * rstd
    factor = reduced(projected * g, use.layout, shape, use.batch)
    served[_SCALE_OF_LAYER] = Dense(factor.values.reshape(use.batch, *shape))
    return served


def _of_data(use: Situation) -> Tensor | None:
    """The cotangent of the gradient of the op's data, if it is the only one."""
    return use.cotangents[0] if all(g is None for g in use.cotangents[1:]) else None


def _wide(x: Tensor) -> Tensor:
    return x.to(result_dtype(x))


_FLAG = {"native_batch_norm_backward": "train", "batch_norm_backward": "update"}
_BATCH_NORM = (*_FLAG, "cudnn_batch_norm_backward", "miopen_batch_norm_backward")
for _name in _BATCH_NORM:
    _fields = ("grad_out", "running_var", "eps", _FLAG[_name]) if _name in _FLAG else ()
    declare(_name, needs=_fields, weights=True)


@owners(*_BATCH_NORM)
def _batch_norm(op: Op, out: Layout) -> list[Result]:
    training = op.attr(_FLAG[op.name]) if op.name in _FLAG else True
    dims = [d for d in range(len(out.shape)) if d != 1]
    channel = smear(out, dims)  # instance norm is a batch norm over (1, B*C, ...)
    results: list[Result] = []
    for slot, shape in enumerate(op.in_shapes):
        if shape is None:
            results.append(None)
        elif slot < _SCALE_OF_BATCH:
            results.append(or_why(channel, Why.MIXING) if training else out)
        elif channel is None:
            results.append(Why.SHARED)
        else:
            results.append(along(shape, 0, channel.owner.amax(dims).expand(shape)))
    return results


@rule("native_batch_norm_backward", "batch_norm_backward")
def batch_norm(use: Situation) -> Served:
    """In eval mode grad_input = weight * grad_out / running deviation."""
    u = _of_data(use)
    if u is None or list(use.operands) != [_SCALE_OF_BATCH] or use.attr(_FLAG[use.name]):
        return {}
    shape = (u.shape[1], *[1] * (u.dim() - 2))
    rstd = (_wide(use.saved("running_var")) + use.attr("eps")).rsqrt().reshape(shape)
    factor = reduced(_wide(u) * use.saved("grad_out") * rstd, use.layout, shape, use.batch)
    return {_SCALE_OF_BATCH: Dense(factor.values.reshape(use.batch, u.shape[1]))}
