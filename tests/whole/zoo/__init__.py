"""A zoo of named small hard models, which every verb has to meet. See registry.py."""

from zoo import (  # noqa: F401  (importing a module registers its cases)
    convolutions,
    dense,
    functions,
    lookups,
    mixing,
    normalisation,
    recurrent,
    routing,
    sequences,
    shared,
)
from zoo.registry import CASES, Case, Run, each_batch, loss, reference, settled

__all__ = ["CASES", "Case", "Run", "each_batch", "loss", "reference", "settled"]
