"""`Outer`: sums of outer products.

Owns: what belongs to the kind: the class, its norms, its products.
Does not know: ops, where g and a came from.
"""

from pergrad.factors.outer.against_rows import gram_with_rows
from pergrad.factors.outer.factor import Outer
from pergrad.factors.outer.norms import Both
from pergrad.factors.outer.products import dot, gram

__all__ = ["Both", "Outer", "dot", "gram", "gram_with_rows"]
