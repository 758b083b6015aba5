"""The matrix of per-example gradients, kept as factors.

Owns: `GradientMatrix`, its algebra by parameter name, and the checks that two matrices match.
Does not know: how factors came about.
"""

from collections.abc import Mapping
from functools import partial
from math import prod
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from pergrad import gradient_files, inputs
from pergrad.arrays import as_tensor, whole
from pergrad.engine.late_norms import Doubts, adding_to
from pergrad.engine.user_state import Held
from pergrad.errors import UsageError
from pergrad.factors import Dense, Factor, Zero
from pergrad.factors.numeric import bytes_of
from pergrad.factors.workspace import workspace
from pergrad.inputs import Direction
from pergrad.precondition import Preconditioner


class GradientMatrix:
    """J, (B, P): row b is the gradient of losses[b] with respect to all parameters.

    Kept as one factor per parameter (for a linear layer its inputs and the gradients at its
    outputs), so that it takes the memory of activations, not B times the model. Made by
    `pergrad.gradients`; every method computes from the factors.

    Rows are in the order of the losses, columns in the order of `names`.

        >>> import torch, pergrad
        >>> model = torch.nn.Linear(3, 1)
        >>> x = torch.randn(5, 3)
        >>> J = pergrad.gradients(model(x).squeeze(1), model)
        >>> J.shape
        torch.Size([5, 4])
        >>> (J @ J.T).shape
        torch.Size([5, 5])
    """

    __slots__ = ("_batch", "_chunk_bytes", "_factors", "_held")
    __array_priority__ = 1000

    def __init__(
        self, factors: Mapping[str, Factor], batch: int, chunk_bytes: int | None = None
    ) -> None:
        self._factors = dict(factors)
        self._batch = batch
        self._chunk_bytes = chunk_bytes
        self._held = {name: Held(factor) for name, factor in self._factors.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy. What was changed since is refused here, as the copy cannot tell."""
        self._check_versions()
        return GradientMatrix, (self._factors, self._batch, self._chunk_bytes)

    # --- what it is --------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """(B, P)."""
        return torch.Size((self._batch, sum(prod(f.shape) for f in self._factors.values())))

    def __len__(self) -> int:
        return self._batch

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names, in the order of the columns."""
        return tuple(self._factors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters' shapes by name."""
        return {name: tuple(f.shape) for name, f in self._factors.items()}

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return next(iter(self._factors.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of results: that of the parameters, at least float32."""
        dtype = torch.float32
        for factor in self._factors.values():
            dtype = torch.promote_types(dtype, factor.dtype)
        return dtype

    def __repr__(self) -> str:
        rows, columns = self.shape
        held = self.nbytes
        dense = rows * columns * torch.finfo(self.dtype).bits // 8
        return (
            f"GradientMatrix({rows} examples x {columns:,} parameters in {len(self.names)} "
            f"tensors, {self.dtype}, {self.device}; holds {_bytes(held)}, dense {_bytes(dense)})"
        )

    @property
    def nbytes(self) -> int:
        """What the factors take in memory; `flat()` would take B P numbers."""
        return bytes_of(self._unique_tensors())

    def __array__(self, *args: Any, **options: Any) -> Any:
        """Refused: it would form every gradient, or go through the rows one at a time."""
        raise UsageError(
            "A GradientMatrix is no array: it keeps factors, not gradients. For the matrix itself "
            "write J.flat().numpy(force=True), B times the model; for what most want of it "
            "J.norms(), J.gram() or J @ K.T."
        )

    def _unique_tensors(self) -> list[Tensor]:
        seen = {t.data_ptr(): t for f in self._factors.values() for t in f.tensors()}
        return list(seen.values())

    # --- algebra -----------------------------------------------------------------------------

    def norms(self) -> Tensor:
        """Euclidean norm of every row, (B,)."""
        total = torch.zeros(self._batch, dtype=self.dtype, device=self.device)
        for squares in self._sq_norms().values():
            total = total + squares.to(self.device)
        return root(total).to(self.dtype)

    def norms_by_parameter(self) -> dict[str, Tensor]:
        """Euclidean norm of every row's part for each parameter, name -> (B,)."""
        return {name: root(squares).to(self.dtype) for name, squares in self._sq_norms().items()}

    def _sq_norms(self) -> dict[str, Tensor]:
        """Of every row's part for each parameter."""
        found: dict[str, Tensor] = {}
        add, doubts = adding_to(found, self.dtype), Doubts()
        with self._working():
            for name, f in self._factors.items():
                doubts.sq_norms(name, f, partial(add, name))
            doubts.settle()
        return found

    def gram(self) -> Tensor:
        """All inner products between rows, J Jᵀ, (B, B)."""
        with self._working():
            return self._sum(lambda name, f: f.gram(f), (self._batch, self._batch))

    def __matmul__(self, other: "Direction | Transposed") -> Tensor:
        if isinstance(other, Transposed):
            return self._inner(other.matrix)
        if isinstance(other, GradientMatrix):
            raise UsageError(
                "J @ K multiplies (B, P) by (K, P). Write J @ K.T for the inner products of rows."
            )
        devices = {name: f.device for name, f in self._factors.items()}
        V = inputs.directions(other, self.shapes, devices)
        if V is not None:
            with self._working():
                count = len(next(iter(V.values())))
                return self._sum(lambda n, f: _directions(f, V[n]), (self._batch, count))
        v = inputs.direction(other, self.shapes, devices, "v")
        with self._working():
            return self._sum(lambda name, f: f.matvec(v[name]), (self._batch,))

    def _inner(self, other: "GradientMatrix") -> Tensor:
        self._check_match(other)
        if other is self:
            return self.gram()
        with self._working(), other._working():
            return self._sum(
                lambda name, f: f.gram(other._factors[name]), (self._batch, other._batch)
            )

    def row_dots(self, other: "GradientMatrix") -> Tensor:
        """Inner product of row b with row b of the other matrix, (B,).

        For the gradients of one batch at two versions of a model, say.
        """
        if not isinstance(other, GradientMatrix):
            raise UsageError(f"row_dots takes a GradientMatrix, not a {type(other).__name__}.")
        self._check_match(other)
        if len(other) != self._batch:
            raise UsageError(
                f"row_dots needs as many rows on both sides, not {self._batch} and {len(other)}. "
                "For all pairs of rows use J @ K.T."
            )
        with self._working(), other._working():
            return self._sum(lambda name, f: f.dot(other._factors[name]), (self._batch,))

    def cosines(self, other: "GradientMatrix") -> Tensor:
        """Cosine between every row and every row of the other matrix, (B, K); 0 for a zero row."""
        if not isinstance(other, GradientMatrix):
            raise UsageError(f"cosines takes a GradientMatrix, not a {type(other).__name__}.")
        products = self._inner(other)
        scale = self.norms()[:, None] * other.norms()[None, :].to(products)
        return torch.where(scale == 0, 0.0, products / scale)

    @property
    def T(self) -> "Transposed":
        """The transpose, for `J @ K.T` and `J.T @ c`."""
        return Transposed(self)

    def second_moment(self, weights: Tensor | float | None = None) -> dict[str, Tensor]:
        """Sum over b of weights[b] times row b squared, element by element.

        Name -> tensor shaped as the parameter; weights (B,), one number for all, or None for ones.
        """
        ones = torch.ones(self._batch, dtype=self.dtype, device=self.device)
        c = inputs.row_weights(weights, ones).to(self.dtype)
        with self._working():
            return {
                n: f.second_moment(c.to(f.device)).to(self.dtype) for n, f in self._factors.items()
            }

    def scale(self, c: Tensor) -> "GradientMatrix":
        """Row b times c[b]."""
        c = self._row_weights(c, "scale")
        return self._map(lambda f: f.scale(c.to(f.device)))

    def precondition(self, P: Preconditioner) -> "GradientMatrix":
        """J P, with P block-diagonal by parameter. `J.precondition(P) @ K.T` is J P Kᵀ."""
        if not isinstance(P, Preconditioner):
            raise UsageError(
                f"precondition takes a pergrad.precondition object, not a {type(P).__name__}: "
                "Diagonal({name: tensor}) or Kronecker({name: (A, S)})."
            )
        P.check(self.shapes)
        self._check_versions()
        changed = P.apply_all(self._factors)
        return GradientMatrix(changed, self._batch, self._chunk_bytes)

    # --- parts and copies --------------------------------------------------------------------

    def __getitem__(self, index: Any) -> "GradientMatrix":
        """Rows i, a:b, a mask or a list of indices, as a GradientMatrix."""
        rows, count = self._rows(index)
        picked = {n: f.select(rows) for n, f in self._factors.items()}
        self._check_versions()
        return GradientMatrix(picked, count, self._chunk_bytes)

    def _rows(self, index: Any) -> tuple[Any, int]:
        index = whole(index)
        if isinstance(index, bool):
            raise UsageError("Index rows by number, slice, mask or a list of numbers.")
        if isinstance(index, int):
            if not -self._batch <= index < self._batch:
                raise IndexError(f"row {index} of a matrix with {self._batch} rows")
            index = index % self._batch
            return slice(index, index + 1), 1
        if isinstance(index, slice):
            return index, len(range(*index.indices(self._batch)))
        if isinstance(index, tuple):
            raise UsageError(
                "Index rows only: J[i], J[a:b], J[mask]. For one parameter's gradients use "
                "J.dense()[name]."
            )
        try:
            rows = torch.as_tensor(index, device=self.device)
        except (TypeError, ValueError, RuntimeError):
            rows = torch.empty(0, 0, device="cpu")
        if rows.dim() != 1 or (rows.is_floating_point() and rows.numel()):
            raise UsageError(
                f"A matrix is indexed by row: a number, slice, mask or list of numbers, not "
                f"{index!r}. For one parameter's gradients use J.dense()[name]."
            )
        if rows.dtype == torch.bool:
            if rows.shape[0] != self._batch:
                raise UsageError(f"The mask has {rows.shape[0]} entries for {self._batch} rows.")
            rows = rows.nonzero().reshape(-1)
        rows = rows.long()
        if rows.numel() and (int(rows.min()) < -self._batch or int(rows.max()) >= self._batch):
            raise IndexError(f"rows out of range for a matrix with {self._batch} rows")
        return torch.where(rows < 0, rows + self._batch, rows), rows.shape[0]

    def dense(self) -> dict[str, Tensor]:
        """The gradients themselves, name -> (B, *parameter.shape). Costs B times the model."""
        with self._working():
            return {n: f.dense() for n, f in self._factors.items()}

    def flat(self) -> Tensor:
        """The matrix itself, (B, P). Costs B times the model."""
        parts = [
            part.reshape(self._batch, prod(self.shapes[name])).to(self.dtype)
            for name, part in self.dense().items()
        ]
        return torch.cat(parts, 1)

    def to(self, target: torch.device | torch.dtype | str) -> "GradientMatrix":
        """On another device, or with factors in another dtype."""
        if isinstance(target, torch.dtype):
            return self._map(lambda f: f.to(dtype=target))
        return self._map(lambda f: f.to(device=torch.device(target)))

    def cpu(self) -> "GradientMatrix":
        """In the memory of the CPU."""
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device | None = None) -> "GradientMatrix":
        """On a CUDA device, by default the current one.

        Raises:
            UsageError: this torch sees no such device.
        """
        wanted = torch.device("cuda", device) if isinstance(device, int) else device or "cuda"
        return self.to(inputs.check_device(wanted))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the factors to one safetensors file, for `pergrad.load_gradients`.

        Raises:
            UsageError: the file cannot be written.
            MissingExtraError: `pip install 'pergrad[safetensors]'` brings what is missing.
        """
        self._check_versions()
        gradient_files.write(path, self._factors, self._batch)

    def detach(self) -> "GradientMatrix":
        """The same numbers, cut from the graph that create_graph=True attached them to."""
        return self._map(lambda f: f.detach())

    # --- helpers -----------------------------------------------------------------------------

    def _map(self, change: Any) -> "GradientMatrix":
        self._check_versions()
        changed = {n: change(f) for n, f in self._factors.items()}
        return GradientMatrix(changed, self._batch, self._chunk_bytes)

    def _sum(self, term: Any, shape: tuple[int, ...]) -> Tensor:
        total = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for name, factor in self._factors.items():
            total = total + term(name, factor).to(total)
        return total

    def _working(self) -> Any:
        self._check_versions()
        return workspace(self._chunk_bytes, self.device)

    def _check_versions(self) -> None:
        for name, held in self._held.items():
            if held.overwritten:
                raise UsageError(
                    f"A tensor that the gradients of `{name}` are kept in was changed in place "
                    "after pergrad.gradients (an optimizer step, a re-used input buffer?). Compute "
                    "what you need before, or clone that tensor in the forward pass."
                )

    def _row_weights(self, c: Any, what: str, *, sets: bool = False) -> Tensor:
        c = as_tensor(c, self.dtype, self.device)
        fits = isinstance(c, Tensor) and c.shape[:1] == (self._batch,)
        if not fits or c.dim() > 1 + sets:
            got = tuple(c.shape) if isinstance(c, Tensor) else type(c).__name__
            more = f", or ({self._batch}, Q) for Q sets of them" if sets else ""
            raise UsageError(
                f"{what} takes one number per row, shape ({self._batch},){more}, not {got}."
            )
        if not c.is_floating_point():
            raise UsageError(f"{what} takes floating point numbers, not {c.dtype}: use c.float().")
        return c.to(self.dtype)

    def _check_match(self, other: "GradientMatrix") -> None:
        mine, theirs = self.shapes, other.shapes
        only = [n for n in mine if n not in theirs]
        extra = [n for n in theirs if n not in mine]
        differ = [n for n in mine if n in theirs and mine[n] != theirs[n]]
        if only or extra or differ:
            parts = []
            if only:
                parts.append(f"only on the left: {inputs.names_list(only)}")
            if extra:
                parts.append(f"only on the right: {inputs.names_list(extra)}")
            if differ:
                shapes = ", ".join(f"`{n}` {mine[n]} and {theirs[n]}" for n in differ[:5])
                parts.append(f"different shapes: {shapes}")
            raise UsageError(
                "The two matrices are not about the same parameters ("
                + "; ".join(parts)
                + "). Parameters are matched by name: pass the same selection of parameters to "
                "both calls of pergrad.gradients."
            )
        if self.device != other.device:
            raise UsageError(
                f"The two matrices are on different devices, {self.device} and {other.device}: "
                "use K.to(device)."
            )


class Transposed:
    """K.T, to be used in `J @ K.T` and `J.T @ c`."""

    __slots__ = ("matrix",)

    def __init__(self, matrix: GradientMatrix) -> None:
        self.matrix = matrix

    @property
    def shape(self) -> torch.Size:
        """(P, B)."""
        rows, columns = self.matrix.shape
        return torch.Size((columns, rows))

    @property
    def T(self) -> GradientMatrix:
        """The matrix again."""
        return self.matrix

    def __matmul__(self, c: Tensor) -> dict[str, Tensor]:
        """Sum over b of c[b] times row b, name -> tensor shaped as the parameter.

        With C (B, Q) in the place of c: Q such sums, name -> (Q, *shape of the parameter).
        """
        if isinstance(c, (GradientMatrix, Transposed)):
            raise UsageError(
                "J.T @ K would be P x P. Write J @ K.T for the inner products of rows, or J.T @ c "
                "with one number per row."
            )
        weights = self.matrix._row_weights(c, "J.T @ c", sets=True)
        if weights.dim() == 2:
            with self.matrix._working():
                return {
                    n: f.weighted_sums(weights).to(self.matrix.dtype)
                    for n, f in self.matrix._factors.items()
                }
        with self.matrix._working():
            return {
                n: f.weighted_sum(weights.to(f.device)).to(self.matrix.dtype)
                for n, f in self.matrix._factors.items()
            }

    def __repr__(self) -> str:
        return f"{self.matrix!r}.T"


def root(sq_norms: Tensor) -> Tensor:
    """Square root with gradient 0 at 0, where the norm has none."""
    # clamp: a sum of squares, but a Gram's rounding can reach -1e-19, and sqrt would give nan
    if not sq_norms.requires_grad:
        return sq_norms.clamp_min(0).sqrt()
    sq_norms = torch.where(sq_norms < 0, 0.0, sq_norms)
    zero = sq_norms == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, sq_norms).sqrt())


def zeros_for(params: Mapping[str, Tensor], found: Mapping[str, Factor], batch: int) -> dict:
    """A factor for every parameter, in the parameters' order."""
    return {
        name: found[name] if name in found else Zero(
            batch, tuple(p.shape), p.device, torch.promote_types(p.dtype, torch.float32))
        for name, p in params.items()
    }  # fmt: skip


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _directions(factor: Factor, V: Tensor) -> Tensor:
    """(B, Q): inner products of every row with each of V (Q, *shape)."""
    if len(V) == 1:
        return factor.matvec(V[0])[:, None]
    return factor.gram(Dense(V.to(factor.device, factor.dtype)))
