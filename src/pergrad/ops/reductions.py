"""Reductions, and ops in which the numbers along some dimensions depend on each other.

Owns: how ownership moves through sums, extrema, softmax, cumulative sums, sorting, Fourier
transforms and the negative log-likelihood.
Does not know: parameters. Whatever one reduces is left to the fallback.
"""

from pergrad.graph.layout import Layout, smear
from pergrad.graph.ops import (
    Op,
    Result,
    Why,
    declare,
    owners,
    owners_of_all,
    positive,
    resized,
    unknown,
)

_OF_ALL = ("sum", "mean", "prod", "max", "min", "median", "norm", "trace")
_OF_SOME = (
    "sum_dim", "mean_dim", "nansum", "logsumexp", "amax", "amin", "norm_dim", "prod_dim",
    "linalg_vector_norm", "var", "std", "max_dim", "min_dim", "median_dim", "nanmedian_dim",
    "kthvalue", "mode",
)  # fmt: skip
_WITH_TWO_OUTPUTS = ("var_mean", "std_mean", "aminmax")
declare(*_OF_ALL)
declare(*_OF_SOME, *_WITH_TWO_OUTPUTS, needs=["dim"])


@owners(*_OF_ALL, *_OF_SOME)
def _reduction(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    dims = None if op.name in _OF_ALL else op.attr("dim")
    dims = [] if dims is None else list(dims) if isinstance(dims, tuple) else [dims]
    dims = sorted(positive(d, len(shape)) for d in dims) or list(range(len(shape)))
    owner = out.owner
    if len(out.shape) != len(shape):
        for dim in dims:
            owner = owner.unsqueeze(dim)
    if owner.dim() != len(shape):
        return [Why.UNKNOWN]
    return [Layout(shape, owner)]


@owners_of_all(*_WITH_TWO_OUTPUTS)
def _two_reductions(op: Op, outs: list[Layout | None]) -> list[Result]:
    """Both outputs reduce the same dimensions."""
    used = [out for out in outs if out is not None]
    if len(used) == 2 and not used[0].same(used[1]):
        return unknown(op)
    return _reduction(op, used[0])


_ALONG_ONE = (
    "softmax", "log_softmax", "safe_softmax", "masked_softmax", "cumsum", "cumprod",
    "logcumsumexp", "cummax", "cummin", "sort", "topk", "glu",
)  # fmt: skip
declare(*_ALONG_ONE, needs=["dim"])


@owners(*_ALONG_ONE)
def _along_one(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    if not shape:
        return [out]
    dim = op.attr("dim")
    plain = smear(out, [positive(-1 if dim is None else dim, len(shape))])  # None: masked_softmax
    return [resized(plain, shape)]


_FOURIER = ("fft_c2_c", "fft_c2_r", "fft_r2_c", "fft_c2c", "fft_c2r", "fft_r2c")
declare(*_FOURIER, needs=["dim"])


@owners(*_FOURIER)
def _fft(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    dims = op.attr("dim")
    plain = smear(out, [positive(d, len(shape)) for d in dims])
    return [resized(plain, shape)]


_OF_CLASSES = ["reduction", "self", "target"]
declare("nll_loss", "nll_loss2d", needs=[*_OF_CLASSES, "weight", "ignore_index", "total_weight"])
declare("multi_margin_loss", needs=[*_OF_CLASSES, "p", "margin", "weight"])
declare("multilabel_margin_loss", needs=_OF_CLASSES)


@owners("nll_loss", "nll_loss2d", "multi_margin_loss", "multilabel_margin_loss")
def _loss_of_classes(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    if len(shape) != len(out.shape) + 1:
        return [Why.UNKNOWN]
    return [resized(Layout((out.shape[0], 1, *out.shape[1:]), out.owner.unsqueeze(1)), shape)]
