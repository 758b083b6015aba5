"""`Correlation`: weight gradients of convolutions.

Owns: what belongs to the kind: the class, its norms, its products.
Does not know: ops.
"""

from pergrad.factors.correlation.factor import Correlation
from pergrad.factors.correlation.products import gram, gram_with_rows

__all__ = ["Correlation", "gram", "gram_with_rows"]
