"""One rule per op family: a use of parameters and its cotangent -> factors.

Owns: what the per-example gradient of each operand looks like.
Does not know: how uses are found, what is computed from factors.
"""

from pkgutil import iter_modules

# Each fills the table of ops as it is imported.
from pergrad.ops import (  # noqa: F401
    attention,
    bilinear,
    compiled,
    convolution,
    double_backward,
    elementwise,
    experts,
    fallback,
    indexing,
    joining,
    lookup,
    matmul,
    normalisation,
    outer_product,
    packing,
    pooling,
    recurrent,
    reductions,
    stacking,
    views,
    wrong_in_torch,
)
from pergrad.ops.registry import (
    AtOnce,
    Operand,
    Rule,
    Served,
    Situation,
    calls_node,
    check_imported,
    norms_at_once,
    rule_for,
)

__all__ = [
    "AtOnce",
    "Operand",
    "Rule",
    "Served",
    "Situation",
    "calls_node",
    "norms_at_once",
    "rule_for",
]

check_imported([module.name for module in iter_modules(__path__)], globals())
