"""Inner products of `Correlation`s, all pairs, with each other and with rows that are formed.

Owns: what is laid out for them, once.
Does not know: other pairs of kinds.
"""

from torch import Tensor

from pergrad.factors.constants import constants
from pergrad.factors.correlation import norms
from pergrad.factors.correlation.factor import Correlation
from pergrad.factors.dense import Dense
from pergrad.factors.numeric import flat
from pergrad.factors.products import grams
from pergrad.factors.workspace import by_chunks, limit


@grams.register(Correlation, Correlation)
def gram(f: Correlation, h: Correlation) -> Tensor | None:
    """Over all patches of both, laid out once instead of anew for each tile, if they fit."""
    count = f.batch + (0 if h is f else h.batch)
    if f._empty or h._empty or count * max(f.patch_bytes, h.patch_bytes) > limit(f.device):
        return None
    one = f.outer(slice(0, f.batch))
    return one.gram(one if h is f else h.outer(slice(0, h.batch)))


@grams.register(Correlation, Dense)
def gram_with_rows(f: Correlation, h: Dense) -> Tensor | None:
    """By torch's own gradients for each example, or from patches, whichever is faster."""
    if f._empty or 0 in (f.batch, h.batch):
        return None
    if norms.torch_forms_faster(f.norm_sizes, constants(f.device, f.dtype)):
        rows, out = flat(h.dense()).to(f.dtype), f._zeros(f.batch, h.batch)
        for some, grads in f.kernels():
            out[some] = grads.flatten(1) @ rows.mT
        return out
    return by_chunks(f.batch, f.patch_bytes, lambda some: f.outer(some).gram(h),
                     like=f._zeros(0), tail=(h.batch,))  # fmt: skip
