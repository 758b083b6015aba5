"""One rule per op family: a use of parameters and its cotangent -> factors.

Owns: what the per-example gradient of each operand looks like.
Does not know: how uses are found, what is computed from factors.
"""

from pergrad.rules import bilinear, broadcast, conv, embedding, experts, linear, norm
from pergrad.rules.linear import data_input, one_for_each
from pergrad.rules.registry import ADDED, Operand, Rule, Served, Situation, calls_node, rule_for

__all__ = [
    "ADDED",
    "Operand",
    "Rule",
    "Served",
    "Situation",
    "calls_node",
    "data_input",
    "one_for_each",
    "rule_for",
]
_ = (bilinear, broadcast, conv, embedding, experts, linear, norm)
