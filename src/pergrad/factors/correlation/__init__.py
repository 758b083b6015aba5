"""`Correlation`: weight gradients of convolutions.

Owns: what belongs to the kind: the class, its norms, its products.
Does not know: ops.
"""

from pergrad.factors.correlation.factor import Correlation

__all__ = ["Correlation"]
