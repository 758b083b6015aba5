"""How ownership moves from an op's output to its inputs, op family by op family.

Owns: one transfer function per family of ops: given the owners of the cotangent at the output,
the owners of the gradient at each input, by the op's structure alone, whatever the numbers are.
Does not know: parameters' names, rules, factors. Reads data only where an index tensor decides.

A function returns, for every input, a `Layout`, or why there is none:
  SHARED      the gradient is a sum over examples because the input lacks the example dimension
  CONTRACTED  the gradient is a sum over examples by a contraction (the weight of a matmul)
  MIXING      the op makes examples interact whatever the data is
  UNKNOWN     the structure does not tell; the layout has to be measured
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import prod
from typing import Any

import torch
from torch import Tensor

from pergrad.graph import nodes
from pergrad.graph.layout import (
    NOBODY,
    Layout,
    along,
    compressed,
    constant,
    permute,
    reduce_to,
    reshape,
    smear,
)


class Why(Enum):
    """Why an input's gradient has no layout."""

    SHARED = "shared"
    CONTRACTED = "contracted"
    MIXING = "mixing"
    UNKNOWN = "unknown"


Result = Layout | Why | None
Shape = tuple[int, ...]


@dataclass(slots=True)
class Op:
    """One node as a transfer function sees it."""

    node: Any
    name: str
    out_shapes: list[Shape]
    in_shapes: list[Shape | None]  # None: the input needs no gradient
    parameter: list[bool]  # whether an input depends on the requested parameters alone
    read_data: bool = field(default=False)

    def attr(self, name: str) -> Any:
        return nodes.attribute(self.node, name)

    def data(self, name: str) -> Any:
        """A saved index tensor: what follows holds for this batch only."""
        self.read_data = True
        return nodes.saved(self.node, name)


Transfer = Callable[[Op, Layout], list[Result]]
_TRANSFERS: dict[str, Transfer] = {}
_MULTI: dict[str, Callable[[Op, list[Layout | None]], list[Result]]] = {}


def transfer(op: Op, outs: list[Layout | None]) -> list[Result]:
    """Owners of the gradient at each input of `op`, from those of the cotangents at its outputs."""
    if all(shape is None for shape in op.in_shapes):
        return [None] * len(op.in_shapes)  # a requested tensor that was computed from others
    used = [out for out in outs if out is not None]
    constants = {int(out.owner) for out in used if out.is_constant}
    if len(constants) == 1 and all(out.is_constant for out in used):
        # One example owns every cotangent: linearity alone says that it owns every gradient.
        # Weights stop here all the same, so that their rule serves them.
        stop = op.name in _WITH_WEIGHTS
        (example,) = constants
        return [
            None if s is None else Why.SHARED if stop and p else constant(s, example)
            for s, p in zip(op.in_shapes, op.parameter, strict=True)
        ]
    multi = _MULTI.get(op.name)
    if multi is not None:
        return multi(op, outs)
    single = _TRANSFERS.get(op.name)
    if single is None or outs[0] is None or len(used) > 1:
        return unknown(op)
    return single(op, outs[0])


def understands(name: str) -> bool:
    """Whether the op's structure is known here."""
    return name in _TRANSFERS or name in _MULTI


def unknown(op: Op) -> list[Result]:
    """No statement about any input."""
    return [None if s is None else Why.UNKNOWN for s in op.in_shapes]


def _register(*names: str) -> Callable[[Transfer], Transfer]:
    def add(function: Transfer) -> Transfer:
        for name in names:
            _TRANSFERS[name] = function
        return function

    return add


def _or(layout: Layout | None, why: Why) -> Result:
    return why if layout is None else layout


def _wrap(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _fits(layout: Layout, shape: Sequence[int]) -> bool:
    """Whether the map makes sense for a tensor of `shape`."""
    return len(layout.owner.shape) == len(shape) and all(
        o in (1, s) for o, s in zip(layout.owner.shape, shape, strict=True)
    )


def _as(layout: Layout | None, shape: Sequence[int], why: Why = Why.UNKNOWN) -> Result:
    """The same map on a tensor of another size along the dimensions that do not vary."""
    if layout is None or not _fits(layout, shape):
        return why
    return Layout(tuple(shape), layout.owner)


# --- Elementwise, with broadcasting -------------------------------------------------------------

ELEMENTWISE = """
abs acos acosh add addcdiv addcmul alias angle asin asinh atan atan2 atanh binary_cross_entropy
binary_cross_entropy_with_logits celu clamp clamp_max clamp_min clone conj conj_physical copysign
cos cosh deg2_rad rad2_deg digamma div elu erf erfc erfinv exp exp2 expm1 fmax fmin fmod frac gelu
hardshrink hardsigmoid hardswish hardtanh huber_loss hypot i0 kl_div leaky_relu lerp lgamma lift
lift_fresh log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logit masked_fill maximum
minimum mish mse_loss mul nan_to_num neg neg_view pow prelu_kernel reciprocal relu
remainder rrelu_with_noise rsqrt rsub sgn sigmoid silu sin sinc sinh smooth_l1_loss
soft_margin_loss softplus softshrink special_entr special_erfcx special_i0e special_i1e special_i1
special_log_ndtr special_ndtri special_xlog1py special_xlog1_py sqrt sub tan tanh threshold
to_copy tril triu trunc where xlogy native_dropout fused_dropout complex real imag polar fill
lazy_clone pin_memory
""".split()


@_register(*ELEMENTWISE)
def _elementwise(op: Op, out: Layout) -> list[Result]:
    results: list[Result] = []
    for shape in op.in_shapes:
        if shape is None:
            results.append(None)
        elif len(shape) > len(out.shape):
            results.append(Why.UNKNOWN)
        else:
            results.append(_or(reduce_to(out, shape), Why.SHARED))
    return results


# --- Views ---------------------------------------------------------------------------------------


@_register(
    "view", "unsafe_view", "reshape_alias", "reshape_copy", "squeeze", "unsqueeze", "flatten",
    "mkldnn_reshape",
)  # fmt: skip
def _view(op: Op, out: Layout) -> list[Result]:
    return [None if s is None else reshape(out, s) for s in op.in_shapes]


@_register("permute")
def _permute(op: Op, out: Layout) -> list[Result]:
    dims = [_wrap(d, len(out.shape)) for d in op.attr("dims")]
    inverse = [dims.index(d) for d in range(len(dims))]
    return [permute(out, inverse)]


@_register("transpose", "t")
def _transpose(op: Op, out: Layout) -> list[Result]:
    rank = len(out.shape)
    if rank < 2:
        return [out]
    a, b = (0, 1) if op.name == "t" else (op.attr("dim0"), op.attr("dim1"))
    dims = list(range(rank))
    a, b = _wrap(a, rank), _wrap(b, rank)
    dims[a], dims[b] = dims[b], dims[a]
    return [permute(out, dims)]


@_register("expand")
def _expand(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    return [_or(reduce_to(out, shape), Why.SHARED)]


@_register("repeat")
def _repeat(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    lead = len(out.shape) - len(shape)
    folded: list[int] = list(out.shape[:lead])
    drop = list(range(lead))
    for size, total in zip(shape, out.shape[lead:], strict=True):
        drop.append(len(folded))
        folded += [total // size if size else 1, size]
    layout = reduce_to(
        reshape(out, folded), [1 if d in drop else size for d, size in enumerate(folded)]
    )
    return [Why.SHARED if layout is None else reshape(layout, shape)]


def _along_dim(owner: Tensor, dim: int, size: int, index: Any) -> Tensor:
    """A map with NOBODY along `dim` but where `index` puts `owner`."""
    shape = list(owner.shape)
    shape[dim] = size
    full = torch.full(shape, NOBODY, dtype=torch.int64, device="cpu")
    full[(slice(None),) * dim + (index,)] = owner
    return full


@_register("select")
def _select(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    dim = _wrap(op.attr("dim"), len(shape))
    index = _wrap(op.attr("index"), shape[dim])
    return [compressed(shape, _along_dim(out.owner.unsqueeze(dim), dim, shape[dim],
                                         slice(index, index + 1)))]  # fmt: skip


@_register("slice", "narrow_copy")
def _slice(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    dim = _wrap(op.attr("dim"), len(shape))
    start = op.attr("start") or 0
    if op.name == "slice":
        end, step = op.attr("end"), op.attr("step")
    else:
        end, step = start + op.attr("length"), 1
    if out.owner.shape[dim] == 1 and 2 * out.shape[dim] >= shape[dim]:
        # Claiming the few rows that get no gradient keeps the layout regular, hence fast.
        return [Layout(shape, out.owner)]
    index = slice(*slice(start, end, step).indices(shape[dim]))
    return [compressed(shape, _along_dim(out.owner, dim, shape[dim], index))]


@_register("flip")
def _flip(op: Op, out: Layout) -> list[Result]:
    dims = [_wrap(d, len(out.shape)) for d in op.attr("dims")]
    return [Layout(out.shape, out.owner.flip([d for d in dims if out.owner.shape[d] > 1]))]


@_register("roll")
def _roll(op: Op, out: Layout) -> list[Result]:
    dims, shifts = op.attr("dims"), op.attr("shifts")
    if not dims:
        flat = Layout((out.owner.numel(),), out.owner.reshape(-1))
        if flat.is_constant:
            return [out]
        return [Why.UNKNOWN]
    owner = out.owner
    for dim, shift in zip(dims, shifts, strict=True):
        if owner.shape[dim] > 1:
            owner = owner.roll(-shift, dim)
    return [Layout(out.shape, owner)]


@_register("diagonal")
def _diagonal(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    one, two = _wrap(op.attr("dim1"), len(shape)), _wrap(op.attr("dim2"), len(shape))
    rest = [d for d in range(len(shape)) if d not in (one, two)]
    sizes = [1] * len(shape)
    sizes[one], sizes[two] = shape[one], shape[two]
    for position, d in enumerate(rest):
        sizes[d] = out.owner.shape[position]
    full = torch.full(sizes, NOBODY, dtype=torch.int64, device="cpu")
    full.diagonal(op.attr("offset"), one, two).copy_(out.owner)
    return [compressed(shape, full)]


@_register("unfold")
def _unfold(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    dim = _wrap(op.attr("dimension"), len(shape))
    plain = smear(out, [dim, len(out.shape) - 1])
    return [Why.UNKNOWN if plain is None else Layout(shape, plain.owner.squeeze(-1))]


@_register("constant_pad_nd")
def _pad(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    owner, pad = out.owner, op.attr("pad")
    for i in range(len(pad) // 2):
        dim, before, after = len(shape) - 1 - i, pad[2 * i], pad[2 * i + 1]
        if owner.shape[dim] > 1:
            if before < 0 or after < 0:
                return [Why.UNKNOWN]
            owner = owner.narrow(dim, before, shape[dim])
    return [compressed(shape, owner)]


@_register("view_as_real", "view_as_complex")
def _complex_view(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    if op.name == "view_as_real":
        plain = smear(out, [len(out.shape) - 1])
        return [Why.UNKNOWN if plain is None else Layout(shape, plain.owner.squeeze(-1))]
    return [Layout(shape, out.owner.unsqueeze(-1))]


# --- Joining and cutting -------------------------------------------------------------------------


@_register("cat")
def _cat(op: Op, out: Layout) -> list[Result]:
    dim = _wrap(op.attr("dim"), len(out.shape))
    if out.owner.shape[dim] == 1:
        return [None if s is None else _as(out, s) for s in op.in_shapes]
    rank = len(out.shape)  # torch still lets an empty vector be joined to anything
    sizes = [None if s is None else s[dim] if len(s) == rank else 0 for s in op.in_shapes]
    starts: list[int | None] = [None] * len(sizes)
    position: int | None = 0
    for i, size in enumerate(sizes):
        starts[i] = position
        position = None if position is None or size is None else position + size
    position = out.shape[dim]  # pieces without gradient have no known size: count from the end too
    for i in range(len(sizes) - 1, -1, -1):
        size = sizes[i]
        position = None if position is None or size is None else position - size
        if starts[i] is None:
            starts[i] = position
    results: list[Result] = []
    for shape, start in zip(op.in_shapes, starts, strict=True):
        if shape is None:
            results.append(None)
        elif len(shape) != rank:
            results.append(constant(shape, NOBODY))
        elif start is None:
            results.append(Why.UNKNOWN)
        else:
            results.append(compressed(shape, out.owner.narrow(dim, start, shape[dim])))
    return results


@_register("stack")
def _stack(op: Op, out: Layout) -> list[Result]:
    dim = _wrap(op.attr("dim"), len(out.shape))
    results: list[Result] = []
    for i, shape in enumerate(op.in_shapes):
        if shape is None:
            results.append(None)
        else:
            at = i if out.owner.shape[dim] > 1 else 0
            results.append(compressed(shape, out.owner.select(dim, at)))
    return results


def _cut(op: Op, outs: list[Layout | None]) -> list[Result]:
    """split, chunk, unbind: the pieces laid end to end."""
    shape = op.in_shapes[0]
    assert shape is not None
    dim = _wrap(op.attr("dim"), len(shape))
    pieces: list[Tensor] = []
    for out, out_shape in zip(outs, op.out_shapes, strict=True):
        size = 1 if op.name == "unbind" else out_shape[dim]
        if out is None:
            owner = torch.full([1] * len(shape), NOBODY, dtype=torch.int64, device="cpu")
        else:
            owner = out.owner.unsqueeze(dim) if op.name == "unbind" else out.owner
        target = list(owner.shape)
        target[dim] = size
        pieces.append(owner.expand(target))
    common = [max(p.shape[d] for p in pieces) for d in range(len(shape))]
    wide = []
    for piece in pieces:
        target = list(common)
        target[dim] = piece.shape[dim]
        wide.append(piece.expand(target))
    return [compressed(shape, torch.cat(wide, dim))]


for _name in ("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unbind"):
    _MULTI[_name] = _cut


def _sink(op: Op, outs: list[Layout | None]) -> list[Result]:
    """What distributed wrappers put around a module's inputs or outputs: the identity of each."""
    return list(outs) if len(outs) == len(op.in_shapes) else unknown(op)


_MULTI["_DDPSink"] = _sink
_MULTI["RegisterPostBackwardFunction"] = _sink  # of fully_shard


# --- Reductions ----------------------------------------------------------------------------------


_OF_ALL = {"sum", "mean", "prod", "max", "min", "median", "norm", "trace"}


@_register(
    "sum_dim", "mean_dim", "nansum", "logsumexp", "amax", "amin", "norm_dim", "prod_dim",
    "linalg_vector_norm", "var", "std", "max_dim", "min_dim", "median_dim", "nanmedian_dim",
    "kthvalue", "mode", *_OF_ALL,
)  # fmt: skip
def _reduction(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    dims = None if op.name in _OF_ALL else op.attr("dim")
    dims = [] if dims is None else list(dims) if isinstance(dims, tuple) else [dims]
    dims = sorted(_wrap(d, len(shape)) for d in dims) or list(range(len(shape)))
    owner = out.owner
    if len(out.shape) != len(shape):
        for dim in dims:
            owner = owner.unsqueeze(dim)
    if owner.dim() != len(shape):
        return [Why.UNKNOWN]
    return [Layout(shape, owner)]


def _two_reductions(op: Op, outs: list[Layout | None]) -> list[Result]:
    """var_mean, std_mean, aminmax: both outputs reduce the same dimensions."""
    used = [out for out in outs if out is not None]
    if len(used) == 2 and not used[0].same(used[1]):
        return unknown(op)
    return _reduction(op, used[0])


for _name in ("var_mean", "std_mean", "aminmax"):
    _MULTI[_name] = _two_reductions


# --- Along one dimension -------------------------------------------------------------------------


@_register(
    "softmax", "log_softmax", "safe_softmax", "masked_softmax", "cumsum", "cumprod",
    "logcumsumexp", "cummax", "cummin", "sort", "topk", "glu",
)  # fmt: skip
def _along_one(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    if not shape:
        return [out]
    dim = op.attr("dim")
    plain = smear(out, [_wrap(-1 if dim is None else dim, len(shape))])  # None: masked_softmax
    return [_as(plain, shape)]


@_register("fft_c2_c", "fft_c2_r", "fft_r2_c", "fft_c2c", "fft_c2r", "fft_r2c")
def _fft(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    dims = op.attr("dim")
    plain = smear(out, [_wrap(d, len(shape)) for d in dims])
    return [_as(plain, shape)]


# --- Matrix products -----------------------------------------------------------------------------


def _matrix_product(out: Layout, one: Shape | None, two: Shape | None) -> list[Result]:
    """(..., n, k) @ (..., k, m), batch dimensions equal."""
    rank = len(out.shape)
    left = None if one is None else _as(smear(out, [rank - 1]), one, Why.CONTRACTED)
    right = None if two is None else _as(smear(out, [rank - 2]), two, Why.CONTRACTED)
    return [left, right]


@_register("mm", "bmm")
def _mm(op: Op, out: Layout) -> list[Result]:
    return _matrix_product(out, op.in_shapes[0], op.in_shapes[1])


@_register("addmm", "baddbmm")
def _addmm(op: Op, out: Layout) -> list[Result]:
    bias = op.in_shapes[0]
    first = None if bias is None else _or(reduce_to(out, bias), Why.SHARED)
    return [first, *_matrix_product(out, op.in_shapes[1], op.in_shapes[2])]


@_register("mv")
def _mv(op: Op, out: Layout) -> list[Result]:
    wide = Layout((*out.shape, 1), out.owner.unsqueeze(1))
    matrix, vector = op.in_shapes
    left = None if matrix is None else _as(wide, matrix)
    return [left, None if vector is None else Why.CONTRACTED]


@_register("addmv")
def _addmv(op: Op, out: Layout) -> list[Result]:
    bias = op.in_shapes[0]
    first = None if bias is None else _or(reduce_to(out, bias), Why.SHARED)
    rest = Op(op.node, "mv", op.out_shapes, op.in_shapes[1:], op.parameter[1:])
    return [first, *_mv(rest, out)]


@_register("addr")
def _addr(op: Op, out: Layout) -> list[Result]:
    bias, one, two = op.in_shapes
    column, row = smear(out, [1]), smear(out, [0])
    return [
        None if bias is None else _or(reduce_to(out, bias), Why.SHARED),
        None if one is None else _or(column and Layout(one, column.owner[:, 0]), Why.CONTRACTED),
        None if two is None else _or(row and Layout(two, row.owner[0]), Why.CONTRACTED),
    ]


@_register("grouped_mm")
def _grouped_mm(op: Op, out: Layout) -> list[Result]:
    one, two = op.in_shapes[:2]
    left: Result = None
    if one is not None:
        left = _as(smear(out, [len(out.shape) - 1]), one) if len(one) == 2 else Why.UNKNOWN
    return [left, None if two is None else Why.CONTRACTED] + [None] * (len(op.in_shapes) - 2)


@_register("linear")
def _linear(op: Op, out: Layout) -> list[Result]:
    data, weight, *bias = op.in_shapes
    first = None if data is None else _as(smear(out, [len(out.shape) - 1]), data, Why.CONTRACTED)
    rest: list[Result] = [None if weight is None else Why.CONTRACTED]
    return [first, *rest, *(None if s is None else Why.SHARED for s in bias)]


@_register("cdist", "euclidean_dist")
def _cdist(op: Op, out: Layout) -> list[Result]:
    one, two = op.in_shapes
    rank = len(out.shape)
    left = smear(out, [rank - 1])
    right = smear(out, [rank - 2])
    turned = None if right is None else Layout(right.shape, right.owner.transpose(-1, -2))
    return [
        None if one is None else _as(left, one, Why.CONTRACTED),
        None if two is None else _as(turned, two, Why.CONTRACTED),
    ]


# --- Layers --------------------------------------------------------------------------------------


def _weights(count: int, shapes: Sequence[Shape | None]) -> list[Result]:
    return [None if s is None else Why.CONTRACTED for s in shapes[:count]]


@_register(
    "convolution", "convolution_overrideable", "conv_depthwise2d", "conv_depthwise3d",
    "cudnn_convolution", "mkldnn_convolution", "slow_conv2d", "slow_conv3d", "slow_conv_dilated2d",
    "slow_conv_dilated3d", "slow_conv_transpose2d", "nnpack_spatial_convolution",
    "cudnn_convolution_transpose", "miopen_convolution",
)  # fmt: skip
def _convolution(op: Op, out: Layout) -> list[Result]:
    data, *rest = op.in_shapes
    first: Result = None
    if data is not None:
        plain = smear(out, range(1, len(out.shape)))
        first = _as(plain, data)
    return [first, *_weights(len(rest), rest)]


@_register("native_layer_norm", "fused_rms_norm")
def _layer_norm(op: Op, out: Layout) -> list[Result]:
    count = len(op.attr("normalized_shape"))
    rank = len(out.shape)
    data, *rest = op.in_shapes
    plain = smear(out, range(rank - count, rank))
    results: list[Result] = [None if data is None else _as(plain, data)]
    for shape in rest:
        results.append(None if shape is None else _or(reduce_to(out, shape), Why.SHARED))
    return results


@_register("native_group_norm")
def _group_norm(op: Op, out: Layout) -> list[Result]:
    data, *rest = op.in_shapes
    plain = smear(out, range(1, len(out.shape)))
    return [None if data is None else _as(plain, data), *_weights(len(rest), rest)]


# What these do is in their names.
_TRAINING = {"native_batch_norm_legit_no_training": False, "batch_norm_no_update": False,
             "batch_norm_with_update": True}  # fmt: skip


def in_training(op: Any) -> bool:
    """Whether a batch norm takes its statistics from the batch; `op` has a name and attributes."""
    known = _TRAINING.get(op.name)
    return op.attr("training") if known is None else known


@_register(
    "native_batch_norm", "native_batch_norm_legit", "native_batch_norm_legit_no_training",
    "cudnn_batch_norm", "miopen_batch_norm", "batch_norm_with_update", "batch_norm_no_update",
)  # fmt: skip
def _batch_norm(op: Op, out: Layout) -> list[Result]:
    data, *rest = op.in_shapes
    training = in_training(op)
    others = [d for d in range(len(out.shape)) if d != 1]
    channel = smear(out, others)  # instance norm is a batch norm over (1, B*C, ...)
    first: Result = None
    if data is not None:
        first = _or(channel, Why.MIXING) if training else _as(out, data)
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


@_register("embedding")
def _embedding(op: Op, out: Layout) -> list[Result]:
    return _weights(1, op.in_shapes)


@_register("embedding_bag")
def _embedding_bag(op: Op, out: Layout) -> list[Result]:
    table, *rest = op.in_shapes
    results: list[Result] = [None if table is None else Why.CONTRACTED]
    for shape in rest:  # the weights of single entries
        plain = None if shape is None else smear(out, [1])
        if shape is None:
            results.append(None)
        elif plain is None:
            results.append(Why.UNKNOWN)
        else:
            _, bag = bags(op.data("indices"), op.data("offsets"), out.shape[0])
            owner = plain.owner[:, 0].expand(out.shape[0])[bag.clamp_min(0).cpu()]
            results.append(along(shape, 0, torch.where(bag.cpu() < 0, NOBODY, owner)))
    return results


def bags(indices: Tensor, offsets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(entries,) twice: the row that an entry looks up, and its bag; -1 behind the last one."""
    places = torch.arange(indices.numel(), device=indices.device)
    bag = torch.searchsorted(offsets.long(), places, right=True) - 1
    return indices.reshape(-1).long(), torch.where(bag < count, bag, -1)


@_register("trilinear")
def _trilinear(op: Op, out: Layout) -> list[Result]:
    """The product of three tensors, each expanded along some dimensions, some of them summed."""
    owner = out.owner
    for dim in sorted(op.attr("sumdim")):
        owner = owner.unsqueeze(dim)
    full = Layout(tuple(owner.shape), owner)
    results: list[Result] = []
    for shape, name in zip(op.in_shapes, ("expand1", "expand2", "expand3"), strict=True):
        dims = list(op.attr(name))
        lone = None if shape is None else smear(full, dims)
        if shape is None or lone is None:
            results.append(None if shape is None else Why.CONTRACTED)
        else:
            kept = [size for d, size in enumerate(lone.owner.shape) if d not in dims]
            results.append(_as(Layout(tuple(kept), lone.owner.reshape(kept)), shape))
    return results


_ATTENTION = (
    "scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_flash_attention",
    "scaled_dot_product_efficient_attention", "scaled_dot_product_cudnn_attention",
    "scaled_dot_product_fused_attention_overrideable", "efficient_attention", "flash_attention",
)  # fmt: skip


@_register(*_ATTENTION)
def _attention(op: Op, out: Layout) -> list[Result]:
    rank = len(out.shape)
    if rank != 4 or op.name in ("efficient_attention", "flash_attention"):
        return unknown(op)
    plain = smear(out, [rank - 2, rank - 1])
    if plain is None:
        return unknown(op)
    results: list[Result] = []
    for i, shape in enumerate(op.in_shapes):
        if shape is None:
            results.append(None)
        elif i < 3:
            results.append(_as(plain, shape))
        else:  # a learned or computed bias, broadcast to (batch, heads, queries, keys)
            scores = Layout((*out.shape[:2], *shape[-2:]), plain.owner)
            results.append(_or(reduce_to(scores, shape), Why.SHARED))
    return results


def _recurrent(op: Op, outs: list[Layout | None]) -> list[Result]:
    """One layer of an LSTM by oneDNN: (T, B, C) inside, whatever batch_first says outside."""
    out = outs[0]
    if out is None or any(o is not None for o in outs[1:]) or op.attr("batch_first"):
        return unknown(op)
    plain = smear(out, [0, 2])
    if plain is None or plain.varying != (1,):
        return unknown(op)
    results: list[Result] = []
    for i, shape in enumerate(op.in_shapes):
        if shape is None:
            results.append(None)
        elif i == 0:
            results.append(_as(plain, shape))
        else:
            results.append(Why.CONTRACTED if op.parameter[i] else Why.UNKNOWN)
    return results


_MULTI["mkldnn_rnn_layer"] = _recurrent


_SPATIAL = """
avg_pool2d avg_pool3d max_pool2d max_pool2d_with_indices max_pool3d_with_indices
adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d
fractional_max_pool2d fractional_max_pool3d mkldnn_max_pool2d mkldnn_max_pool3d
reflection_pad1d reflection_pad2d reflection_pad3d
replication_pad1d replication_pad2d replication_pad3d
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_nearest_exact1d
upsample_nearest_exact2d upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
upsample_bilinear2d_aa upsample_bicubic2d upsample_bicubic2d_aa upsample_trilinear3d
mkldnn_adaptive_avg_pool2d upsample_lanczos2d_aa
""".split()


@_register(*_SPATIAL)
def _spatial(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    found = re.search(r"([123])d", op.name)
    assert found is not None
    rank = len(out.shape)
    return [_as(smear(out, range(rank - int(found[1]), rank)), shape)]


@_register("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def _pixel_shuffle(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    rank = len(out.shape)
    lead = 1 if op.name == "channel_shuffle" else rank - 3
    return [_as(smear(out, range(lead, rank)), shape)]


@_register("im2_col", "col2_im", "grid_sampler2d", "grid_sampler3d", "affine_grid_generator",
           "grid_sampler2d_cpu_fallback", "cudnn_grid_sampler")  # fmt: skip
def _batch_first(op: Op, out: Layout) -> list[Result]:
    plain = smear(out, range(1, len(out.shape)))
    results: list[Result] = []
    for shape in op.in_shapes:
        if shape is None:
            results.append(None)
        elif plain is None or not shape or shape[0] != out.shape[0]:
            results.append(Why.UNKNOWN)
        else:
            results.append(along(shape, 0, plain.owner.reshape(-1).expand(shape[0])))
    return results


# --- Losses --------------------------------------------------------------------------------------


@_register("nll_loss", "nll_loss2d")
def _nll_loss(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    if len(shape) != len(out.shape) + 1:
        return [Why.UNKNOWN]
    return [_as(Layout((out.shape[0], 1, *out.shape[1:]), out.owner.unsqueeze(1)), shape)]


# --- Index tensors -------------------------------------------------------------------------------


def _padded(owner: Tensor, shape: Sequence[int]) -> Layout:
    """Where the index is smaller than the tensor, nothing arrives at the rest."""
    for dim, size in enumerate(shape):
        if 1 < owner.shape[dim] < size:
            owner = _along_dim(owner, dim, size, slice(0, owner.shape[dim]))
    return compressed(shape, owner)


@_register("gather", "take_along_dim")
def _gather(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    if not shape:
        return [Why.UNKNOWN]
    plain = smear(out, [_wrap(op.attr("dim"), len(shape))])
    return [Why.UNKNOWN if plain is None else _padded(plain.owner, shape)]


@_register("scatter", "scatter_add")
def _scatter(op: Op, out: Layout) -> list[Result]:
    data, *rest = op.in_shapes
    results: list[Result] = [None if data is None else out]
    if rest:
        source = rest[0]
        if source is None:
            results.append(None)
        else:
            plain = smear(out, [_wrap(op.attr("dim"), len(source))]) if source else None
            fits = plain is not None and all(
                o == 1 or o <= s for o, s in zip(plain.owner.shape, source, strict=True)
            )
            results.append(_as(plain, source) if fits else Why.UNKNOWN)
    return results


@_register("index_select")
def _index_select(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    if op.parameter[0]:
        return [Why.CONTRACTED]
    dim = _wrap(op.attr("dim"), len(shape)) if shape else 0
    if not shape or out.owner.shape[dim] == 1:
        return [_as(out, shape)]
    return [_scattered(shape, out.owner, dim, op.data("index"))]


def _scattered(shape: Shape, owner: Tensor, dim: int, index: Tensor) -> Result:
    """Owners put back where `index` took them from along `dim`."""
    target = list(owner.shape)
    target[dim] = shape[dim]
    where = [1] * owner.dim()
    where[dim] = -1
    index = index.detach().cpu().long().reshape(where).expand(owner.shape)
    return _collected(shape, target, lambda empty, how: empty.scatter_reduce(
        dim, index, owner if how == "amax" else _last(owner), how))  # fmt: skip


def _last(owner: Tensor) -> Tensor:
    """NOBODY must lose against anybody when the lowest owner is looked for."""
    return torch.where(owner == NOBODY, torch.iinfo(torch.int64).max, owner)


def _collected(shape: Shape, target: Sequence[int], scatter: Any) -> Result:
    highest = scatter(torch.full(list(target), NOBODY, dtype=torch.int64, device="cpu"), "amax")
    top = torch.iinfo(torch.int64).max
    lowest = scatter(torch.full(list(target), top, dtype=torch.int64, device="cpu"), "amin")
    lowest = torch.where(lowest == top, highest, lowest)
    if not torch.equal(highest, lowest):
        return Why.UNKNOWN
    return compressed(shape, highest)


@_register("index", "unsafe_index")
def _index(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    if op.parameter[0]:
        return [Why.CONTRACTED]
    placed = _index_positions(op, shape)
    if placed is None:
        return [Why.UNKNOWN]
    lead, positions, start, count = placed
    # Dimensions before `start` and after the indexed block pass through untouched.
    rank_out, tail = len(out.shape), len(shape) - start - len(lead)
    block = tuple(out.owner.shape[start : start + count])
    if rank_out != start + count + tail:
        return [Why.UNKNOWN]
    if all(size == 1 for size in block):
        block = (1,) * len(lead)
        if 2 * positions.unique().numel() >= prod(lead):
            owner = out.owner.reshape(
                *out.owner.shape[:start], *block, *out.owner.shape[start + count :]
            )
            return [_as(Layout(shape, owner), shape)]
    wide = list(out.owner.shape)
    wide[start : start + count] = out.shape[start : start + count]
    owner = out.owner.expand(wide).reshape(*wide[:start], -1, *wide[start + count :])
    target = list(owner.shape)
    target[start] = prod(lead)
    where = [1] * owner.dim()
    where[start] = -1
    index = positions.reshape(where).expand(owner.shape)
    flat_shape = (*shape[:start], prod(lead), *shape[start + len(lead) :])
    found = _collected(flat_shape, target, lambda empty, how: empty.scatter_reduce(
        start, index, owner if how == "amax" else _last(owner), how))  # fmt: skip
    if isinstance(found, Layout):
        return [reshape(found, shape)]
    return [found]


def _index_positions(op: Op, shape: Shape) -> tuple[Shape, Tensor, int, int] | None:
    """(indexed sizes, flat position of each result, first indexed dim, dims of the result).

    For index tensors on consecutive dimensions; None for anything else.
    """
    indices = list(op.data("indices"))
    at = [i for i, index in enumerate(indices) if index is not None]
    if not at or at != list(range(at[0], at[-1] + 1)):
        return None
    given = [indices[i].detach().cpu() for i in at]
    covered = sum(i.dim() if i.dtype in (torch.bool, torch.uint8) else 1 for i in given)
    lead = tuple(shape[at[0] : at[0] + covered])
    positions = torch.arange(prod(lead), device="cpu").reshape(lead)[tuple(given)]
    return lead, positions.reshape(-1), at[0], positions.dim()


@_register("index_add", "index_copy")
def _index_add(op: Op, out: Layout) -> list[Result]:
    data, source = op.in_shapes[0], op.in_shapes[1] if len(op.in_shapes) > 1 else None
    results: list[Result] = [None if data is None else out]
    if len(op.in_shapes) > 1:
        if source is None:
            results.append(None)
        else:
            dim = _wrap(op.attr("dim"), len(out.shape))
            owner = out.owner
            if owner.shape[dim] > 1:
                owner = owner.index_select(dim, op.data("index").detach().cpu().long().reshape(-1))
            results.append(compressed(source, owner) if owner.dim() == len(source) else Why.UNKNOWN)
    return results


@_register("index_fill")
def _index_fill(op: Op, out: Layout) -> list[Result]:
    results: list[Result] = [None if op.in_shapes[0] is None else out]
    return results + [None if s is None else Why.SHARED for s in op.in_shapes[1:]]


@_register("index_put", "index_put_impl", "unsafe_index_put")
def _index_put(op: Op, out: Layout) -> list[Result]:
    data, values = op.in_shapes[0], op.in_shapes[1]
    results: list[Result] = [None if data is None else out]
    if values is None:
        return [*results, None]
    placed = _index_positions(op, out.shape)
    if placed is None:
        return [*results, Why.UNKNOWN]
    lead, positions, start, _ = placed
    if start != 0:
        return [*results, Why.UNKNOWN]
    tail = out.owner.shape[len(lead) :]
    flat = out.owner.expand(*lead, *tail).reshape(-1, *tail)[positions]
    wide = Layout((positions.numel(), *out.shape[len(lead) :]), flat)
    if tuple(values) == wide.shape:
        return [*results, compressed(values, flat)]
    return [*results, Why.UNKNOWN]


_WITH_WEIGHTS = {
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "addr", "linear", "grouped_mm", "embedding",
    "embedding_bag", "trilinear", "convolution", "native_layer_norm", "fused_rms_norm",
    "native_group_norm", "native_batch_norm", "native_batch_norm_legit",
    "native_batch_norm_legit_no_training", "cudnn_batch_norm", "mkldnn_rnn_layer", "index",
    "index_select",
}  # fmt: skip
