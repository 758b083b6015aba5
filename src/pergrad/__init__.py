"""Exact per-example gradient norms and inner products, for any PyTorch model, unchanged.

losses = F.cross_entropy(model(x), y, reduction="none")     # (B,)
pergrad.norms(losses, model)                                # (B,)
J = pergrad.gradients(losses, model)                        # lazy (B, P)
J @ K.T                                                     # inner products
"""

from pergrad import precondition
from pergrad.api import (
    backward,
    clip,
    dots,
    explain,
    gradients,
    gram,
    norms,
    norms_by_parameter,
)
from pergrad.check import Check, check
from pergrad.coverage import Coverage
from pergrad.errors import (
    FallbackWarning,
    MixedExamplesError,
    PergradError,
    UnsupportedError,
    UsageError,
)
from pergrad.matrix import GradientMatrix

__version__ = "0.1.0"

__all__ = [
    "Check",
    "Coverage",
    "FallbackWarning",
    "GradientMatrix",
    "MixedExamplesError",
    "PergradError",
    "UnsupportedError",
    "UsageError",
    "backward",
    "check",
    "clip",
    "dots",
    "explain",
    "gradients",
    "gram",
    "norms",
    "norms_by_parameter",
    "precondition",
]
