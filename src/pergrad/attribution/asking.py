"""What is asked of `influence`: its arguments, checked, and the method that follows from them.

Owns: which arguments go together, their defaults, and every message about them.
Does not know: passes over the data, files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from torch import nn

from pergrad.attribution import kernel
from pergrad.attribution.adam import Adam, adam_of
from pergrad.attribution.batches import Batches, described
from pergrad.attribution.fit import DAMPING, Fit, check_damping
from pergrad.attribution.terms import check_terms
from pergrad.errors import UsageError
from pergrad.scans.checkpoints import Checkpoint
from pergrad.scans.job import Job

REFINED_DAMPING = 1.0  # of the mean of Lambda, measured: with .1 five steps are worse than none
STEPS = 5


@dataclass(frozen=True)
class Asked:
    """A method and what it needs."""

    method: str  # "dots", "cosines", "less", "solve", "refined" or "kernel"
    fit: Fit | None = None  # with the damping that is used
    refine: int = 0
    checkpoints: tuple[Checkpoint, ...] = ()
    rates: tuple[float, ...] = (1.0,)
    adam: tuple[Adam, ...] = ()
    top: int | None = None
    damping: float | None = None
    hashes: tuple[str, ...] = field(default=())
    terms: int | None = None

    @property
    def cosine(self) -> bool:
        """Whether gradients are taken to norm 1."""
        return self.method == "cosines"

    @property
    def formed(self) -> bool:
        """Whether the queries' gradients are formed."""
        return self.method in ("less", "solve", "refined")

    def unit(self, data: bool) -> str:
        """What a score of 1 is, of queries given as a data set or as a Job."""
        if self.method in ("solve", "refined", "kernel"):
            moves = "query's loss falls" if data else "measurement rises"
            return (
                f"how far the {moves}, to first order, if the example counts once more (w[i] + 1 "
                "in the mean loss (1/N) sum of w[i] loss[i])"
                + (f"; inverse approximated by {self.terms} terms" if self.terms else "")
            )
        weighted = " times its rate, summed over checkpoints" if self.checkpoints else ""
        named = {"dots": "inner product of gradients", "cosines": "cosine of gradients",
                 "less": "cosine of Adam's step and the query's gradient"}  # fmt: skip
        return named[self.method] + weighted

    def settings(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "method": self.method,
            "refine": self.refine,
            "damping": self.damping,
            "checkpoints": list(self.hashes),
            "rates": list(self.rates),
            "adam": [each.hash() for each in self.adam],
            "top": self.top,
            **({} if self.terms is None else {"terms": self.terms}),
        }

    def fitted(self) -> dict[str, Any] | None:
        """What the curvature is of, for the manifest."""
        if self.fit is None:
            return None
        return {name: self.fit.about[name] for name in ("scored", "settings")}

    def check_weights(self, job: Job) -> None:
        """The curvature is of the job's model as it is now.

        Raises:
            UsageError: it is of other parameters, dtypes or weights.
        """
        assert self.fit is not None
        self.fit.check({n: tuple(p.shape) for n, p in Batches(job, 1).params.items()})
        was, now = self.fit.about["scored"], described(job)
        for (name, _, before), (_, _, after) in zip(
            was["parameters"], now["parameters"], strict=True
        ):
            if before != after:
                raise UsageError(
                    f"The curvature in {self.fit.folder} is of `{name}` in {before}, and it is "
                    f"{after} now. Estimate it for this model with pergrad.curvature."
                )
        if was["weights_hash"] != now["weights_hash"]:
            raise UsageError(
                f"The curvature in {self.fit.folder} is of a model with other weights or buffers. "
                "Estimate it for this one with pergrad.curvature, or bring back the weights that "
                "it was estimated at."
            )


def asked(
    job: Job,
    curvature: Any,
    refine: Any,
    checkpoints: Any,
    rates: Any,
    cosine: bool,
    adam: Any,
    method: Any,
    top: Any,
    damping: Any,
    terms: Any = None,
) -> Asked:
    """The method, from the arguments of `influence`.

    Raises:
        UsageError: one of them is wrong, or two do not go together.
    """
    if method not in (None, "kernel"):
        raise UsageError(
            f'method is {method!r}; pass "kernel", or None: the other methods follow from what '
            "else is given."
        )
    given = {
        "curvature": curvature is not None, "checkpoints": checkpoints is not None,
        "cosine": bool(cosine), "adam": adam is not None, 'method="kernel"': method is not None,
    }  # fmt: skip
    for one, other, why in (
        ("curvature", "cosine", "a cosine compares gradients as they are"),
        ("curvature", "checkpoints", "a curvature belongs to the weights of one checkpoint"),
        ("curvature", "adam", "LESS takes Adam's steps in the place of a curvature"),
        ("curvature", 'method="kernel"', "the kernel is a curvature of its own"),
        ("cosine", 'method="kernel"', "a cosine compares gradients as they are"),
        ("checkpoints", 'method="kernel"', "the kernel belongs to the weights of one checkpoint"),
        ("adam", 'method="kernel"', "LESS takes Adam's steps in the place of a curvature"),
    ):
        if given[one] and given[other]:
            raise UsageError(f"{one} and {other} do not go together: {why}. Leave out one of them.")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise UsageError(f"top is {top!r}; pass a positive number, or None for every pair.")
    if curvature is not None and not isinstance(curvature, Fit):
        raise UsageError(
            f"curvature is a {type(curvature).__name__}. Pass what pergrad.curvature returns. "
            "For one in a folder call pergrad.curvature(job, folder) again, which opens it."
        )
    if refine is not None and (isinstance(refine, bool) or not isinstance(refine, int)
                               or refine < 0):  # fmt: skip
        raise UsageError(f"refine is {refine!r}; pass a number of steps, 0 for none.")
    if refine is not None and curvature is None:
        raise UsageError(
            "refine takes steps towards a solve with a curvature, and none is given: pass "
            "curvature=pergrad.curvature(job, ...)."
        )
    check_terms(terms)
    if terms is not None and curvature is None:
        raise UsageError(
            "terms are those of a curvature's inverse, and none is given: pass "
            "curvature=pergrad.curvature(job, ...)."
        )
    if terms is not None and refine != 0:
        raise UsageError(
            "terms approximate the curvature's inverse, and refining solves with it exactly: pass "
            "refine=0, or leave out terms."
        )
    if damping is not None:
        check_damping(damping)
        if curvature is None and method is None:
            raise UsageError(
                "damping is added to a curvature, and none is given: pass curvature=, or "
                'method="kernel".'
            )
    if curvature is not None:
        return _with_curvature(curvature, STEPS if refine is None else refine, top, damping, terms)
    if method == "kernel":
        kernel.check_size(len(job))
        return Asked("kernel", top=top, damping=kernel.DAMPING if damping is None else damping)
    points, hashes = _checkpoints(job, checkpoints)
    weights = _rates(rates, points)
    moments = _adams(job, adam, max(1, len(points))) if adam is not None else ()
    name = "less" if moments else "cosines" if cosine else "dots"
    return Asked(name, None, 0, points, weights, moments, top, None, hashes)


def _with_curvature(
    fit: Fit, steps: int, top: int | None, damping: float | None, terms: int | None
) -> Asked:
    if damping is None:
        # what is best for one solve is too little for a system of all parameters
        damping = REFINED_DAMPING if steps and fit.damping == DAMPING else fit.damping
    name = "refined" if steps else "solve"
    return Asked(name, fit.damped(damping), steps, top=top, damping=damping, terms=terms)


def _checkpoints(job: Job, checkpoints: Any) -> tuple[tuple[Checkpoint, ...], tuple[str, ...]]:
    if checkpoints is None:
        return (), ()
    if isinstance(checkpoints, (str, Mapping, nn.Module)) or not isinstance(checkpoints, Sequence):
        raise UsageError(
            f"checkpoints is a {type(checkpoints).__name__}. Pass a list of state dicts, files or "
            "modules."
        )
    if not checkpoints:
        raise UsageError("checkpoints is empty. Pass at least one, or None for the model as it is.")
    points = tuple(Checkpoint(source, i) for i, source in enumerate(checkpoints))
    for point in points:
        point.check(job.model)
    return points, tuple(point.hash() for point in points)


def _rates(rates: Any, points: tuple[Checkpoint, ...]) -> tuple[float, ...]:
    if rates is None:
        return (1.0,) * max(1, len(points))
    if not points:
        raise UsageError("rates are those of checkpoints, and none is given: pass checkpoints=.")
    values = [float(rate) for rate in rates]
    if len(values) != len(points):
        raise UsageError(
            f"There are {len(values)} rates for {len(points)} checkpoints. Pass one for each."
        )
    for i, rate in enumerate(values):
        if not isfinite(rate) or rate < 0:
            raise UsageError(f"rates[{i}] is {rate}; pass a learning rate, not below 0.")
    return tuple(values)


def _adams(job: Job, adam: Any, count: int) -> tuple[Adam, ...]:
    states = [adam] if isinstance(adam, Mapping) or not isinstance(adam, Sequence) else list(adam)
    if len(states) != count:
        raise UsageError(
            f"adam has {len(states)} states for {count} checkpoints. Pass "
            "`optimizer.state_dict()` of each checkpoint's step."
        )
    params = Batches(job, 1).params
    found = tuple(adam_of(state, job.model, params, i) for i, state in enumerate(states))
    steps: dict[int, int] = {}
    for i, each in enumerate(found):
        if steps.setdefault(each.step, i) != i:
            raise UsageError(
                f"adam[{i}] is of step {each.step}, as adam[{steps[each.step]}] is, so one of them "
                "is not of its checkpoint's step. Pass the state that was saved with each."
            )
    return found
