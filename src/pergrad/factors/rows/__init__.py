"""`Rows`: gradients of a table by the rows that were looked up.

Owns: what belongs to the kind: the class, its norms, its products.
Does not know: ops, padding conventions.
"""

from pergrad.factors.rows.factor import Rows
from pergrad.factors.rows.products import gram

__all__ = ["Rows", "gram"]
