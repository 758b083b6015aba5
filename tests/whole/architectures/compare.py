"""One architecture against the naive loop.

Owns: the loop (one `torch.autograd.grad` per example), the comparison, and its record.
Does not know: which architectures there are.
"""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import pergrad

from .compiled import NotCompiled, compiled, kept, reasons, torchs_own_error
from .registry import Architecture


@dataclass
class Result:
    """What came out for one architecture; every number is the worst over batches and examples."""

    name: str
    family: str
    dtype: str = ""
    parameters: int = 0
    examples: int = 0
    # All relative to the norms of the examples' gradients, but `by_parameter`: relative to the norm
    # of the example's gradient of that one parameter.
    norms: float = 0.0
    gram: float = 0.0
    dots: float = 0.0
    gradients: float = 0.0
    by_parameter: float = 0.0
    missing: list[str] = field(default_factory=list)  # zero here, not zero in the loop
    unreached: int = 0  # zero in both
    by_rule: float = 0.0
    fallback_ops: list[str] = field(default_factory=list)
    refused: str = ""
    error: str = ""
    seconds: float = 0.0
    tolerance: float = 1e-6
    # Of a compiled model: by which backend, in how many regions, at what parameters of regions are
    # left to the fallback, and torch's own error, if it cannot compile or run the model.
    backend: str = ""
    regions: int = 0
    left: list[str] = field(default_factory=list)
    not_compiled: str = ""

    @property
    def worst(self) -> float:
        """The largest error relative to the example's norm."""
        return max(self.norms, self.gram, self.dots, self.gradients)

    @property
    def ok(self) -> bool:
        """Nothing missing, nothing wrong, no crash."""
        return not self.error and not self.missing and self.worst <= self.tolerance


Rows = dict[str, Tensor]  # name -> (B, *shape)


def named(params: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names and tensors of what is trained."""
    pairs = params.named_parameters() if isinstance(params, nn.Module) else params.items()
    return {name: p for name, p in pairs if p.requires_grad}


def loop(losses: Tensor, params: Mapping[str, Tensor]) -> Rows:
    """The gradient of each loss by a backward pass of its own, through the same graph."""
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    for loss in losses:
        grads = torch.autograd.grad(
            loss, list(params.values()), retain_graph=True, allow_unused=True
        )
        for (name, p), g in zip(params.items(), grads, strict=True):
            rows[name].append(torch.zeros_like(p) if g is None else g)
    return {name: torch.stack(values).detach() for name, values in rows.items()}


def _matrix(rows: Tensor) -> Tensor:
    return rows.reshape(rows.shape[0], -1)


def _dot(one: Rows, two: Rows) -> Tensor:
    """(B, K), in float64: sums over millions of numbers would not be exact in float32."""
    return sum(_matrix(one[name]).double() @ _matrix(two[name]).double().T for name in one)  # type: ignore[return-value]


def _relative(got: Tensor, wanted: Tensor, scale: Tensor) -> float:
    """Largest difference in units of `scale`; infinite if anything is not a number."""
    return _worst((got - wanted).abs() / scale)


def _worst(errors: Tensor) -> float:
    return float(errors.max()) if bool(torch.isfinite(errors).all()) else float("inf")


def compare(case: Architecture, backend: str = "") -> Result:
    """Norms, Gram, inner products and every single gradient against the loop.

    `backend`: compiled by it before, for `torch.compile`.
    """
    result = Result(case.name, case.family, str(case.dtype).removeprefix("torch."))
    result.tolerance, result.backend = case.tolerance, backend
    start = time.perf_counter()
    problem = case.problem()
    if backend:
        try:
            problem, result.regions = compiled(problem, backend)
        except NotCompiled as error:
            result.not_compiled = str(error)
            return result
    params = named(problem.params)
    result.parameters = sum(p.numel() for p in params.values())
    options: dict[str, object] = {"retain_graph": True}
    earlier: tuple[pergrad.GradientMatrix, Rows] | None = None
    alive: set[str] = set()
    for number in range(case.batches):
        losses = problem.losses(number)
        result.examples = losses.shape[0]
        if number == 0:
            try:
                coverage = pergrad.explain(losses, problem.params)
            except Exception:
                if backend and (says := torchs_own_error(problem.losses(0), params)):
                    result.not_compiled = says
                    return result
                raise
            result.by_rule = coverage.exact_share + coverage.unreached_share
            result.fallback_ops = sorted({r.op for r in coverage.rows if r.how == "fallback"})
            result.left = reasons(coverage)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", pergrad.FallbackWarning)
                    pergrad.norms(losses, problem.params, **options)
            except pergrad.MixedExamplesError as refusal:
                result.refused = str(refusal)
                options["on_mixing"] = "exact"
        with kept(losses):
            rows = loop(losses, params)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pergrad.FallbackWarning)
            earlier = _batch(result, losses, problem.params, rows, options, earlier)
        alive |= {name for name, g in rows.items() if bool((g != 0).any())}
    result.unreached = len(params) - len(alive)
    result.seconds = time.perf_counter() - start
    return result


def _batch(
    result: Result,
    losses: Tensor,
    params: nn.Module | Mapping[str, Tensor],
    rows: Rows,
    options: dict[str, object],
    earlier: tuple[pergrad.GradientMatrix, Rows] | None,
) -> tuple[pergrad.GradientMatrix, Rows]:
    tiny = torch.finfo(torch.float64).tiny
    gram = _dot(rows, rows)
    norms = gram.diagonal().sqrt().clamp_min(tiny)
    got = pergrad.norms(losses, params, **options)
    result.norms = max(result.norms, _relative(got, norms, norms))
    got = pergrad.gram(losses, params, **options)
    result.gram = max(result.gram, _relative(got, gram, norms[:, None] * norms))

    direction = {name: torch.randn_like(g[0]) for name, g in rows.items()}
    length = sum(v.double().square().sum() for v in direction.values()).sqrt()  # type: ignore[union-attr]
    wanted = _dot(rows, {name: v[None] for name, v in direction.items()})[:, 0]
    got = pergrad.dots(losses, params, against=direction, **options)
    result.dots = max(result.dots, _relative(got, wanted, norms * length))

    J = pergrad.gradients(losses, params, **options)
    others, other_rows = earlier or (J, rows)
    other_norms = _dot(other_rows, other_rows).diagonal().sqrt().clamp_min(tiny)
    got = pergrad.dots(losses, params, against=others, **options)
    wanted = _dot(rows, other_rows)
    result.dots = max(result.dots, _relative(got, wanted, norms[:, None] * other_norms))

    for name, g in J.dense().items():
        apart = _matrix(g - rows[name]).norm(dim=1)
        own = _matrix(rows[name]).norm(dim=1)
        result.gradients = max(result.gradients, _worst(apart / norms))
        # Below this share of the whole gradient a parameter's own is rounding noise.
        floor = norms * torch.finfo(g.dtype).eps ** 0.5
        result.by_parameter = max(result.by_parameter, _worst(apart / torch.maximum(own, floor)))
        if bool((own > 0).any()) and not bool((g != 0).any()) and name not in result.missing:
            result.missing.append(name)
    return J, rows
