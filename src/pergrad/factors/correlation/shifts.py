"""Norms of convolutions from Grams of single pixels, by torch's ops.

Owns: the sum over the terms of a patch.
Does not know: padding, when this is the method to use, and when its result may be trusted.
"""

from itertools import product as every
from math import prod

import torch
from torch import Tensor

from pergrad.factors.numeric import row_dots, row_squares


def shifted(
    g: Tensor,
    x: Tensor,
    groups: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """(n, 2): Σ_ts (g_t·g_s) Σ_k x_{t+k}·x_{s+k}, and |G|²|X|² of the patches X.

    With p + c instead of p + c K products for each pair of positions; no patches are formed. g is
    (n, O, *out), and x (n, C, *spatial) is padded, and cut to just what the kernel sees.
    """
    n, out, spatial = len(g), g.shape[2:], x.shape[2:]
    G = g.reshape(n * groups, -1, prod(out))
    X = x.reshape(n * groups, -1, prod(spatial))
    pairs = torch.bmm(G.mT, G).reshape(n * groups, *out, *out)
    pixels = torch.bmm(X.mT, X).reshape(n * groups, *spatial, *spatial)
    total = pixels.new_zeros(n * groups)
    size = pixels.new_zeros(n * groups)
    alone = X.square().sum(1).reshape(n * groups, *spatial)
    for offset in every(*(range(k) for k in kernel)):
        at = tuple(
            slice(e * k, e * k + s * (o - 1) + 1, s)
            for k, e, s, o in zip(offset, dilation, stride, out, strict=True)
        )
        total = total + row_dots(pairs, pixels[(slice(None), *at, *at)])
        size = size + alone[(slice(None), *at)].flatten(1).sum(1)
    sizes = size * row_squares(G)
    return torch.stack([total.view(n, groups).sum(1), sizes.view(n, groups).sum(1)], 1)
