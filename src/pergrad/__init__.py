"""Exact per-example gradient norms and inner products, for any PyTorch model, unchanged.

    >>> import torch, pergrad
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    >>> losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    >>> pergrad.norms(losses, model, retain_graph=True).shape       # the loss of each, not the mean
    torch.Size([5])
    >>> J = pergrad.gradients(losses, model)                        # (5, P), lazy
    >>> (J @ J.T).shape                                             # inner products
    torch.Size([5, 5])

Every name has an example in its help, `help(pergrad.norms)`.
"""

import gc
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

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
from pergrad.version import __version__ as __version__

if TYPE_CHECKING:
    from pergrad import precondition
    from pergrad.api import backward, dots, explain, gradients, gram, norms, norms_by_parameter
    from pergrad.attribution.curvature import curvature
    from pergrad.attribution.evaluate import evaluate
    from pergrad.attribution.evaluation import Evaluation
    from pergrad.attribution.fit import Fit
    from pergrad.attribution.found import Influence
    from pergrad.attribution.index import Sketch
    from pergrad.attribution.influence import influence
    from pergrad.attribution.quanda import QuandaExplainer
    from pergrad.attribution.sketch import open_sketch, sketch
    from pergrad.calibration import Calibration, calibrate
    from pergrad.checking import Check, check
    from pergrad.clipping import clip
    from pergrad.coverage import Coverage
    from pergrad.matrices import concatenate, load_gradients
    from pergrad.matrix import GradientMatrix
    from pergrad.moments import second_moments
    from pergrad.scans.job import Gradients, Job, MeanGradient
    from pergrad.scans.results import Scores, open_scores
    from pergrad.scans.scan import scan
    from pergrad.steps.step import CompiledStep, compiled
    from pergrad.training.noise_scale import NoiseScale
    from pergrad.training.private import Private
    from pergrad.training.reader import reading
    from pergrad.training.reductions import per_example
    from pergrad.training.run import Run, open_watch
    from pergrad.training.summands import parts
    from pergrad.training.watch import Watch
else:
    # Imported when first asked for: scores are read without torch, and `import pergrad` takes no
    # time. No module here has the name of something in it, which an import would put in its place.
    _LATER = {
        name: module
        for module, names in {
            "api": "backward dots explain gradients gram norms norms_by_parameter",
            "attribution.curvature": "curvature",
            "attribution.evaluate": "evaluate",
            "attribution.evaluation": "Evaluation",
            "attribution.fit": "Fit",
            "attribution.found": "Influence",
            "attribution.quanda": "QuandaExplainer",
            "attribution.index": "Sketch",
            "attribution.influence": "influence",
            "attribution.sketch": "open_sketch sketch",
            "calibration": "Calibration calibrate",
            "checking": "Check check",
            "clipping": "clip",
            "coverage": "Coverage",
            "matrices": "concatenate load_gradients",
            "matrix": "GradientMatrix",
            "moments": "second_moments",
            "scans.job": "Gradients Job MeanGradient",
            "scans.results": "Scores open_scores",
            "scans.scan": "scan",
            "steps.step": "CompiledStep compiled",
            "training.noise_scale": "NoiseScale",
            "training.private": "Private",
            "training.reader": "reading",
            "training.reductions": "per_example",
            "training.run": "Run open_watch",
            "training.summands": "parts",
            "training.watch": "Watch",
        }.items()
        for name in names.split()
    }

    def __getattr__(name: str) -> Any:
        if name == "precondition":  # a module itself
            return _loaded("pergrad.precondition")
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(_loaded(f"pergrad.{_LATER[name]}"), name)
        return value

    def _loaded(module: str) -> ModuleType:
        # Nothing that an import makes is garbage, but its objects may set off a collection of all
        # that torch has made: that takes longer than the import.
        collects = gc.isenabled()
        gc.disable()
        try:
            return import_module(module)
        finally:
            if collects:
                gc.enable()

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "Calibration",
    "Check",
    "CompiledStep",
    "Coverage",
    "Evaluation",
    "FallbackWarning",
    "Fit",
    "GradientMatrix",
    "Gradients",
    "Influence",
    "Job",
    "MeanGradient",
    "MissingExtraError",
    "MixedExamplesError",
    "NoiseScale",
    "PergradError",
    "Private",
    "QuandaExplainer",
    "Run",
    "Scores",
    "Sketch",
    "StoreError",
    "UnsupportedError",
    "UsageError",
    "Watch",
    "WorkerError",
    "WorkerWarning",
    "backward",
    "calibrate",
    "check",
    "clip",
    "compiled",
    "concatenate",
    "curvature",
    "dots",
    "evaluate",
    "explain",
    "gradients",
    "gram",
    "influence",
    "load_gradients",
    "norms",
    "norms_by_parameter",
    "open_scores",
    "open_sketch",
    "open_watch",
    "parts",
    "per_example",
    "precondition",
    "reading",
    "scan",
    "second_moments",
    "sketch",
]
