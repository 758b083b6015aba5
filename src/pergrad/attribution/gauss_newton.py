"""Products with the whole curvature of a job's mean loss, which is never formed.

Owns: Gauss-Newton and empirical Fisher products of Q directions at once, streamed over a data set.
Does not know: blocks, estimates of the curvature, files.

    Gauss-Newton        (1/N) Σ_b J_b' H_b J_b V    J_b: outputs by parameters, H_b: loss by outputs
    empirical Fisher    (1/N) Σ_b g_b g_b' V        g_b: the gradient of b's loss

For few outputs, the gradients of each output are factors, through which all directions go at once.
For many outputs, J_b v is the derivative of a backward pass by what it started from, so that no op
needs a forward-mode rule; it costs three backward passes for each direction.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pergrad import api
from pergrad.attribution.batches import Batches
from pergrad.attribution.likelihood import Outputs, outputs_of
from pergrad.errors import UnsupportedError

Rows = Mapping[str, Tensor]  # name -> (Q, *shape of the parameter)
PASSES = 3  # backward passes that a direction costs, in units of those that an output costs


@dataclass(frozen=True)
class Curvature:
    """The curvature of a job's mean loss, as a function of directions."""

    batches: Batches
    empirical: bool = False  # labels as they are, instead of what the outputs say
    options: Mapping[str, Any] | None = None  # of the verbs

    def times(self, V: Rows) -> dict[str, Tensor]:
        """name -> (Q, *shape): the curvature times each direction. One pass over the data set.

        Raises:
            UsageError: the job has no outputs, or an example's numbers are not finite.
            UnsupportedError: an op's backward pass cannot be differentiated.
        """
        examples = len(self.batches.job)
        return {n: t / examples for n, t in self.over(range(examples), V).items()}

    def over(self, rows: range, V: Rows) -> dict[str, Tensor]:
        """N times what some neighbouring examples add to that."""
        total = {n: torch.zeros_like(v) for n, v in V.items()}
        product = self._fisher if self.empirical else self._gauss_newton
        for batch in self.batches.over(rows):
            for n, part in product(batch, V).items():
                total[n] += part.to(total[n])
        return total

    def _fisher(self, batch: Any, V: Rows) -> dict[str, Tensor]:
        params = self.batches.params
        J = api.gradients(self.batches.losses(batch), params, **(self.options or {}))
        return J.T @ (J @ V)

    def _gauss_newton(self, batch: Any, V: Rows) -> dict[str, Tensor]:
        count = len(next(iter(V.values())))
        with _twice_differentiable():
            outputs = outputs_of(self.batches, batch)
            _, T, C = outputs.values.shape
            if PASSES * count >= T * C:
                return self._by_outputs(outputs, V)
            return _by_directions(outputs, self.batches.params, V)

    def _by_outputs(self, outputs: Outputs, V: Rows) -> dict[str, Tensor]:
        """Per-example gradients of every output, and all directions through them."""
        params = self.batches.params
        B, T, C = outputs.values.shape
        columns = outputs.values.reshape(B, T * C)
        each = [
            api.gradients(columns[:, k], params, retain_graph=k < T * C - 1, **(self.options or {}))
            for k in range(T * C)
        ]
        U = torch.stack([J @ V for J in each], 1)  # (B, T C, Q)
        HU = outputs.hessian(U.reshape(B, T, C, -1)).reshape(B, T * C, -1)
        total = {n: torch.zeros_like(v) for n, v in V.items()}
        for k, J in enumerate(each):
            for n, part in (J.T @ HU[:, k]).items():
                total[n] += part
        return total


def _by_directions(outputs: Outputs, params: Mapping[str, Tensor], V: Rows) -> dict[str, Tensor]:
    """Direction by direction: J v by differentiating a backward pass, and J' (H J v) by another."""
    z, weights = outputs.values, list(params.values())
    start = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = start.to(z).requires_grad_()
    rows = []
    try:
        back = torch.autograd.grad(z, weights, start, create_graph=True, materialize_grads=True)
        Ju = dict(zip(params, back, strict=True))
        reached = [n for n, g in Ju.items() if g.requires_grad]
        for q in range(len(next(iter(V.values())))):
            v = {n: V[n][q].to(g) for n, g in Ju.items()}
            (Jv,) = torch.autograd.grad(
                [Ju[n] for n in reached], [start], [v[n] for n in reached],
                retain_graph=True, materialize_grads=True,
            )  # fmt: skip
            _check_adjoint(start, Jv, v, Ju)
            HJv = outputs.hessian(Jv[..., None])[..., 0].to(z)
            rows.append(
                torch.autograd.grad(z, weights, HJv, retain_graph=True, materialize_grads=True)
            )
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        raise UnsupportedError(_not_twice(str(error))) from error
    return {n: torch.stack([row[i] for row in rows]) for i, n in enumerate(params)}


def _check_adjoint(u: Tensor, Jv: Tensor, v: Rows, Ju: Rows) -> None:
    """<u, J v> = <J' u, v>. An op whose backward pass cannot be differentiated may say nothing: a
    function marked `once_differentiable` cuts the way to u, and J v would lack what went through.

    Raises:
        UnsupportedError: they differ.
    """
    terms = [u.detach().double() * Jv.double()]
    other = [Ju[n].detach().double() * v[n].double() for n in v]
    off = terms[0].sum() - sum(t.sum() for t in other)
    scale = terms[0].abs().sum() + sum(t.abs().sum() for t in other)
    if bool(off.abs() > torch.finfo(Jv.dtype).eps ** 0.5 * scale):
        raise UnsupportedError(_not_twice("a part of it was left out, without an error"))


def _not_twice(why: str) -> str:
    return (
        "J v needs the derivative of a backward pass, which an op of this model does not give: "
        f"{why}. Use another op, or do without refining: `refine=0`."
    )


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Attention and recurrent layers in forms whose backward passes can be differentiated."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


# --- solving with it ------------------------------------------------------------------------------


@dataclass
class Refining:
    """Conjugate gradients for (curvature + added) X = G, a column for each of Q queries.

    Begins at X = 0; every step is one product with the curvature, and lowers the error in the
    system's own norm. Each query has step sizes of its own.
    """

    X: dict[str, Tensor]
    R: dict[str, Tensor]  # what is left of G
    D: dict[str, Tensor]  # the direction of the next step
    rz: Tensor  # (Q,), R' solve(R)
    steps: int = 0

    @classmethod
    def begin(cls, G: Rows, solve: Callable[[Rows], dict[str, Tensor]]) -> "Refining":
        """Before the first step."""
        Z = solve(G)
        X = {n: torch.zeros_like(g) for n, g in G.items()}
        return cls(X, {n: g.clone() for n, g in G.items()}, Z, inner(G, Z))

    def step(
        self,
        times: Callable[[Rows], dict[str, Tensor]],
        added: Mapping[str, float],
        solve: Callable[[Rows], dict[str, Tensor]],
    ) -> None:
        """One step, preconditioned by `solve`."""
        AD = {n: part + added[n] * self.D[n] for n, part in times(self.D).items()}
        curve = inner(self.D, AD)
        # a query whose gradient is 0, or that is solved to the last digit, stays as it is
        going = (curve > 0) & (self.rz > 0)
        alpha = torch.where(going, self.rz / torch.where(going, curve, 1.0), 0.0)
        for n, x in self.X.items():
            a = alpha.to(x).reshape(-1, *[1] * (x.dim() - 1))
            x += a * self.D[n]
            self.R[n] -= a * AD[n]
        Z = solve(self.R)
        rz = inner(self.R, Z)
        beta = torch.where(going, rz / torch.where(going, self.rz, 1.0), 0.0)
        for n, d in self.D.items():
            self.D[n] = Z[n] + beta.to(d).reshape(-1, *[1] * (d.dim() - 1)) * d
        self.rz = rz
        self.steps += 1

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, to be kept."""
        parts = {"X": self.X, "R": self.R, "D": self.D}
        return {
            "rz": self.rz,
            **{f"{kind} {n}": t for kind, part in parts.items() for n, t in part.items()},
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], steps: int) -> "Refining":
        """What `tensors` gave."""
        X, R, D = (
            {n[2:]: t for n, t in tensors.items() if n.startswith(f"{kind} ")} for kind in "XRD"
        )
        return cls(X, R, D, tensors["rz"], steps)


def inner(X: Rows, Y: Rows) -> Tensor:
    """(Q,), float64: row q of one times row q of the other."""
    each = [(x.double() * Y[n].double()).reshape(len(x), -1).sum(1) for n, x in X.items()]
    return torch.stack(each).sum(0)


def lengths(X: Rows) -> Tensor:
    """(Q,), float64: the norm of every row."""
    return inner(X, X).sqrt()
