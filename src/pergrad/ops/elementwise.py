"""Elementwise ops and copies in which a parameter is broadcast over examples.

Owns: position embeddings, layer scales, biases, any elementwise function; copies and casts.
Does not know: which dimension holds the examples; layouts say so.
"""

from torch import Tensor

from pergrad.factors import Dense
from pergrad.graph import nodes
from pergrad.graph.layout import Layout, reduce_to
from pergrad.graph.ops import Op, Reads, Result, Step, Why, declare, or_why, owners, steps
from pergrad.ops.registry import Served, Situation, by_row, rule
from pergrad.ops.rows import over_rows, reduced

_ELEMENTWISE = """
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
lazy_clone pin_memory copy_backwards sign round floor ceil
""".split()
_COPIES = ("clone", "alias", "to_copy", "lift", "lift_fresh", "lazy_clone")
# What a loss is taken apart by; an op of a scalar, when torch has reduced it.
_LOSSES = {
    "mse_loss": [], "soft_margin_loss": [], "smooth_l1_loss": ["beta"], "huber_loss": ["delta"],
    "binary_cross_entropy": ["weight"],
    "binary_cross_entropy_with_logits": ["weight", "pos_weight"],
}  # fmt: skip
_RULED_APART = {"add", "sub", "rsub", "mul"}
_DECLARED_APART = {*_RULED_APART, "div", "masked_fill", *_LOSSES}
declare("add", "sub", "rsub", needs=["alpha"], reads=Reads.LARGER)
declare("mul", needs=["self", "other"], reads=Reads.LARGER)
declare("div", needs=["other"], reads=Reads.LARGER)
declare("masked_fill", needs=["mask"], reads=Reads.LARGER)
for _name, _fields in _LOSSES.items():
    declare(_name, needs=["reduction", "self", "target", *_fields], reads=Reads.LARGER)
declare(*(name for name in _ELEMENTWISE if name not in _DECLARED_APART), reads=Reads.LARGER)


@owners(*_ELEMENTWISE)
def _elementwise(op: Op, out: Layout) -> list[Result]:
    results: list[Result] = []
    for shape in op.in_shapes:
        if shape is None:
            results.append(None)
        elif len(shape) > len(out.shape):
            results.append(Why.UNKNOWN)
        else:
            results.append(or_why(reduce_to(out, shape), Why.SHARED))
    return results


@steps(*_COPIES, keeps_order=True)
def _uncopy(op: Op, _: int) -> tuple[Step, ...] | None:
    """A cast is an isometry between real numbers."""
    return () if op.real else None


def _serve(use: Situation, local: dict[int, Tensor]) -> Served:
    served: Served = {}
    for slot, values in local.items():
        served[slot] = reduced(values, use.layout, use.operands[slot].shape, use.batch)
    return served


@rule(*(name for name in _ELEMENTWISE if name not in _RULED_APART), calls_node=True)
def elementwise(use: Situation) -> Served:
    """Any elementwise op: its own backward before torch's engine sums the broadcast away."""
    results = nodes.raw_call(use.node, use.cotangents)
    shape = use.layout.shape
    local = {}
    for slot in use.operands:
        value = results[slot]
        if value is not None and tuple(value.shape) == shape:
            local[slot] = value
    return _serve(use, local)


@rule("add", "sub", "rsub")
def add(use: Situation) -> Served:
    """self + alpha * other, self - alpha * other, other - alpha * self."""
    plain = 1 if use.name == "rsub" else 0
    served: Served = {}
    for slot in use.operands:
        factor = reduced(use.g, use.layout, use.operands[slot].shape, use.batch)
        # asked for where it is needed: with a number as the other operand, torch saves no alpha
        by = 1 if slot == plain else use.attr("alpha")
        by = by if slot == plain or use.name == "add" else -by
        served[slot] = factor if by == 1 else Dense(factor.values * by)
    return served


@by_row("add", "sub", "rsub")
def _added_to_rows(use: Situation) -> tuple[str, ...] | None:
    over = (over_rows(operand.shape, use.g.dim()) for operand in use.operands.values())
    return () if all(over) else None


@rule("mul")
def mul(use: Situation) -> Served:
    """self * other."""
    local = {}
    for slot in use.operands:
        other = use.saved(("other", "self")[slot])
        # a number is left to the op itself, and so are complex operands
        if isinstance(other, Tensor) and not use.g.is_complex() and not other.is_complex():
            local[slot] = use.g * other
    return _serve(use, local)
