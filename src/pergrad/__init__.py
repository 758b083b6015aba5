"""Exact per-example gradient norms and inner products, for any PyTorch model, unchanged.

losses = F.cross_entropy(model(x), y, reduction="none")     # (B,)
pergrad.norms(losses, model)                                # (B,)
J = pergrad.gradients(losses, model)                        # lazy (B, P)
J @ K.T                                                     # inner products
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    MissingExtraError,
    MixedExamplesError,
    PergradError,
    StoreError,
    UnsupportedError,
    UsageError,
    WorkerError,
    WorkerWarning,
)
from pergrad.matrix import GradientMatrix

if TYPE_CHECKING:
    from pergrad.calibration import Calibration, calibrate
    from pergrad.scores.job import Job, MeanGradient
    from pergrad.scores.results import Scores, open_scores
    from pergrad.scores.scan import scan

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Check",
    "Coverage",
    "FallbackWarning",
    "GradientMatrix",
    "Job",
    "MeanGradient",
    "MissingExtraError",
    "MixedExamplesError",
    "PergradError",
    "Scores",
    "StoreError",
    "UnsupportedError",
    "UsageError",
    "WorkerError",
    "WorkerWarning",
    "backward",
    "calibrate",
    "check",
    "clip",
    "dots",
    "explain",
    "gradients",
    "gram",
    "norms",
    "norms_by_parameter",
    "open_scores",
    "precondition",
    "scan",
]

# Imported when first asked for: `import pergrad` stays as light as torch allows.
_LATER = {
    "Calibration": "pergrad.calibration",
    "Job": "pergrad.scores.job",
    "MeanGradient": "pergrad.scores.job",
    "Scores": "pergrad.scores.results",
    "calibrate": "pergrad.calibration",
    "open_scores": "pergrad.scores.results",
    "scan": "pergrad.scores.scan",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LATER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
