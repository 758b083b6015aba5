"""Per-example gradients of one parameter, factored, and their algebra.

Owns: the classes of factors, exact and lazy. Torch only.
Does not know: graphs, ops, parameters' names.
"""

from pergrad.factors.base import Factor
from pergrad.factors.combined import Beside, Placed, Sum, placed_one_by_one
from pergrad.factors.correlation import Correlation
from pergrad.factors.dense import Dense, Summed, Zero
from pergrad.factors.isometry import Isometry
from pergrad.factors.lazy import Computed, Pulled, Scaled
from pergrad.factors.mapped import Embedded, Mapped, mapped
from pergrad.factors.outer import Both, Outer
from pergrad.factors.products import dots, grams
from pergrad.factors.rows import Rows

__all__ = [
    "Beside",
    "Both",
    "Computed",
    "Correlation",
    "Dense",
    "Embedded",
    "Factor",
    "Isometry",
    "Mapped",
    "Outer",
    "Placed",
    "Pulled",
    "Rows",
    "Scaled",
    "Sum",
    "Summed",
    "Zero",
    "dots",
    "grams",
    "mapped",
    "placed_one_by_one",
]
