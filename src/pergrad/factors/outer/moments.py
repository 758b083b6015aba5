"""Second moments of `Outer`: of one position as a product of squares, else in a reused buffer.

Owns: the two formulas.
Does not know: other factors. Everything here works on the tensors g (B,N,T,p) and a (B,N,T,d).
"""

import torch
from torch import Tensor

from pergrad.factors.numeric import added, ordinary, product, result_dtype, squared
from pergrad.factors.workspace import chunks, lent, scratch

# Powers of two beyond these could not be told from infinity or zero in float32.
_MOST_EXPONENT = 100.0


def squares(g: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """g² and a² for T = 1, whose product is (g aᵀ)²: each of them within the range of the dtype.

    g of 1e-25 times a of 1e25 is 1, but float32 holds no square of either. So both are brought to
    the same size first, by a power of two for each example, which rounds nothing.
    """
    with torch.no_grad():
        half = ((_largest(a).log2() - _largest(g).log2()) / 2).round()
        half = half.clamp(-_MOST_EXPONENT, _MOST_EXPONENT)
        half = torch.where(half.isfinite(), half, 0.0)
    return squared(g * half.exp2()), squared(a * (-half).exp2())


def _largest(x: Tensor) -> Tensor:
    """Of the absolute values, over the last dimension."""
    x = x.detach()
    # not vector_norm(x, inf), nor x.abs(): on a CPU they take 12 times and twice as long
    return torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))


def direct(g: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """(N, p, d): form gᵀ a in one reused buffer, square, add up. B N T p d multiply-adds."""
    dtype = result_dtype(g, a)
    B, N, _, p = g.shape
    d = a.shape[3]
    budget = scratch(g.device)
    row = d * dtype.itemsize
    each = p * row
    groups = chunks(N, each, budget)
    spans = chunks(p, row, budget) if each > budget else [slice(0, p)]
    widest = groups[0].stop * spans[0].stop
    examples = chunks(B, widest * row, budget)
    live = not ordinary(g, a, c)

    def piece(group: slice, span: slice, buffer: Tensor | None) -> Tensor:
        total = g.new_zeros((group.stop - group.start) * (span.stop - span.start) * d, dtype=dtype)
        for rows in examples:
            left, right = g[rows, group, :, span], a[rows, group]
            formed = squared(product(left, right, dtype, buffer).flatten(1))
            total = added(total, torch.mv(formed.mT, c[rows]))
        return total.view(group.stop - group.start, span.stop - span.start, d)

    def pieces(buffer: Tensor | None) -> Tensor:
        bands = [torch.cat([piece(n, s, buffer) for s in spans], 1) for n in groups]
        return torch.cat(bands)

    if live:
        return pieces(None)
    with lent(examples[0].stop * widest * d, dtype, g.device) as buffer:
        return pieces(buffer)
