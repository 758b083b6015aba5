"""Convolutions: one, two and three dimensions, strided, dilated, grouped, transposed.

Owns: lowering `aten.convolution` to `Correlation`; its bias; how ownership moves to its input.
Does not know: patches (the factor forms them, a few examples at a time).
"""

from torch import Tensor

from pergrad.factors import Correlation, Dense, Factor
from pergrad.graph.layout import Layout, smear
from pergrad.graph.ops import Op, Reads, Result, contracted, declare, owners, resized
from pergrad.ops.registry import Served, Situation, by_row, rule
from pergrad.ops.rows import Partition, partition, reduced

KERNEL = {"convolution": 1, "convolution_backward": 2}  # the input that is the kernel

_WITH_BIAS = (
    "convolution", "convolution_overrideable", "cudnn_convolution", "conv_depthwise2d",
    "conv_depthwise3d", "slow_conv2d", "slow_conv3d", "slow_conv_dilated2d",
)  # fmt: skip
_OTHERS = (
    "mkldnn_convolution", "slow_conv_dilated3d", "slow_conv_transpose2d",
    "nnpack_spatial_convolution", "cudnn_convolution_transpose", "miopen_convolution",
)  # fmt: skip
declare(
    "convolution",
    needs=["input", "stride", "padding", "dilation", "transposed", "groups"],
    reads=Reads.MISSING,
    weights=True,
)
declare(*_WITH_BIAS[1:], *_OTHERS, reads=Reads.MISSING, weights=True)


@owners(*_WITH_BIAS, *_OTHERS)
def _convolution(op: Op, out: Layout) -> list[Result]:
    data, *rest = op.in_shapes
    first: Result = None
    if data is not None:
        plain = smear(out, range(1, len(out.shape)))
        first = resized(plain, data)
    return [first, *contracted(rest)]


@rule(*_WITH_BIAS)
def convolution(use: Situation) -> Served:
    """y = conv(x, weight) + bias; the batch is the first dimension."""
    served: Served = {}
    g = use.g
    if 2 in use.operands:
        shape = (g.shape[1], *[1] * (g.dim() - 2))
        bias = reduced(g, use.layout, shape, use.batch)
        served[2] = Dense(bias.values.reshape(use.batch, *use.operands[2].shape))
    rows = partition(use.layout, (0,), use.batch)
    if 1 not in use.operands or rows is None or use.name != "convolution":
        return served
    served[1] = kernel_factor(use, g, use.saved("input"), rows)
    return served


@by_row("convolution")
def _images(use: Situation) -> tuple[str, ...] | None:
    return ("input",)


def kernel_factor(use: Situation, g: Tensor, x: Tensor, rows: Partition) -> Factor | None:
    """The kernel's gradient, from what has the shapes of a convolution's output and input."""
    transposed = bool(use.attr("transposed"))
    shape = use.operands[KERNEL[use.name]].shape
    rank = g.dim() - 2
    still, moving = (x, g) if transposed else (g, x)
    factors: list[Factor] = []
    for left, right in zip(rows.gather(still), rows.gather(moving), strict=True):
        kernel, stride = shape[2:], _each(use, "stride", rank)
        padding, dilation = _each(use, "padding", rank), _each(use, "dilation", rank)
        if left.shape[1] == 1:
            left, right = left[:, 0], right[:, 0]
        else:  # several images of one example: one more dimension, in which the kernel is 1
            left, right = left.transpose(1, 2), right.transpose(1, 2)
            kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
            padding = (0, *padding)
        factors.append(
            Correlation(left, right, kernel=kernel, stride=stride, padding=padding,
                        dilation=dilation, groups=use.attr("groups"), shape=shape)
        )  # fmt: skip
    return rows.place(factors) if factors else None


def _each(use: Situation, field: str, rank: int) -> tuple[int, ...]:
    value = tuple(use.attr(field))
    return value if len(value) == rank else value * rank
