"""Whose gradient stands where in the backward graph of a compiled region: aten's ops, one by one.

Owns: `state_after`, from the owners of an op's arguments to those of its results.
Does not know: parameters, factors, autograd's nodes.

The graph is linear in the region's cotangents (its tangents). A value that does not depend on them
has no state. A value in which examples stand apart has a `Layout`. Behind a sum over examples it is
`SUMMED`, and whatever is computed from that alone is so as well. Of all other values nothing is
known (`UNREAD`).
"""

import re
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx

from pergrad.graph import nodes
from pergrad.graph.layout import (
    Layout,
    along,
    compressed,
    merge,
    permute,
    reduce_to,
    reshape,
    smear,
)
from pergrad.graph.ops import positive


class Meets(Enum):
    """Examples do not stand apart."""

    SUMMED = "a sum over examples, of what an end below can be told from"
    UNREAD = "of what is not known"


SUMMED, UNREAD = Meets.SUMMED, Meets.UNREAD
Single = Layout | Meets | None
State = Single | tuple[Single, ...]


def name_of(node: fx.Node) -> str:
    """The op of a node without its overload: "mm", "sum", "getitem"."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    return str(getattr(packet or target, "__name__", target))


class Call:
    """One op of the graph, its arguments by name, and what is known of them."""

    def __init__(self, node: fx.Node, states: dict[fx.Node, State], values: dict[fx.Node, Any]):
        self.node, self.name = node, name_of(node)
        self.states, self.values = states, values
        self.arguments = nodes.arguments_by_name(node)
        # the linear ones, in order
        self.linear = [n for n in node.all_input_nodes if states.get(n) is not None]

    def __getitem__(self, name: str) -> Any:
        """An argument, in which nodes stand for their values."""
        return fx.map_arg(self.arguments[name], self.values.__getitem__)

    def get(self, name: str, default: Any = None) -> Any:
        """An argument that may have been left out."""
        return self[name] if name in self.arguments else default

    def layout(self, node: fx.Node | None = None) -> Layout:
        """Of a linear argument: the only one, or this."""
        state = self.states[node if node is not None else self.linear[0]]
        assert isinstance(state, Layout)
        return state

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the op's only result."""
        return tuple(self.values[self.node].shape)

    @property
    def shapes(self) -> list[tuple[int, ...] | None]:
        """Of all its results."""
        found = self.values[self.node]
        return [None if v is None else tuple(v.shape) for v in found]


Owners = Callable[[Call], State]
_TABLE: dict[str, Owners] = {}


def of_ops(*names: str) -> Callable[[Owners], Owners]:
    """Enter a function into the table, for ops of these names."""

    def add(function: Owners) -> Owners:
        for name in names:
            _TABLE[name] = function
        return function

    return add


# What takes the shape of a tensor and none of its numbers.
_OF_SHAPES = frozenset(
    ("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "zeros_like",
     "ones_like", "full_like", "empty_like")
)  # fmt: skip


def state_after(call: Call) -> State:
    """The owners of an op's results."""
    if not call.linear or call.name in _OF_SHAPES:
        return None
    node = call.node
    if call.name == "getitem":
        whole = call.states[call.linear[0]]
        return whole[node.args[1]] if isinstance(whole, tuple) else whole  # type: ignore[index]
    states = [call.states[n] for n in call.linear]
    if any(s is UNREAD or isinstance(s, tuple) for s in states):
        return UNREAD
    if all(s is SUMMED for s in states):
        return SUMMED
    function = _TABLE.get(call.name)
    if any(s is SUMMED for s in states):
        return UNREAD
    if function is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        function = elementwise
    return UNREAD if function is None else function(call)


def either(layout: Layout | None, otherwise: Meets) -> Single:
    """The layout, if there is one."""
    return otherwise if layout is None else layout


def sized(layout: Layout | None, shape: Sequence[int], otherwise: Meets = UNREAD) -> Single:
    """The same map on a tensor of another size along the dimensions that do not vary."""
    if layout is None or len(shape) != len(layout.shape):
        return otherwise
    if any(o not in (1, s) for o, s in zip(layout.owner.shape, shape, strict=True)):
        return otherwise
    return Layout(tuple(shape), layout.owner)


def broadcast(layout: Layout, shape: Sequence[int]) -> Single:
    """The same map on a tensor that is expanded to a shape."""
    lead = len(shape) - len(layout.shape)
    if lead < 0:
        return UNREAD
    return sized(Layout((1,) * lead + layout.shape, layout.owner[(None,) * lead]), shape)


@of_ops(
    "native_dropout_backward", "_to_copy", "copy", "hardswish_backward", "leaky_relu_backward",
    "elu_backward", "softplus_backward", "log_sigmoid_backward", "hardtanh_backward",
    "hardsigmoid_backward", "mish_backward", "expand", "lift_fresh_copy", "softshrink_backward",
    "hardshrink_backward", "rrelu_with_noise_backward", "logit_backward", "alias", "detach",
    "convert_element_type", "clone", "contiguous", "_conj", "real", "view_of",
)  # fmt: skip
def elementwise(call: Call) -> State:
    """Each element from those at its place, broadcast or not."""
    total: Single = None
    for node in call.linear:
        here = broadcast(call.layout(node), call.shape)
        if not isinstance(here, Layout):
            return UNREAD
        # two examples' gradients, added up
        total = here if total is None else either(merge(total, here), UNREAD)  # type: ignore[arg-type]
        if not isinstance(total, Layout):
            return UNREAD
    return total


@of_ops("mse_loss_backward", "smooth_l1_loss_backward", "huber_loss_backward",
     "soft_margin_loss_backward", "binary_cross_entropy_backward")  # fmt: skip
def _losses(call: Call) -> State:
    return elementwise(call) if call.get("reduction") == 0 else UNREAD


@of_ops("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze")
def _same_order(call: Call) -> State:
    return reshape(call.layout(), call.shape)


@of_ops("permute")
def _permute(call: Call) -> State:
    layout = call.layout()
    return permute(layout, [positive(d, len(layout.shape)) for d in call["dims"]])


@of_ops("t", "transpose")
def _transpose(call: Call) -> State:
    layout = call.layout()
    rank = len(layout.shape)
    order = list(range(rank))
    if call.name == "t":
        return permute(layout, order[::-1])
    one, two = positive(call["dim0"], rank), positive(call["dim1"], rank)
    order[one], order[two] = two, one
    return permute(layout, order)


@of_ops(
    "slice", "select", "split", "split_with_sizes", "unbind", "cat", "stack", "slice_backward",
    "select_backward", "slice_scatter", "select_scatter", "constant_pad_nd", "flip", "roll",
    "repeat", "diagonal", "diagonal_backward", "unfold", "tril", "triu", "narrow", "chunk",
    "unsafe_split", "unsafe_split_with_sizes", "diag_embed", "pixel_shuffle", "pixel_unshuffle",
    "rev",
)  # fmt: skip
def _moved(call: Call) -> State:
    """Ops that move elements, and put zeros: run on the numbers of the owners."""

    def stand_in(node: fx.Node) -> Any:
        if node in call.linear:
            layout = call.layout(node)
            return (layout.owner + 1).expand(layout.shape)
        value = call.values[node]
        return torch.zeros(value.shape, dtype=torch.int64) if isinstance(value, Tensor) else value

    args = fx.map_arg(call.node.args, stand_in)
    kwargs = fx.map_arg(call.node.kwargs, stand_in)
    moved = call.node.target(*args, **kwargs)  # type: ignore[operator]
    if isinstance(moved, Tensor):
        return compressed(moved.shape, moved - 1)
    return tuple(compressed(m.shape, m - 1) for m in moved)


@of_ops("sum", "mean")
def _sum(call: Call) -> State:
    layout = call.layout()
    rank = len(layout.shape)
    dims = call.get("dim") or list(range(rank))
    dims = [positive(d, rank) for d in dims]
    summed = [1 if d in dims else n for d, n in enumerate(layout.shape)]
    return _reshaped(reduce_to(layout, summed), call.shape)


def _reshaped(layout: Layout | None, shape: Sequence[int]) -> Single:
    return SUMMED if layout is None else reshape(layout, shape)


@of_ops("cumsum", "_softmax_backward_data", "_log_softmax_backward_data", "logcumsumexp", "sort")
def _along_dim(call: Call) -> State:
    layout = call.layout()
    return either(smear(layout, [positive(call["dim"], len(layout.shape))]), UNREAD)


@of_ops("mm", "bmm")
def _product(call: Call) -> State:
    return _matrices(call, call.arguments["self"], call.arguments["mat2"])


def _matrices(call: Call, left: Any, right: Any) -> Single:
    if len([n for n in (left, right) if n in call.linear]) != 1:
        return UNREAD
    on_left = left in call.linear
    layout = call.layout(left if on_left else right)
    rank = len(layout.shape)
    plain = smear(layout, [rank - 1 if on_left else rank - 2])
    if plain is None:
        return SUMMED
    return sized(plain, [*layout.shape[: rank - 2], *_last_two(call)])


def _last_two(call: Call) -> tuple[int, ...]:
    return call.shape[-2:]


@of_ops("addmm", "baddbmm")
def _added_product(call: Call) -> State:
    names = ("mat1", "mat2") if call.name == "addmm" else ("batch1", "batch2")
    added, (left, right) = call.arguments["self"], (call.arguments[n] for n in names)
    if added not in call.linear:
        return _matrices(call, left, right)
    first = broadcast(call.layout(added), call.shape)
    if left not in call.linear and right not in call.linear:
        return first
    second = _matrices(call, left, right)
    if not isinstance(first, Layout) or not isinstance(second, Layout):
        return UNREAD
    return either(merge(first, second), UNREAD)


@of_ops("mv", "dot")
def _vector(call: Call) -> State:
    matrix = call.arguments["self"]
    if call.name == "dot" or [matrix] != call.linear:
        return SUMMED if len(call.linear) == 1 else UNREAD
    plain = smear(call.layout(matrix), [1])
    return SUMMED if plain is None else Layout(call.shape, plain.owner[:, 0])


@of_ops("convolution")
def _convolution(call: Call) -> State:
    if call.linear != [call.arguments["input"]]:
        return UNREAD
    layout = call.layout()
    return sized(smear(layout, range(1, len(layout.shape))), call.shape)


@of_ops("convolution_backward")
def _convolution_backward(call: Call) -> State:
    if call.linear != [call.arguments["grad_output"]]:
        return UNREAD
    layout, shapes = call.layout(), call.shapes
    plain = smear(layout, range(1, len(layout.shape)))
    below = UNREAD if plain is None else SUMMED
    first = None if shapes[0] is None else sized(plain, shapes[0])
    return first, below, below


@of_ops("native_layer_norm_backward", "_fused_rms_norm_backward")
def _layer_norm_backward(call: Call) -> State:
    if call.linear != [call.arguments["grad_out"]]:
        return UNREAD
    layout = call.layout()
    rank, count = len(layout.shape), len(call["normalized_shape"])
    plain = smear(layout, range(rank - count, rank))
    first = either(plain, UNREAD)
    below: list[Single] = [
        None if s is None else UNREAD if plain is None else SUMMED for s in call.shapes[1:]
    ]
    return first, *below


@of_ops("native_group_norm_backward")
def _group_norm_backward(call: Call) -> State:
    if call.linear != [call.arguments["grad_out"]]:
        return UNREAD
    layout = call.layout()
    plain = smear(layout, range(1, len(layout.shape)))
    below = UNREAD if plain is None else SUMMED
    return either(plain, UNREAD), below, below


@of_ops("native_batch_norm_backward", "cudnn_batch_norm_backward", "miopen_batch_norm_backward",
     "batch_norm_backward")  # fmt: skip
def _batch_norm_backward(call: Call) -> State:
    grad = call.arguments.get("grad_out", call.arguments.get("grad_output"))
    if call.linear != [grad]:
        return UNREAD
    layout = call.layout()
    channel = smear(layout, [d for d in range(len(layout.shape)) if d != 1])
    training = call.get("train", call.get("update", True))
    first = either(channel if training else layout, UNREAD)
    below: Single = SUMMED if call.name == "native_batch_norm_backward" else UNREAD
    if channel is not None:  # instance norm is a batch norm over (1, B * C, ...)
        dims = [d for d in range(len(layout.shape)) if d != 1]
        count = layout.shape[1]
        below = along((count,), 0, channel.owner.amax(dims).expand(count))
    return first, below, below


_IN_IMAGES = """
avg_pool2d_backward avg_pool3d_backward max_pool2d_with_indices_backward
max_pool3d_with_indices_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward
adaptive_max_pool2d_backward adaptive_max_pool3d_backward reflection_pad1d_backward
reflection_pad2d_backward reflection_pad3d_backward replication_pad1d_backward
replication_pad2d_backward replication_pad3d_backward upsample_nearest1d_backward
upsample_nearest2d_backward upsample_nearest3d_backward _upsample_nearest_exact2d_backward
upsample_bilinear2d_backward upsample_bicubic2d_backward upsample_linear1d_backward
upsample_trilinear3d_backward _upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa_backward
""".split()


@of_ops(*_IN_IMAGES)
def _image(call: Call) -> State:
    layout = call.layout()
    spatial = re.search(r"([123])d", call.name)
    assert spatial is not None
    rank = len(layout.shape)
    plain = smear(layout, range(rank - int(spatial[1]), rank))
    return sized(plain, call.shape)


@of_ops(
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_cudnn_attention_backward",
)
def _attention(call: Call) -> State:
    """(batch, heads, positions, width): nothing passes from one element of the batch to another."""
    layout = call.layout()
    if len(call.linear) != 1:
        return UNREAD
    plain = smear(layout, range(1, len(layout.shape)))
    return tuple(None if s is None else sized(plain, s) for s in call.shapes)


@of_ops("nll_loss_backward")
def _nll(call: Call) -> State:
    if call["reduction"] != 0 or call.linear != [call.arguments["grad_output"]]:
        return UNREAD
    layout = call.layout()
    return sized(Layout((*layout.shape, 1), layout.owner[:, None]), call.shape)


@of_ops("nll_loss2d_backward")
def _nll2d(call: Call) -> State:
    if call["reduction"] != 0 or call.linear != [call.arguments["grad_output"]]:
        return UNREAD
    layout = call.layout()
    wide = Layout((layout.shape[0], 1, *layout.shape[1:]), layout.owner[:, None])
    return sized(wide, call.shape)
