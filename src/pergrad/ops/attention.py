"""Fused scaled dot-product attention.

Owns: how ownership moves through it: examples lie along its batch, or its batch and its heads.
Does not know: the projections around it, which are matrix products.
"""

from pergrad.graph.layout import Layout, reduce_to, smear
from pergrad.graph.ops import Op, Result, Why, declare, or_why, owners, resized, unknown

_ATTENTION = (
    "scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_flash_attention",
    "scaled_dot_product_efficient_attention", "scaled_dot_product_cudnn_attention",
    "scaled_dot_product_fused_attention_overrideable", "efficient_attention", "flash_attention",
)  # fmt: skip
declare(*_ATTENTION)


@owners(*_ATTENTION)
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
            results.append(resized(plain, shape))
        else:  # a learned or computed bias, broadcast to (batch, heads, queries, keys)
            scores = Layout((*out.shape[:2], *shape[-2:]), plain.owner)
            results.append(or_why(reduce_to(scores, shape), Why.SHARED))
    return results
