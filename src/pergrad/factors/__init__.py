"""Per-example gradients of one parameter, factored, and their algebra.

Owns: the classes of factors, exact and lazy. Torch only.
Does not know: graphs, ops, parameters' names.
"""

from pergrad.factors.algebra import dot, gram
from pergrad.factors.base import Factor
from pergrad.factors.combined import Placed, Sum
from pergrad.factors.correlation import Correlation
from pergrad.factors.dense import Dense, Summed, Zero
from pergrad.factors.lazy import Computed, Pulled, Scaled
from pergrad.factors.mapped import Embedded, Isometry, Mapped
from pergrad.factors.notes import KeptGram, Notes
from pergrad.factors.outer import Outer
from pergrad.factors.rows import Rows
from pergrad.factors.simplify import mapped

__all__ = [
    "Computed",
    "Correlation",
    "Dense",
    "Embedded",
    "Factor",
    "Isometry",
    "KeptGram",
    "Mapped",
    "Notes",
    "Outer",
    "Placed",
    "Pulled",
    "Rows",
    "Scaled",
    "Sum",
    "Summed",
    "Zero",
    "dot",
    "gram",
    "mapped",
]
