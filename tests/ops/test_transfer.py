"""Every op whose structure a family in `pergrad/ops` claims to know, against brute force.

For each node of a small graph, for many placements of the examples on its output, the cotangent is
masked to one example at a time and sent through the node's own backward. An element that the
derived layout gives to example i must get nothing from any other example.
"""

import itertools
import random
import zlib
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from pergrad.graph import nodes, ops
from pergrad.graph.layout import NOBODY, Layout, compressed, constant
from pergrad.graph.ops import Op, Why

EXAMPLES = 3
Case = tuple[Callable, tuple[tuple[int, ...], ...]]
CASES: dict[str, list[Case]] = {}


def case(name: str, function: Callable, *shapes: tuple[int, ...]) -> None:
    CASES.setdefault(name, []).append((function, shapes))


def method(name: str, *args: object, **kwargs: object) -> Callable:
    return lambda x: getattr(x, name)(*args, **kwargs)


# --- the ops -------------------------------------------------------------------------------------

UNARY = """
abs acos angle asin asinh atan atanh ceil clone cos cosh deg2rad digamma erf erfc erfinv exp floor
exp2 expm1 frac i0 lgamma log log10 log1p log2 logit nan_to_num neg rad2deg reciprocal relu rsqrt
round sgn sigmoid sign sin sinc sinh sqrt tan tanh tril triu trunc
""".split()
for _name in UNARY:
    case(_name, method(_name), (3, 4))
case("acosh", lambda x: (x + 2).acosh(), (3, 4))
for _name in ("entr", "erfcx", "i0e", "i1e", "i1", "log_ndtr", "ndtri"):
    case("special_" + _name, getattr(torch.special, _name), (3, 4))
for _name in ("celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh",
              "leaky_relu", "logsigmoid", "mish", "selu", "silu", "softplus", "softshrink",
              "relu6", "tanhshrink", "softsign"):  # fmt: skip
    case(_name, getattr(F, _name), (2, 3, 2))
PAIRS = [((3, 4), (3, 4)), ((3, 4), (4,)), ((4,), (3, 4)), ((3, 1), (1, 4)), ((1, 3, 1), (3, 1, 3)),
         ((2, 3, 3), ()), ((3,), (3, 3)), ((3, 1), (3,)), ((1,), (3,))]  # fmt: skip
for _name in ("add", "sub", "mul", "div", "atan2", "copysign", "fmax", "fmin", "fmod", "hypot",
              "logaddexp", "logaddexp2", "maximum", "minimum", "pow", "remainder", "xlogy",
              "rsub"):  # fmt: skip
    for _one, _two in PAIRS:
        case(_name, getattr(torch, _name), _one, _two)
for _one, _two in PAIRS:
    case("lerp", lambda a, b: torch.lerp(a, b, 0.3), _one, _two)
    case("lerp_tensor", lambda a, b: torch.lerp(a, b, torch.tensor(0.3).double()), _one, _two)
    case("special_xlog1py", torch.special.xlog1py, _one, _two)
    case("where", lambda a, b: torch.where(torch.rand(3, 1) > 0.5, a, b), _one, _two)
    case("clamp", lambda a, b: a.clamp(min=b), _one, _two)
    case("clamp", lambda a, b: a.clamp(min=b - 1, max=b), _one, _two)
    case("complex", lambda a, b: torch.complex(a, b).real, _one, _two)
    case("complex", lambda a, b: torch.complex(a, b).imag.abs(), _one, _two)
    case("polar", lambda a, b: torch.view_as_real(torch.polar(a, b)), _one, _two)
    if len(_one) >= len(_two) and _two and _one == torch.broadcast_shapes(_one, _two):
        case("add_", lambda a, b: a.clone().add_(b), _one, _two)
        case("mul_", lambda a, b: a.clone().mul_(b), _one, _two)
    for _loss in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"):
        if _one == _two:
            for _how in ("none", "mean", "sum"):
                case(_loss, partial(getattr(F, _loss), reduction=_how), _one, _two)
for _how in ("none", "mean", "sum"):
    case("binary_cross_entropy", partial(F.binary_cross_entropy, reduction=_how), (3, 4), (3, 4))
    case("bce_logits", partial(F.binary_cross_entropy_with_logits, reduction=_how), (3, 3), (3, 3))
    case("kl_div", lambda a, b, h=_how: F.kl_div(a, b, reduction="none" if h == "none" else "sum"),
         (3, 4), (3, 4))  # fmt: skip
    case("soft_margin", lambda a, h=_how: F.soft_margin_loss(a, torch.ones(3, 4), reduction=h),
         (3, 4))  # fmt: skip
case("addcmul", torch.addcmul, (3, 1), (1, 4), (3, 4))
case("addcmul", torch.addcmul, (4,), (3, 1), (3, 4))
case("addcdiv", torch.addcdiv, (3, 3), (3,), (3, 1))
case("lerp_tensor", torch.lerp, (3, 4), (4,), (3, 1))
case("masked_fill", lambda x: x.masked_fill(torch.rand(3, 4) > 0.5, 0.0), (3, 4))
case("masked_fill", lambda x: x.masked_fill(torch.rand(2, 3, 4) > 0.5, 0.0), (3, 4))
case("masked_fill", lambda x, v: x.masked_fill(torch.rand(3, 4) > 0.5, v), (3, 4), ())
case("prelu", F.prelu, (2, 3, 3), (3,))
case("prelu", F.prelu, (3, 2), (1,))
case("threshold", lambda x: F.threshold(x, 0.3, 0.1), (3, 4))
case("rrelu", lambda x: F.rrelu(x - 1, training=True), (3, 4))
case("dropout", lambda x: F.dropout(x, 0.5, training=True), (3, 4))
case("to_copy", lambda x: x.to(torch.float32), (3, 4))
case("conj", lambda x: torch.view_as_complex(x).conj().real, (3, 3, 2))
case("conj", lambda x: torch.view_as_real(torch.view_as_complex(x).conj_physical()), (3, 3, 2))
case("complex_abs", lambda x: torch.view_as_complex(x).abs(), (3, 3, 2))
case("view_as_real", lambda x: torch.view_as_real(torch.view_as_complex(x) * 2j), (3, 3, 2))
case("fill", lambda x, v: x.clone().fill_(v), (3, 4), ())

for _old, _new in [((3, 4), (12,)), ((12,), (3, 4)), ((3, 2, 2), (6, 2)), ((6, 2), (3, 4)),
                   ((2, 3, 3), (3, 6)), ((3, 4), (4, 3)), ((1, 3, 1, 2), (3, 1, 2)),
                   ((3, 2), (3, 1, 2, 1)), ((2, 3), (3, 2)), ((3, 3), (9, 1)), ((1, 1), (1,))]:  # fmt: skip  # noqa: E501
    case("view", method("view", *_new), _old)
    case("reshape", lambda x, n=_new: x.mT.reshape(n), _old) if len(_old) > 1 else None
for _first, _shape in ((False, (3, 4, 2)), (True, (4, 3, 2)), (False, (3, 4))):
    case("pack_padded_sequence",
         lambda x, f=_first: pack_padded_sequence(x, torch.tensor([3, 3, 2, 1]), f).data,
         _shape)  # fmt: skip
case("unflatten", method("unflatten", 0, (2, 3)), (6, 3))
case("flatten", method("flatten", 1), (3, 2, 2))
for _dim in (None, 0, -1, (0, 2), 1):
    case("squeeze", method("squeeze", *(() if _dim is None else (_dim,))), (1, 3, 1))
for _dim in (0, 1, 2, -1, -2):
    case("unsqueeze", method("unsqueeze", _dim), (3, 4))
for _dims in itertools.permutations(range(3)):
    case("permute", method("permute", *_dims), (3, 2, 4))
case("permute", method("permute", -1, 0, -2), (3, 3, 3))
for _a, _b in ((0, 1), (-1, 0), (1, 2), (1, 1)):
    case("transpose", method("transpose", _a, _b), (3, 2, 4))
case("transpose", method("transpose", 0, -1), (3,))
case("t", method("t"), (3, 4))
case("t", method("t"), (3,))
case("movedim", method("movedim", 0, -1), (3, 2, 4))
case("expand", method("expand", 3, 4), (4,))
case("expand", method("expand", 2, 3, 4), (3, 1))
case("expand", method("expand", 3, -1, 4), (1, 3, 1))
case("expand", method("expand", 3, 3), ())
for _times in ((2, 1), (1, 3), (2, 2), (3, 1, 2), (2, 3, 1)):
    case("repeat", method("repeat", *_times), (3, 2))
case("repeat", method("repeat", 3, 2), (3,))
case("repeat", method("repeat", 2, 3), (1,))
case("tile", method("tile", 2, 3), (3,))
case("repeat_interleave", method("repeat_interleave", 2, 0), (3, 2))
for _dim, _i in ((0, 0), (1, -1), (-1, 2), (-2, 1)):
    case("select", method("select", _dim, _i), (3, 4, 3))
for _index in (slice(1, None), slice(None, -1), slice(None, None, 2), slice(-2, None),
               slice(5, 9), slice(2, 3)):  # fmt: skip
    case("slice", lambda x, i=_index: x[i], (4, 3))
    case("slice", lambda x, i=_index: x[..., i], (3, 2, 6))
case("narrow", method("narrow", -1, 1, 2), (3, 4))
case("narrow", method("narrow", 0, -2, 2), (3, 4))
for _dims in ((0,), (1,), (0, -1), (-2,)):
    case("flip", method("flip", _dims), (3, 2, 4))
for _shifts, _dims in (((1,), (0,)), ((2, -1), (0, 1)), ((5,), (-1,)), ((1, 1), (0, 0))):
    case("roll", method("roll", _shifts, _dims), (3, 4))
case("roll", method("roll", 1), (3, 4))
for _offset in (-1, 0, 1, 3):
    for _a, _b in ((0, 1), (1, 0), (0, 2), (-1, -3)):
        case("diagonal", method("diagonal", _offset, _a, _b), (3, 4, 3))
case("diagonal", method("diagonal"), (3, 3))
for _dim, _size, _step in ((0, 2, 1), (1, 3, 2), (-1, 2, 2), (0, 3, 1)):
    case("unfold", method("unfold", _dim, _size, _step), (4, 5, 3))
for _pad in ((1, 2), (0, 1, 2, 0), (-1, 1), (0, 0, 1, 1, 0, 2), (1, -1, 0, -1)):
    case("pad", lambda x, p=_pad: F.pad(x, p), (3, 3, 3))
case("alias", lambda x: torch.ops.aten.alias(x), (3, 4))

for _dim in (0, 1, -1):
    case("cat", lambda *xs, d=_dim: torch.cat(xs, d), (3, 3), (3, 3))
    case("cat", lambda *xs, d=_dim: torch.cat([xs[0], torch.ones(3, 3), xs[1]], d), (3, 3), (3, 3))
    case("stack", lambda *xs, d=_dim: torch.stack(xs, d), (3, 3), (3, 3), (3, 3))
    case(
        "stack",
        lambda *xs, d=_dim: torch.stack([xs[0], torch.ones(3, 2), xs[1]], d),
        (3, 2),
        (3, 2),
    )
    case("unbind", lambda x, d=_dim: x.unbind(d), (3, 2, 3))
    case("split", lambda x, d=_dim: x.split(2, d), (3, 4, 3))
    case("split_sizes", lambda x, d=_dim: x.split([1, 2, 1], d), (4, 4, 4))
    case("split_sizes", lambda x, d=_dim: x.split([1, 0, 3], d), (4, 4, 4))
    case("chunk", lambda x, d=_dim: x.chunk(2, d), (3, 4, 3))
    case("unsafe_split", lambda x, d=_dim: torch.unsafe_split(x, 2, d), (3, 4, 3))
    case("unsafe_chunk", lambda x, d=_dim: torch.unsafe_chunk(x, 2, d), (3, 4, 3))
    case("unsafe_split_with_sizes", lambda x, d=_dim: torch.unsafe_split_with_sizes(x, [1, 2], d),
         (3, 3, 3))  # fmt: skip
case("cat", lambda *xs: torch.cat(xs, 1), (3, 1), (3, 2), (3, 3))
case("cat", lambda *xs: torch.cat([xs[0], torch.ones(3, 2), xs[1], torch.ones(3, 1), xs[2]], 1),
     (3, 1), (3, 2), (3, 3))  # fmt: skip
case("cat", lambda *xs: torch.cat(xs, 1), (0,), (3, 2), (3, 3))
case("stack", lambda *xs: torch.stack(xs), (), (), ())
case("stack", lambda *xs: torch.stack(xs, -1), (3,), (3,))

for _dims, _keep in itertools.product(([0], [1], [-1], [0, 2], [0, -2], [0, 1, 2], []), (0, 1)):
    for _name in ("sum", "mean", "nansum", "amax", "amin", "logsumexp", "var", "std"):
        if _dims or _name not in ("logsumexp", "var", "std"):
            case(_name, lambda x, n=_name, d=_dims, k=_keep: getattr(x, n)(d, keepdim=bool(k)),
                 (3, 2, 3))  # fmt: skip
    case("vector_norm", lambda x, d=_dims, k=_keep: torch.linalg.vector_norm(
        x, dim=d or None, keepdim=bool(k)), (3, 2, 3))  # fmt: skip
    case("norm", lambda x, d=_dims, k=_keep: torch.ops.aten.norm.ScalarOpt_dim(
        x, 3, d, bool(k)), (3, 2, 3))  # fmt: skip
    if _dims:
        case(
            "var_mean", lambda x, d=_dims, k=_keep: torch.var_mean(x, d, keepdim=bool(k)), (3, 2, 3)
        )
        case(
            "std_mean", lambda x, d=_dims, k=_keep: torch.std_mean(x, d, keepdim=bool(k)), (3, 2, 3)
        )
    if len(_dims) == 1:
        for _name in ("max", "min", "median", "nanmedian", "mode", "prod", "logcumsumexp"):
            if _name != "logcumsumexp":
                case(_name, lambda x, n=_name, d=_dims[0], k=_keep: _first(
                    getattr(x, n)(d, keepdim=bool(k))), (3, 2, 3))  # fmt: skip
        case("kthvalue", lambda x, d=_dims[0], k=_keep: x.kthvalue(2, d, bool(k)).values, (3, 2, 3))
        case("aminmax", lambda x, d=_dims[0], k=_keep: tuple(
            torch.aminmax(x, dim=d, keepdim=bool(k))), (3, 2, 3))  # fmt: skip
for _name in ("sum", "mean", "prod", "max", "min", "median", "norm", "std", "var", "nansum"):
    case(_name + "_all", method(_name), (3, 3))
    case(_name + "_all", method(_name), ()) if _name not in ("std", "var") else None
for _shape in ((1, 3), (3, 1)):
    for _dim in (0, 1):
        case("sum", method("sum", _dim), _shape)
        case("amax", method("amax", _dim), _shape)
        case("max", lambda x, d=_dim: x.max(d).values, _shape)
        case("prod", method("prod", _dim), _shape)
case("trace", torch.trace, (3, 3))
case("aminmax_all", lambda x: tuple(torch.aminmax(x)), (3, 3))


def _first(result: object) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


for _dim in (0, 1, -1):
    for _name in ("softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin",
                  "sort", "argsort"):  # fmt: skip
        if _name != "argsort":
            case(_name, lambda x, n=_name, d=_dim: _first(getattr(x, n)(d)), (3, 2, 3))
            case(_name, lambda x, n=_name, d=_dim: _first(getattr(x, n)(d)), (3, 1))
    case("topk", lambda x, d=_dim: x.topk(2, d).values, (3, 2, 3))
    case("topk", lambda x, d=_dim: x.topk(1, d).values, (3, 3))
    case("glu", lambda x, d=_dim: F.glu(x, d), (4, 2, 6))
    case("safe_softmax", lambda x, d=_dim: torch.ops.aten._safe_softmax(x, d), (3, 2, 3))
    case("fft", lambda x, d=_dim: torch.view_as_real(torch.fft.fft(x, dim=d)), (3, 2, 3))
    case("rfft", lambda x, d=_dim: torch.view_as_real(torch.fft.rfft(x, dim=d)), (3, 4, 3))
    case("irfft", lambda x, d=_dim: torch.fft.irfft(torch.complex(x, x), dim=d), (3, 4, 3))
    case("renorm", lambda x, d=_dim: F.normalize(x, dim=d), (3, 2, 3))
for _name in ("softmax", "log_softmax", "cumsum", "sort"):
    case(_name, lambda x, n=_name: _first(getattr(x, n)(0)), ())
case("masked_softmax", lambda x: torch.ops.aten._masked_softmax(
    x.float(), torch.zeros(3, 4, dtype=torch.bool), None, 2), (3, 4))  # fmt: skip
case("masked_softmax", lambda x: torch.ops.aten._masked_softmax(
    x.float(), torch.zeros(3, 4, dtype=torch.bool), 0, 2), (3, 4))  # fmt: skip
case("masked_softmax", lambda x: torch.ops.aten._masked_softmax(
    x.float(), torch.zeros(3, 4, dtype=torch.bool), 1, 2), (3, 4))  # fmt: skip

case("mm", torch.mm, (3, 2), (2, 3))
case("mm", torch.mm, (3, 3), (3, 3))
case("mm", torch.mm, (1, 3), (3, 3))
case("mm", torch.mm, (3, 1), (1, 3))
for _bias in ((3, 4), (4,), (3, 1), (1, 4), ()):
    case("addmm", lambda b, x, y: torch.addmm(b, x, y, alpha=2, beta=3), _bias, (3, 2), (2, 4))
case("bmm", torch.bmm, (3, 2, 4), (3, 4, 3))
case("bmm", torch.bmm, (3, 3, 3), (3, 3, 3))
case("bmm", torch.bmm, (1, 3, 2), (1, 2, 3))
for _bias in ((3, 2, 3), (2, 3), (3, 1, 1), (3,), (1, 2, 1)):
    case("baddbmm", lambda b, x, y: torch.baddbmm(b, x, y, alpha=2), _bias, (3, 2, 4), (3, 4, 3))
for _bias in ((2, 3), (3,), (2, 1)):
    case("addbmm", lambda b, x, y: torch.addbmm(b, x, y, alpha=2), _bias, (3, 2, 4), (3, 4, 3))
case("mv", torch.mv, (3, 4), (4,))
case("mv", torch.mv, (3, 3), (3,))
case("dot", torch.dot, (3,), (3,))
for _bias in ((3,), (1,), ()):
    case("addmv", lambda b, x, y: torch.addmv(b, x, y, alpha=2, beta=0.5), _bias, (3, 4), (4,))
for _bias in ((3, 4), (4,), (3, 1)):
    case("addr", lambda b, x, y: torch.addr(b, x, y), _bias, (3,), (4,))
case("ger", torch.outer, (3,), (3,))
for _one, _two in (((3, 2, 4), (4, 3)), ((3, 4), (3, 4, 2)), ((2, 3, 2, 2), (2, 1, 2, 3)),
                   ((3, 2, 3), (3,)), ((3,), (3, 3, 2)), ((3,), (3,)), ((1, 3, 2), (3, 2, 3))):  # fmt: skip  # noqa: E501
    case("matmul", torch.matmul, _one, _two)
for _x in ((3, 4), (2, 3, 4), (4,), (2, 2, 3, 4)):
    case("linear", F.linear, _x, (3, 4), (3,))
    case("linear", F.linear, _x, (3, 4))
case("linear", F.linear, (3, 4), (4,))
case("bilinear", F.bilinear, (3, 2), (3, 4), (2, 2, 4), (2,))
case("einsum", lambda x, y: torch.einsum("bij,jk->kbi", x, y), (3, 2, 3), (3, 2))
case("einsum", lambda x, y: torch.einsum("bij,bkj->ibk", x, y), (3, 2, 3), (3, 3, 3))
case("cdist", lambda x, y: torch.cdist(x, y), (3, 2, 4), (3, 3, 4))
case("cdist", lambda x, y: torch.cdist(x, y, p=1), (3, 4), (3, 4))
case("cdist", lambda x, y: torch.cdist(x, y, p=1), (3, 2, 4), (3, 4))
case("cdist", lambda x, y: torch.cdist(x, y, p=1), (1, 2, 4), (3, 3, 4))
case("cdist", lambda x, y: torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist"), (3, 4), (3, 4))
case("pdist", lambda x: F.pdist(x), (3, 4))
case("cosine", lambda x, y: F.cosine_similarity(x, y, 0), (3, 4), (3, 4))

for _groups in (1, 2):
    for _x in ((3, 4, 6), (4, 6), (1, 4, 6)):
        case("conv1d", partial(F.conv1d, groups=_groups, padding=1), _x, (4, 4 // _groups, 3), (4,))
        case("conv_transpose1d", partial(F.conv_transpose1d, groups=_groups, stride=2), _x,
             (4, 4 // _groups, 3), (4,))  # fmt: skip
    for _x in ((3, 4, 4, 3), (4, 4, 3)):
        case("conv2d", partial(F.conv2d, groups=_groups, stride=(1, 2)), _x, (2, 4 // _groups, 2, 2),  # noqa: E501
             (2,))  # fmt: skip
        case("conv2d", partial(F.conv2d, groups=_groups, dilation=2), _x, (4, 4 // _groups, 2, 1))
case("conv3d", F.conv3d, (3, 2, 3, 3, 2), (2, 2, 2, 2, 2), (2,))
case("conv_tbc", lambda x, w, b: torch.conv_tbc(x, w, b, 1), (4, 3, 2), (2, 2, 3), (3,))
case("layer_norm", lambda x, w, b: F.layer_norm(x, (3,), w, b), (2, 3, 3), (3,), (3,))
case("layer_norm", lambda x, w, b: F.layer_norm(x, (3, 2), w, b), (3, 3, 2), (3, 2), (3, 2))
case("layer_norm", lambda x: F.layer_norm(x, (3,)), (3, 3))
case("layer_norm", lambda x: F.layer_norm(x, (3, 3)), (3, 3))
case("layer_norm", lambda x, w: F.layer_norm(x, (3, 1), w), (3, 3, 1), (3, 1))
case("rms_norm", lambda x, w: F.rms_norm(x, (3,), w), (2, 3, 3), (3,))
case("rms_norm", lambda x, w: F.rms_norm(x, (3, 2), w), (3, 3, 2), (3, 2))
case("fused_rms_norm", lambda x, w: torch._fused_rms_norm(x, (3, 2), w, 1e-5)[0], (3, 3, 2), (3, 2))
case("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), (3, 4, 3), (4,), (4,))
case("group_norm", lambda x, w, b: F.group_norm(x, 1, w, b), (3, 3), (3,), (3,))
for _x in ((3, 3, 2), (3, 4), (1, 3, 3), (3, 3, 2, 2)):
    _c = (_x[1],)
    case("batch_norm_train", lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
         _x, _c, _c)  # fmt: skip
    case(
        "batch_norm_eval",
        lambda x, w, b: F.batch_norm(
            x, torch.zeros(x.shape[1]).double(), torch.ones(x.shape[1]).double(), w, b
        ),
        _x,
        _c,
        _c,
    )
    case("batch_norm_legit", lambda x, w, b: torch.ops.aten._native_batch_norm_legit.no_stats(
        x, w, b, True, 0.1, 1e-5)[0], _x, _c, _c)  # fmt: skip
    case("batch_norm_legit_eval", lambda x, w, b: torch.ops.aten._native_batch_norm_legit_no_training(  # noqa: E501
        x, w, b, torch.zeros(x.shape[1]).double(), torch.ones(x.shape[1]).double(), 0.1, 1e-5)[0],
        _x, _c, _c)  # fmt: skip
    if len(_x) > 2:
        case("instance_norm", lambda x, w, b: F.instance_norm(x, None, None, w, b), _x, _c, _c)
case("embedding", lambda w: F.embedding(torch.tensor([[0, 1], [2, 2], [0, 2]]), w), (3, 3))
case("embedding", lambda w: F.embedding(torch.tensor([0, 1, 1]), w, padding_idx=0), (3, 3))
case("embedding_bag", lambda w: F.embedding_bag(
    torch.tensor([0, 1, 1, 2]), w, torch.tensor([0, 2, 3])), (3, 3))  # fmt: skip
case("embedding_bag", lambda w, p: F.embedding_bag(
    torch.tensor([[0, 1], [1, 2]]), w, mode="sum", per_sample_weights=p), (3, 3), (2, 2))  # fmt: skip  # noqa: E501

_qkv = ((3, 2, 4, 2), (3, 2, 3, 2), (3, 2, 3, 2))
case("sdpa", F.scaled_dot_product_attention, *_qkv)
case("sdpa", F.scaled_dot_product_attention, (3, 3, 3, 3), (3, 3, 3, 3), (3, 3, 3, 3))
case("sdpa", F.scaled_dot_product_attention, (3, 4, 2), (3, 3, 2), (3, 3, 2))
case("sdpa", partial(F.scaled_dot_product_attention, is_causal=True), *_qkv)
case("sdpa_gqa", partial(F.scaled_dot_product_attention, enable_gqa=True), (3, 4, 4, 2),
     (3, 2, 3, 2), (3, 2, 3, 2))  # fmt: skip
for _m in ((3, 2, 4, 3), (4, 3), (3, 1, 1, 3), (1, 2, 4, 3)):
    case("sdpa_bias", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), *_qkv, _m)
case("sdpa_flash", lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
    q, k, v)[0], *_qkv)  # fmt: skip
case("sdpa_flash", lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
    q, k, v)[0], (3, 3, 3, 3), (3, 3, 3, 3), (3, 3, 3, 3))  # fmt: skip

for _x in ((3, 3, 4, 4), (3, 4, 4), (1, 3, 4, 4)):
    case("avg_pool2d", lambda x: F.avg_pool2d(x, 2), _x)
    case("max_pool2d", lambda x: F.max_pool2d(x, 2, 1, 1), _x)
    case("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, 3), _x)
    case("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, 2), _x)
    case("fractional_max_pool2d", lambda x: F.fractional_max_pool2d(x, 2, 2), _x)
    case("reflection_pad2d", lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), _x)
    case("replication_pad2d", lambda x: F.pad(x, (1, 1, 1, 1), "replicate"), _x)
    case("circular_pad2d", lambda x: F.pad(x, (1, 1, 1, 1), "circular"), _x)
for _x in ((3, 2, 4), (3, 4)):
    case("avg_pool1d", lambda x: F.avg_pool1d(x, 2), _x)
    case("max_pool1d", lambda x: F.max_pool1d(x, 2), _x)
    case("max_pool1d", lambda x: F.max_pool1d(x, 2, return_indices=True)[0], _x)
    case("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 2), _x)
    case("adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x, 2), _x)
    case("lp_pool1d", lambda x: F.lp_pool1d(x, 2, 2), _x)
    case("reflection_pad1d", lambda x: F.pad(x, (1, 2), "reflect"), _x)
    case("replication_pad1d", lambda x: F.pad(x, (1, 2), "replicate"), _x)
_x3 = (3, 2, 2, 2, 2)
case("avg_pool3d", lambda x: F.avg_pool3d(x, 2, 1), _x3)
case("max_pool3d", lambda x: F.max_pool3d(x, 2, 1), _x3)
case("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, (1, 2, 1)), _x3)
case("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, 1), _x3)
case("fractional_max_pool3d", lambda x: F.fractional_max_pool3d(x, 1, 1), _x3)
case("reflection_pad3d", lambda x: F.pad(x, (1,) * 6, "reflect"), _x3)
case("replication_pad3d", lambda x: F.pad(x, (1,) * 6, "replicate"), _x3)
for _mode, _x in (("nearest", (3, 2, 3)), ("nearest", (3, 2, 3, 2)), ("nearest", _x3),
                  ("nearest-exact", (3, 2, 3)), ("nearest-exact", (3, 2, 3, 2)),
                  ("nearest-exact", _x3), ("linear", (3, 2, 3)), ("bilinear", (3, 2, 3, 2)),
                  ("bicubic", (3, 2, 3, 2)), ("trilinear", _x3), ("area", (3, 2, 3))):  # fmt: skip
    case("upsample_" + _mode, lambda x, m=_mode: F.interpolate(x, scale_factor=2, mode=m), _x)
for _mode in ("bilinear", "bicubic"):
    case("upsample_aa", lambda x, m=_mode: F.interpolate(x, size=(2, 2), mode=m, antialias=True),
         (3, 2, 3, 4))  # fmt: skip
for _x in ((3, 4, 2, 2), (4, 2, 2), (2, 3, 4, 2, 2)):
    case("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), _x)
    case("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), _x)
for _x in ((3, 4, 2, 2), (3, 4, 2)):
    case("channel_shuffle", lambda x: torch.channel_shuffle(x, 2), _x)
for _k in (1, 2):
    for _x in ((3, 2, 3, 3), (2, 3, 3), (1, 3, 3, 3)):
        case("im2col", lambda x, k=_k: F.unfold(x, k), _x)
case("col2im", lambda x: F.fold(x, (3, 3), 2), (3, 8, 4))
case("col2im", lambda x: F.fold(x, (3, 3), 2), (8, 4))
case("col2im", lambda x: F.fold(x, (2, 2), 1), (4, 4))
case("grid_sample", lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), (3, 2, 3, 3),
     (3, 2, 4, 2))  # fmt: skip
case("grid_sample", lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), (3, 2, 2, 3, 3),
     (3, 2, 2, 2, 3))  # fmt: skip
case("affine_grid", lambda t: F.affine_grid(t, [3, 1, 2, 3], align_corners=False), (3, 2, 3))
for _how in ("none", "mean", "sum"):
    case("nll_loss", lambda x, h=_how: F.nll_loss(x, torch.tensor([0, 2, 1]), reduction=h), (3, 3))
    case("nll_loss", lambda x, h=_how: F.nll_loss(x, torch.tensor(1), reduction=h), (3,))
    case(
        "multi_margin_loss",
        lambda x, h=_how: F.multi_margin_loss(x, torch.tensor([0, 2, 1]), reduction=h),
        (3, 3),
    )
    case(
        "multi_margin_loss",
        lambda x, h=_how: F.multi_margin_loss(x, torch.tensor(1), reduction=h),
        (3,),
    )
    case(
        "multilabel_margin_loss",
        lambda x, h=_how: F.multilabel_margin_loss(
            x, torch.tensor([[0, 2, -1], [1, -1, -1], [2, 1, 0]]), reduction=h
        ),
        (3, 3),
    )
    case("nll_loss2d", lambda x, h=_how: F.nll_loss(
        x, torch.tensor([[0, 2, 1]] * 3), reduction=h), (3, 3, 3))  # fmt: skip
    case("nll_loss2d", lambda x, h=_how: F.nll_loss(
        x, torch.tensor([[[0], [2], [1]]] * 3), reduction=h), (3, 3, 3, 1))  # fmt: skip
    case("cross_entropy", lambda x, h=_how: F.cross_entropy(x, torch.tensor([0, 2, 1]), reduction=h,
                                                            label_smoothing=0.1), (3, 3))  # fmt: skip  # noqa: E501
    case("ctc", lambda x, h=_how: F.ctc_loss(x, torch.ones(3, 2).long(), torch.tensor([3, 3, 2]),
                                             torch.tensor([1, 2, 1]), reduction=h), (3, 3, 3))  # fmt: skip  # noqa: E501


def _ids(high: int, *shape: int, unique: bool = False) -> Tensor:
    if unique:
        return torch.randperm(high)[: shape[0]]
    return torch.randint(0, high, shape)


for _dim in (0, 1, -1):
    for _shape in ((3, 3, 3), (2, 1, 3), (1, 3, 2), (3, 3, 1)):
        case("gather", lambda x, d=_dim, s=_shape: x.gather(d, _ids(3, *s)), (3, 3, 3))
        case("scatter", lambda x, y, d=_dim, s=_shape: x.scatter(d, _ids(3, *s), y), (3, 3, 3),
             _shape)  # fmt: skip
        case("scatter_add", lambda x, y, d=_dim, s=_shape: x.scatter_add(d, _ids(3, *s), y),
             (3, 3, 3), _shape)  # fmt: skip
    for _kind, _self in (("sum", True), ("mean", False), ("prod", True), ("amax", True)):
        case("scatter_reduce", lambda x, y, d=_dim, k=_kind, i=_self:
             x.scatter_reduce(d, _ids(3, 2, 3, 3), y, k, include_self=i),
             (3, 3, 3), (2, 3, 3))  # fmt: skip
    case("scatter_by_rows", lambda x, y, d=_dim:
         x.scatter_add(d, _ids(3, *(3 if e == d % 3 else 1 for e in range(3))).expand(3, 3, 3), y),
         (3, 3, 3), (3, 3, 3))  # fmt: skip
    case("scatter_value", lambda x, d=_dim: x.scatter(d, _ids(3, 2, 2, 1), 0.5), (3, 3, 3))
    case("take_along_dim", lambda x, d=_dim: x.take_along_dim(_ids(3, 3, 1, 1), d), (3, 3, 3))
    for _n in (1, 3, 5):
        case("index_select", lambda x, d=_dim, n=_n: x.index_select(d, _ids(3, n)), (3, 2, 3)
             if _dim != 1 else (2, 3, 3))  # fmt: skip
        _source = tuple(_n if d == _dim % 3 else 3 for d in range(3))
        case("index_add", lambda x, y, d=_dim, n=_n: x.index_add(d, _ids(3, n), y, alpha=2),
             (3, 3, 3), _source)  # fmt: skip
    _source = tuple(2 if d == _dim % 3 else 3 for d in range(3))
    case("index_copy", lambda x, y, d=_dim: x.index_copy(d, _ids(3, 2, unique=True), y), (3, 3, 3),
         _source)  # fmt: skip
    case("index_fill", lambda x, v, d=_dim: x.index_fill(d, _ids(3, 2), v), (3, 3, 3), ())
INDICES: list[Callable[[], tuple]] = [
    lambda: (_ids(3, 4),),
    lambda: (_ids(3, 2, 2),),
    lambda: (slice(None), _ids(3, 3)),
    lambda: (slice(None), slice(None), _ids(3, 2, 1)),
    lambda: (_ids(3, 3), _ids(3, 3)),
    lambda: (_ids(3, 3, 1), _ids(3, 1, 2)),
    lambda: (slice(None), _ids(3, 3), _ids(3, 3)),
    lambda: (_ids(3, 3), slice(None), _ids(3, 3)),
    lambda: (_ids(3, 2, 3), slice(None), _ids(3, 2, 3)),
    lambda: (_ids(3, 3), _ids(3, 3), _ids(3, 3)),
    lambda: (torch.tensor([True, False, True]),),
    lambda: (slice(None), torch.tensor([True, False, True])),
    lambda: (torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0]]).bool(),),
    lambda: (slice(None), torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0]]).bool()),
    lambda: (torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 0]]).bool(), _ids(3, 4)),
    lambda: (torch.tensor(1), _ids(3, 3)),
    lambda: (_ids(3, 3) - 3,),
    lambda: (torch.tensor(2),),
    lambda: (torch.tensor(0), slice(None), _ids(3, 3)),
]
for _index in INDICES:
    for _shape in ((3, 3, 3), (3, 3, 3, 2)):
        case("index", lambda x, i=_index: x[i()], _shape)
        for _accumulate in (True, False):
            case(
                "index_put", lambda x, v, i=_index, a=_accumulate: _put(x, i(), v, a), _shape, (3,)
            )
            case("index_put", lambda x, v, i=_index, a=_accumulate: _put(x, i(), v, a), _shape, ())
            case("index_put", lambda x, v, i=_index, a=_accumulate: _put(x, i(), x[i()] * v, a),
                 _shape, ())  # fmt: skip
case("index_put_full", lambda x, v: x.index_put((_ids(3, 4),), v, True), (3, 3), (4, 3))
case("index_put_full", lambda x, v: x.index_put((_ids(3, 3),), v, True), (3, 3), (3, 3))
case("index_put_full", lambda x, v: x.index_put((_ids(3, 3), _ids(3, 3)), v, True), (3, 3), (3,))
case("index_put_full", lambda x, v: x.index_put((_ids(3, 3),), v, True), (3, 3), (3, 1))
case("index_put_full", lambda x, v: x.index_put((_ids(3, 3),), v, True), (3, 3), (3,))
case("index_put_full", lambda x, v: x.index_put((_ids(3, 3, 1),), v, True), (3, 3), (3, 1, 3))
case("index_put_full", lambda x, v: x.index_put((_ids(3, 3, 1),), v, True), (3, 3), (1, 3))
case("index_put_full", lambda x, v: x.index_put((_ids(3, 1, 3),), v, True), (3, 3), (3, 3))


def _put(x: Tensor, index: tuple, v: Tensor, accumulate: bool) -> Tensor:
    x = x.clone()
    shape = x[index].shape
    if v.dim() > 0 and shape[-1:] not in ((1,), v.shape):
        v = v.sum()
    if torch.broadcast_shapes(shape, v.shape) != shape:
        v = v.sum()
    if accumulate:
        x[index] += v
    else:
        x[index] = v
    return x


case("copy_slices", lambda x, v: _assign(x, v), (3, 4), (4,))
case("copy_slices", lambda x, v: _assign(x, v), (3, 3), (2, 3))
case("slice_scatter", lambda x, v: torch.slice_scatter(x, v, 0, 1), (3, 3), (2, 3))
case("select_scatter", lambda x, v: torch.select_scatter(x, v, 1, 1), (3, 3), (3,))
case("as_strided", lambda x: x.as_strided((3, 3), (1, 3)), (3, 3))
case("kron", torch.kron, (3, 2), (2, 3))
case("cross", lambda a, b: torch.linalg.cross(a, b), (3, 3), (3, 3))
case("cov", torch.cov, (3, 4))
case("cumulative", lambda x: torch.cumulative_trapezoid(x, dim=0), (3, 3))
case("diag_embed", lambda x: torch.diag_embed(x), (3, 3))
case("diag", lambda x: torch.diag(x), (3,))
case("rot90", lambda x: x.rot90(1, (0, 1)), (3, 3, 2))
for _mask in (torch.tensor([True, False, True]), torch.rand(3, 3) > 0.5, torch.rand(3, 1) > 0.5,
              torch.rand(2, 3, 3) > 0.5, torch.tensor(True), torch.zeros(3, 3).bool()):  # fmt: skip
    for _shape in ((3, 3), (3, 1), (3,)):
        case("masked_select", lambda x, m=_mask: x.masked_select(m), _shape)
    for _shape in ((18,), (3, 8), (2, 3, 3)):
        case("masked_scatter", lambda x, v, m=_mask: x.masked_scatter(m, v), (3, 3), _shape)
        case(
            "masked_scatter",
            lambda v, m=_mask: torch.zeros(2, 3, 3).double().masked_scatter(m, v),
            _shape,
        )
case("take", lambda x: x.take(_ids(9, 3, 2)), (3, 3))
case("put", lambda x, v: x.put(_ids(9, 4), v, True), (3, 3), (4,))
case("trilinear", lambda a, b: torch.tensordot(a, b, ([0], [1])), (3, 2), (2, 3))
case("scatter_reduce", lambda x, v: x.scatter_reduce(0, _ids(3, 3, 3), v, "amax"), (3, 3), (3, 3))
case("segment", lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([1, 2])), (3, 3))
case(
    "grouped_mm",
    lambda x, w: F.grouped_mm(
        x.bfloat16(), w.bfloat16(), offs=torch.tensor([8, 16], dtype=torch.int32)
    ),
    (16, 16),
    (2, 16, 16),
)
case("lstm", lambda x: _lstm()(x.float())[0], (4, 3, 2))
case("lstm", lambda x: _lstm(batch_first=True)(x.float())[0], (3, 4, 2))
case("lstm", lambda x: _lstm(bidirectional=True)(x.float())[1][0], (3, 3, 2))
aten = torch.ops.aten
case("clamp_max", lambda x: x.clamp_max(0.5), (3, 4))
case("norm_scalar", lambda x: aten.norm.Scalar(x, 3), (3, 4))
case("native_dropout", lambda x: torch.native_dropout(x, 0.5, True)[0], (3, 4))
case(
    "fft_c2c", lambda x: torch.view_as_real(torch.fft.fft2(torch.view_as_complex(x))), (3, 3, 3, 2)
)
case("fft_c2c", lambda x: torch.view_as_real(torch.fft.ifft(torch.view_as_complex(x), dim=0)),
     (3, 3, 2))  # fmt: skip
case("xlog1py", torch.special.xlog1py, (3, 1), (3,))
case("index_put_impl", lambda x, v: aten._index_put_impl(x, [_ids(3, 4)], v, True), (3, 3), (4, 3))
case("unsafe_index", lambda x: aten._unsafe_index(x, [None, _ids(3, 4)]), (3, 3))
case(
    "unsafe_index_put",
    lambda x, v: aten._unsafe_index_put(x, [_ids(3, 4)], v, True),
    (3, 3),
    (4, 3),
)
case("reshape_copy", lambda x: aten._reshape_copy(x, (6, 2)), (3, 4))
case("narrow_copy", lambda x: torch.narrow_copy(x, 1, 1, 2), (3, 4))
for _name in ("thnn_conv2d", "slow_conv_dilated2d", "slow_conv_transpose2d"):
    case(_name, lambda x, w, b, n=_name: getattr(aten, n)(x, w, (2, 2), b), (3, 2, 3, 3),
         (2, 2, 2, 2), (2,))  # fmt: skip
case("slow_conv3d", lambda x, w, b: aten.slow_conv3d(x, w, (2, 2, 2), b), (3, 2, 3, 2, 2),
     (2, 2, 2, 2, 2), (2,))  # fmt: skip
case("mkldnn_convolution", lambda x, w: aten.mkldnn_convolution(
    x.float(), w.float(), None, (0, 0), (1, 1), (1, 1), 1), (3, 2, 3, 3), (2, 2, 2, 2))  # fmt: skip


def _lstm(**how: bool) -> torch.nn.LSTM:
    torch.manual_seed(3)
    return torch.nn.LSTM(2, 2, **how)


def _assign(x: Tensor, v: Tensor) -> Tensor:
    x = x.clone()
    x[1:] = v
    return x * 2


# --- backward passes as ops ----------------------------------------------------------------------


def slope(name: str, function: Callable, *shapes: tuple[int, ...]) -> None:
    """The gradient of half the squares of what `function` gives, by its first argument."""

    def gradient(x: Tensor, *rest: Tensor) -> Tensor:
        x = x if x.requires_grad else x.clone().requires_grad_()
        half = 0.5 * function(x, *rest).square().sum()
        return torch.autograd.grad(half, x, create_graph=True)[0]

    case(f"{name}, backward", gradient, *shapes)


for _name in ("elu", "gelu", "hardshrink", "hardswish", "hardtanh", "leaky_relu", "logsigmoid",
              "softplus", "softshrink", "sigmoid", "tanh"):  # fmt: skip
    slope(_name, getattr(F, _name), (3, 4))
slope("threshold", lambda x: F.threshold(x, 0.3, 0.1), (3, 4))
slope("rrelu", lambda x: F.rrelu(x - 1, training=True), (3, 4))
for _shape in ((3, 4), (4,), (3, 1)):
    case("copy", lambda x: torch.zeros(3, 4, dtype=torch.float64).copy_(x), _shape)
slope("dropout", lambda x: F.dropout(x, 0.5, training=True), (3, 4))
slope("prelu", F.prelu, (2, 3, 3), (3,))
slope("to_copy", lambda x: x.to(torch.float32).to(torch.float64), (3, 4))
for _how in ("none", "mean", "sum"):
    for _loss in ("mse_loss", "smooth_l1_loss", "huber_loss"):
        slope(_loss, partial(getattr(F, _loss), reduction=_how), (3, 4), (3, 4))
    slope("binary_cross_entropy",
          lambda x, h=_how: F.binary_cross_entropy(x, torch.full_like(x, 0.3), reduction=h),
          (3, 4))  # fmt: skip
    slope("soft_margin", lambda x, h=_how: F.soft_margin_loss(x, torch.ones(3, 4), reduction=h),
          (3, 4))  # fmt: skip
    slope(
        "cross_entropy",
        lambda x, h=_how: F.cross_entropy(x, torch.tensor([0, 3, 1]), reduction=h),
        (3, 4),
    )
    slope(
        "cross_entropy",
        lambda x, h=_how: F.cross_entropy(x, torch.ones(3, 2, 2).long(), reduction=h),
        (3, 3, 2, 2),
    )
for _dim in (0, 1, -1):
    slope("softmax", method("softmax", _dim), (3, 4, 2))
    slope("log_softmax", method("log_softmax", _dim), (3, 4, 2))
    slope("glu", partial(F.glu, dim=_dim), (6, 4, 2))
for _rank, _size in ((1, (4,)), (2, (4, 4)), (3, (4, 4, 4))):
    _shape = (3, 2, *_size)
    slope("max_pool", partial(getattr(F, f"max_pool{_rank}d"), kernel_size=2), _shape)
    slope("avg_pool", partial(getattr(F, f"avg_pool{_rank}d"), kernel_size=2), _shape)
    slope("adaptive_max_pool", partial(getattr(F, f"adaptive_max_pool{_rank}d"), output_size=2),
          _shape)  # fmt: skip
    slope("adaptive_avg_pool", partial(getattr(F, f"adaptive_avg_pool{_rank}d"), output_size=3),
          _shape)  # fmt: skip
    for _mode in ("reflect", "replicate"):
        slope("pad", partial(F.pad, pad=(1, 1) * _rank, mode=_mode), _shape)
    for _mode in ("nearest", "nearest-exact", ("linear", "bilinear", "trilinear")[_rank - 1]):
        slope("interpolate", partial(F.interpolate, scale_factor=2, mode=_mode), _shape)
    if _rank > 1:
        slope("fractional_max_pool",
              partial(getattr(F, f"fractional_max_pool{_rank}d"), kernel_size=2, output_size=2),
              _shape)  # fmt: skip
        slope("grid_sample", partial(F.grid_sample, align_corners=False), _shape,
              (3, *[2] * _rank, _rank))  # fmt: skip
    _kernel = [2] * _rank
    slope("convolution", getattr(F, f"conv{_rank}d"), _shape, (3, 2, *_kernel), (3,))
    slope("convolution", partial(getattr(F, f"conv{_rank}d"), groups=2, stride=2, dilation=2),
          _shape, (4, 1, *_kernel))  # fmt: skip
    slope("convolution", getattr(F, f"conv_transpose{_rank}d"), _shape, (2, 3, *_kernel))
    slope("batch_norm", lambda x, w, b: F.batch_norm(x, torch.zeros(2).double(),
                                                     torch.ones(2).double(), w, b),
          _shape, (2,), (2,))  # fmt: skip
    slope("batch_norm", lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
          _shape, (2,), (2,))  # fmt: skip
    slope("instance_norm", F.instance_norm, _shape)
for _mode in ("bilinear", "bicubic"):
    for _smooth in (False, True):
        slope("interpolate", partial(F.interpolate, size=(3, 3), mode=_mode, antialias=_smooth),
              (3, 2, 4, 4))  # fmt: skip
slope("layer_norm", lambda x, w, b: F.layer_norm(x, (4,), w, b), (3, 2, 4), (4,), (4,))
slope("layer_norm", lambda x: F.layer_norm(x, (3, 4)), (3, 3, 4))
for _dim, _i in ((0, 0), (1, -1), (-1, 2)):
    slope("select", method("select", _dim, _i), (3, 4, 3))
    slope("unfold", method("unfold", _dim, 2, 1), (3, 4, 3))
    slope("slice", method("narrow", _dim, 1, 2), (3, 4, 3))
slope("slice", lambda x: x[:, -3:9:2], (3, 6))
for _offset, _a, _b in ((0, 0, 1), (1, 0, 2), (-1, -1, -2)):
    slope("diagonal", method("diagonal", _offset, _a, _b), (3, 3, 4))


# --- brute force ---------------------------------------------------------------------------------


def maps(shape: tuple[int, ...], rng: random.Random) -> Iterator[Layout]:
    """Placements of the examples: along every dimension, in blocks, in pairs, with gaps."""
    rank = len(shape)
    seed = torch.Generator().manual_seed(rng.randrange(2**31))

    def wild(sizes: list[int], low: int) -> Tensor:
        return torch.randint(low, EXAMPLES, sizes, generator=seed)

    for d in range(rank):
        n = shape[d]
        if n < 2:
            continue
        view = [1] * rank
        view[d] = n
        yield compressed(shape, (torch.arange(n) % EXAMPLES).reshape(view))
        yield compressed(shape, (torch.arange(n) * EXAMPLES // n).reshape(view))
        yield compressed(shape, wild(view, 0))
        yield compressed(shape, wild(view, NOBODY))
    for dims in itertools.combinations(range(rank), 2):
        sizes = [shape[d] if d in dims else 1 for d in range(rank)]
        yield compressed(shape, wild(sizes, NOBODY))
        numbers = torch.arange(shape[dims[0]] * shape[dims[1]]).reshape(sizes)
        yield compressed(shape, numbers % EXAMPLES)
        yield compressed(shape, numbers * EXAMPLES // numbers.numel())
    if rank > 2:
        yield compressed(shape, wild(list(shape), NOBODY))
    yield constant(shape, rng.randrange(EXAMPLES))


def graph_nodes(outputs: list[Tensor]) -> list:
    found, stack = [], [o.grad_fn for o in outputs if o.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node not in found:
            found.append(node)
            stack += [c for c, _ in nodes.edges(node) if c is not None]
    return [n for n in found if nodes.leaf_variable(n) is None]


def contributions(node: object, cotangents: list, layouts: list, example: int) -> list:
    masked = [
        None if g is None or layout is None else torch.where(layout.owner == example, g, 0.0)
        for g, layout in zip(cotangents, layouts, strict=True)
    ]
    return list(nodes.call(node, masked))


def check_node(node: object, rng: random.Random, seen: dict) -> None:
    """Raise AssertionError where a derived layout claims too much."""
    name = nodes.op_name(node)
    if not ops.understands(name):
        return
    metas = nodes.metas(node)
    if any(0 in m.shape for m in metas):
        return
    shapes = [None if c is None else nodes.metas(c)[n].shape for c, n in nodes.edges(node)]
    choices = [list(maps(m.shape, rng)) for m in metas]
    if len(metas) == 1:
        combinations = [[layout] for layout in choices[0]]
    else:  # all outputs alike, each output alone, and mixtures
        combinations = [
            [of[k] if k < len(of) else None for of in choices] for k in range(len(choices[0]))
        ]
        combinations += [[layout if i == n else None for i in range(len(metas))]
                         for n, of in enumerate(choices) for layout in of]  # fmt: skip
        combinations += [[rng.choice([None, *of]) for of in choices] for _ in range(12)]
    if metas[0].shape:  # another without a shape is the gradient of an input that needs none
        combinations = [
            [of if m.shape else None for of, m in zip(layouts, metas, strict=True)]
            for layouts in combinations
        ]
    for layouts in combinations:
        if all(layout is None for layout in layouts):
            continue
        cotangents = [None if layout is None else torch.randn(m.shape).to(m.dtype)
                      for m, layout in zip(metas, layouts, strict=True)]  # fmt: skip
        with torch.no_grad():
            truth = [contributions(node, cotangents, layouts, e) for e in range(EXAMPLES)]
            if ops.declared(name).owners_of_all is not None or any(
                isinstance(t, Tensor) and t.is_sparse for t in truth[0]
            ):
                truth = [[t if t is None else t.to_dense() for t in row] for row in truth]
        hidden = [rng.random() < 0.15 for _ in shapes]
        for parameter in (False, True) if ops.declared(name).weights else (False,):
            visible = [None if hide else s for s, hide in zip(shapes, hidden, strict=True)]
            if all(s is None for s in visible):
                visible = shapes
            op = Op(node, name, [m.shape for m in metas], visible,
                    [parameter and s is not None for s in visible])  # fmt: skip
            results = ops.transfer(op, layouts)
            assert len(results) == len(visible), name
            for k, (shape, result) in enumerate(zip(visible, results, strict=True)):
                if shape is None:
                    assert result is None
                    continue
                reached = [
                    torch.zeros(shape) if t[k] is None else t[k].expand(shape) for t in truth
                ]
                touched = torch.stack(reached) != 0
                stats = seen.setdefault(name, {"layout": 0, "separable": 0})
                if not isinstance(result, Layout):
                    assert isinstance(result, Why), (name, result)
                    separable = bool((touched.sum(0) <= 1).all())
                    assert result is not Why.MIXING or not separable, (name, layouts)
                    stats["separable"] += separable
                    continue
                stats["layout"] += 1
                assert result.shape == shape, (name, result.shape, shape)
                assert all(o in (1, s) for o, s in zip(result.owner.shape, shape, strict=True)), (
                    name, result.owner.shape, shape)  # fmt: skip
                each = torch.arange(EXAMPLES).reshape(-1, *[1] * len(shape))
                wrong = touched & (result.owner != each)
                assert not wrong.any(), (
                    f"{name} of {visible} -> {[m.shape for m in metas]}, input {k}: elements given to "  # noqa: E501
                    f"one example and reached by another\nout {[x and x.owner for x in layouts]}\n"
                    f"derived {result.owner}\nexample, element {wrong.nonzero().tolist()[:6]}"
                )


def run_case(name: str, number: int, seen: dict) -> None:
    function, shapes = CASES[name][number]
    seed = zlib.crc32(f"{name}{number}".encode())
    for subset in range(1, 2 ** len(shapes)):
        rng = random.Random(seed + subset)
        torch.manual_seed(seed + subset)
        leaves = [
            (torch.rand(s, dtype=torch.float64) * 0.8 + 0.1).requires_grad_(bool(subset >> i & 1))
            for i, s in enumerate(shapes)
        ]
        out = function(*leaves)
        outs = [out] if isinstance(out, Tensor) else list(out)
        for node in graph_nodes(outs):
            check_node(node, rng, seen)


SEEN: dict = {}


@pytest.mark.parametrize("name", CASES)
def test_no_element_is_given_to_a_wrong_example(name: str) -> None:
    for number in range(len(CASES[name])):
        run_case(name, number, SEEN)


# Made by other devices, other releases or not at all by what users call; those of distributed
# wrappers and of compiled models have their own tests, in test_distributed.py, test_sharded.py and
# test_compiled.py.
ELSEWHERE = """
CompiledFunction RegisterPostBackwardFunction _DDPSink batch_norm_backward batch_norm_no_update
batch_norm_with_update conv_depthwise2d conv_depthwise3d convolution_backward_overrideable
convolution_overrideable cudnn_batch_norm cudnn_batch_norm_backward cudnn_convolution
cudnn_convolution_transpose cudnn_grid_sampler cudnn_grid_sampler_backward deg2rad
efficient_attention fft_c2_c fft_c2_r fft_r2_c flash_attention flatten fused_dropout
fused_rms_norm grid_sampler2d_cpu_fallback grid_sampler2d_cpu_fallback_backward imag kl_div
lazy_clone lift lift_fresh linear max_pool2d max_pool2d_backward miopen_batch_norm
miopen_batch_norm_backward miopen_convolution mkldnn_adaptive_avg_pool2d mkldnn_max_pool2d
mkldnn_max_pool3d mkldnn_reshape native_dropout_backward neg_view nnpack_spatial_convolution
pin_memory rad2deg real scaled_dot_product_cudnn_attention scaled_dot_product_efficient_attention
scaled_dot_product_flash_attention scaled_dot_product_fused_attention_overrideable
slow_conv2d_backward slow_conv_dilated3d sparse_addmm special_xlog1py take_along_dim
upsample_lanczos2d_aa upsample_lanczos2d_aa_backward
""".split()


def test_every_op_that_the_cpu_makes_was_tried(request: pytest.FixtureRequest) -> None:
    ran = {
        item.callspec.params["name"]
        for item in request.session.items
        if getattr(item, "originalname", None) == "test_no_element_is_given_to_a_wrong_example"
    }
    if ran != set(CASES):
        return  # somebody runs a few cases by hand
    known = {name for name in ops.known_ops() if ops.understands(name)}
    assert known - set(SEEN) <= set(ELSEWHERE)
    assert all(found["layout"] for found in SEEN.values())
