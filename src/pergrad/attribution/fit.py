"""A curvature that has been estimated: what it is made of, and what it makes of gradients.

Owns: `Fit`: solving with it, preconditioning by it, and how it prints.
Does not know: how it was estimated, or its files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from pergrad.attribution.blocks import Block
from pergrad.attribution.terms import FewTerms
from pergrad.errors import UsageError
from pergrad.factors import Dense, Factor
from pergrad.matrix import GradientMatrix
from pergrad.precondition import Preconditioner

DAMPING = 0.1  # of the mean of Lambda, for one solve


@dataclass(frozen=True)
class Curved:
    """The curvature of one block: F = Q diag(Lambda) Q', Q = left ⊗ right.

    `A` and `S` are the covariances of the inputs and of the output gradients, (groups, d, d), or
    (groups, d) where only the diagonal is kept; `Lambda` is (groups, rows, columns) in the basis
    of `left` and `right`, None where a side keeps its coordinates.
    """

    block: Block
    Lambda: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    A: Tensor | None = None
    S: Tensor | None = None

    @property
    def mean(self) -> float:
        """The mean of Lambda, which the damping is a share of."""
        return float(self.Lambda.double().mean())

    def rotate(self, G: Tensor) -> Tensor:
        """Into the basis: Ql' G Qr for (K, groups, rows, columns)."""
        G = G if self.left is None else self.left.to(G).mT @ G
        return G if self.right is None else G @ self.right.to(G)

    def back(self, G: Tensor) -> Tensor:
        """Out of the basis."""
        G = G if self.left is None else self.left.to(G) @ G
        return G if self.right is None else G @ self.right.to(G).mT


class Fit(Preconditioner):
    """A curvature (F + damping)⁻¹, made by `pergrad.curvature`. Block-diagonal.

    Each block is a weight with its bias. In the block's own basis F is diagonal, Lambda; the
    damping is a share of Lambda's mean, for each block. `blocks` has one entry per block with `A`,
    `S`, `Lambda`, `left` and `right`.
    """

    def __init__(
        self,
        curved: list[Curved],
        shapes: Mapping[str, tuple[int, ...]],
        about: Mapping[str, Any],
        folder: Path,
        damping: float = DAMPING,
        job: Any = None,
    ) -> None:
        self.curved = curved
        self.shapes = dict(shapes)
        self.about = dict(about)
        self.folder = folder
        self.damping = damping
        self.job = job

    @property
    def blocks(self) -> dict[str, Curved]:
        """The blocks, by their weight's name."""
        return {c.block.weight: c for c in self.curved}

    def in_terms(self, terms: int) -> FewTerms:
        """The inverse as a sum of `terms` Kronecker products, so that factors stay factors.

        An approximation, for gradients of few positions: 8 terms lose next to nothing (an LDS of
        .682 of .682 on digits). Its `off` is how far scores are expected to be off.

        Raises:
            UsageError: it is not a positive number.
        """
        return FewTerms(self, terms)

    @property
    def examples(self) -> int:
        """How many examples it was estimated from."""
        return int(self.about["scored"]["examples"])

    def damped(self, damping: float) -> "Fit":
        """The same curvature with another damping, a share of each block's mean Lambda.

        Raises:
            UsageError: it is not a positive number.
        """
        check_damping(damping)
        return Fit(self.curved, self.shapes, self.about, self.folder, damping, self.job)

    def of_job(self, job: Any) -> "Fit":
        """The same curvature, whose data and model are had by another Job, or by none."""
        return Fit(self.curved, self.shapes, self.about, self.folder, self.damping, job)

    @cached_property
    def added(self) -> dict[str, float]:
        """What the damping adds, for each parameter."""
        found: dict[str, float] = {}
        for c in self.curved:
            # a block that no example reaches has no curvature: any positive number keeps it there
            value = self.damping * c.mean or self.damping
            found |= dict.fromkeys(c.block.names, value)
        return found

    def solve(self, K: Any) -> Any:
        """(F + damping)⁻¹ K.

        Args:
            K: gradients, a GradientMatrix; or directions, name -> (Q, *shape); or one direction,
                name -> tensor of the parameter's shape.

        Returns:
            The same again: a GradientMatrix whose rows are formed, or tensors by name.

        Raises:
            UsageError: K is about other parameters.
        """
        if isinstance(K, GradientMatrix):
            return K.precondition(self)
        self._check_names(K)
        one = all(tuple(t.shape) == self.shapes[n] for n, t in K.items())
        rows = {n: t[None] if one else t for n, t in K.items()}
        solved = self.solve_rows(rows)
        return {n: solved[n][0] if one else solved[n] for n in K}

    def solve_rows(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same for name -> (K, *shape)."""
        found: dict[str, Tensor] = {}
        for c in self.curved:
            found |= self.solve_block(c, rows)
        return found

    def solve_block(self, c: Curved, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same of one block's parameters."""
        G = c.block.matrix(rows)
        G = c.back(c.rotate(G) / (c.Lambda.to(G) + self.added[c.block.weight]))
        return c.block.grads(G, self.shapes)

    # --- as a preconditioner ---------------------------------------------------------------------

    def _check_names(self, names: Any) -> None:
        missing = [n for n in self.shapes if n not in names]
        extra = [n for n in names if n not in self.shapes]
        if missing or extra:
            told = ", ".join(f"`{n}`" for n in (missing + extra)[:5])
            raise UsageError(
                f"The curvature in {self.folder} is about other parameters: {told} "
                f"{'are' if len(missing + extra) > 1 else 'is'} only on one side. Pass gradients "
                "for the same parameters as the job that it was estimated for."
            )

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The gradients are for the parameters that the curvature is about."""
        self._check_names(shapes)
        for name, shape in self.shapes.items():
            if tuple(shapes[name]) != shape:
                raise UsageError(
                    f"The curvature in {self.folder} has shape {shape} for `{name}`, and the "
                    f"gradients {tuple(shapes[name])}: it is another model's. Estimate it for "
                    "this one with pergrad.curvature."
                )

    def apply_all(self, factors: Mapping[str, Factor]) -> dict[str, Factor]:
        """Rows, formed: a block's weight and bias are mixed, so no factor stays."""
        solved = self.solve_rows({n: f.dense() for n, f in factors.items()})
        return {n: Dense(solved[n].to(factors[n].dtype)) for n in factors}

    # --- to look at ------------------------------------------------------------------------------

    def __repr__(self) -> str:
        settings = self.about["settings"]
        total = sum(prod(s) for s in self.shapes.values())
        plain = [c for c in self.curved if c.block.how == "diagonal"]
        alone = sum(prod(c.Lambda.shape) for c in plain)
        lines = [
            f"Curvature ({settings['kind']}, labels {settings['labels']}) of {total:,} parameters "
            f"from {self.examples:,} examples, damping {self.damping:g} x mean, in {self.folder}",
            f"{'block':30} {'how':9} {'size':>16} {'rank':>9} {'mean':>9} {'damping':>9}",
        ]
        added = self.added
        for c in self.curved:
            N, p, d = c.Lambda.shape
            size = f"{p} x {d}" if N == 1 else f"{N} x {p} x {d}"
            name = " + ".join(c.block.names)
            lines.append(
                f"{name:30} {c.block.how:9} {size:>16} {rank(c):>9} {c.mean:9.2e} "
                f"{added[c.block.weight]:9.2e}"
            )
        lines.append(
            f"{100 - 100 * alone / total:.1f} % of the parameters in blocks"
            + (f"; on the diagonal alone: {', '.join(f'`{c.block.weight}`' for c in plain)}"
               if plain else "")
        )  # fmt: skip
        return "\n".join(lines)


def rank(c: Curved) -> int:
    """How many eigenvalues are above rounding."""
    most = c.Lambda.max()
    return int((c.Lambda > most * 1e-6).sum()) if float(most) > 0 else 0


def check_damping(damping: object) -> float:
    """A positive number.

    Raises:
        UsageError: it is not.
    """
    good = isinstance(damping, (int, float)) and not isinstance(damping, bool)
    if not good or not 0 < float(damping) < float("inf"):  # type: ignore[arg-type]
        raise UsageError(
            f"damping is {damping!r}; pass a positive number, the share of each block's mean "
            f"curvature that is added (default {DAMPING}). Without damping the smallest, noisiest "
            "eigenvalues would decide everything."
        )
    return float(damping)  # type: ignore[arg-type]
