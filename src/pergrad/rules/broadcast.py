"""Elementwise ops and copies in which a parameter is broadcast over examples.

Owns: position embeddings, layer scales, biases, class tokens, any elementwise function.
Does not know: which dimension holds the examples; layouts say so.
"""

from torch import Tensor

from pergrad.factors import Dense
from pergrad.graph import nodes
from pergrad.graph.layout import reshape
from pergrad.graph.transfer import ELEMENTWISE
from pergrad.rules.positions import reduced
from pergrad.rules.registry import Served, Situation, rule


def _serve(use: Situation, local: dict[int, Tensor]) -> Served:
    served: Served = {}
    for slot, values in local.items():
        served[slot] = reduced(values, use.layout, use.operands[slot].shape, use.batch)
    return served


@rule(*sorted(ELEMENTWISE), calls_node=True)
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


@rule("expand")
def expand(use: Situation) -> Served:
    """A parameter copied to every example, such as a class token."""
    return _serve(use, {0: use.g})


@rule("repeat")
def repeat(use: Situation) -> Served:
    """A parameter tiled, such as a normalisation's scale once for every example."""
    shape, out = use.operands[0].shape, use.layout.shape
    lead = len(out) - len(shape)
    folded, kept = list(out[:lead]), [1] * lead
    for size, total in zip(shape, out[lead:], strict=True):
        folded += [total // size if size else 1, size]
        kept += [1, size]
    factor = reduced(use.g.reshape(folded), reshape(use.layout, folded), kept, use.batch)
    return {0: Dense(factor.values.reshape(use.batch, *shape))}
