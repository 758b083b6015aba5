"""Preconditioners: block-diagonal by parameter.

Owns: `Diagonal` and `Kronecker`, their checks and how they act on a factor.
Does not know: where their entries come from (Fisher, Adam, K-FAC).

Parameters that a preconditioner does not name are left as they are.
"""

from collections.abc import Mapping

from torch import Tensor

from pergrad.arrays import as_tensor
from pergrad.errors import UsageError
from pergrad.factors import Factor

__all__ = ["Diagonal", "Kronecker"]

Side = Tensor | float | int


class Preconditioner:
    """A symmetric or general matrix P, one block per parameter; J.precondition(P) is J P."""

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UsageError where an entry does not fit its parameter."""
        raise NotImplementedError

    def apply(self, name: str, factor: Factor) -> Factor:
        """The preconditioned gradients of one parameter."""
        raise NotImplementedError

    def apply_all(self, factors: Mapping[str, Factor]) -> dict[str, Factor]:
        """Those of all parameters, for blocks that mix several of them."""
        return {name: self.apply(name, factor) for name, factor in factors.items()}


def _known(names: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> None:
    unknown = [n for n in names if n not in shapes]
    if unknown:
        raise UsageError(
            f"The preconditioner names {', '.join(f'`{n}`' for n in unknown[:5])}, which the "
            f"matrix does not have. Its parameters: {', '.join(f'`{n}`' for n in list(shapes)[:5])}"
            + (", ..." if len(shapes) > 5 else ".")
        )


class Diagonal(Preconditioner):
    """One factor per entry of a parameter: G -> D * G.

    Args:
        entries: name -> tensor of the parameter's shape. Parameters left out are unchanged.

        >>> import torch, pergrad
        >>> model = torch.nn.Linear(2, 1)
        >>> J = pergrad.gradients(model(torch.ones(3, 2)).squeeze(1), model)
        >>> P = pergrad.precondition.Diagonal({"weight": torch.full((1, 2), 0.5)})
        >>> J.precondition(P).dense()["weight"][0]
        tensor([[0.5000, 0.5000]])
    """

    def __init__(self, entries: Mapping[str, Tensor]) -> None:
        self.entries = {name: as_tensor(entry) for name, entry in entries.items()}

    def __repr__(self) -> str:
        return f"Diagonal({', '.join(self.entries)})"

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Every entry has its parameter's shape."""
        _known(self.entries, shapes)
        for name, entry in self.entries.items():
            if not isinstance(entry, Tensor) or tuple(entry.shape) != tuple(shapes[name]):
                got = tuple(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__
                raise UsageError(
                    f"Diagonal has shape {got} for `{name}`, whose shape is "
                    f"{tuple(shapes[name])}. Pass a tensor of the parameter's shape."
                )

    def apply(self, name: str, factor: Factor) -> Factor:
        """D * G."""
        entry = self.entries.get(name)
        if entry is None:
            return factor
        return factor.times_diagonal(entry.detach().to(factor.device, factor.dtype))


class Kronecker(Preconditioner):
    """A matrix on either side of a weight's gradient: G -> S G A.

    G is seen as a matrix (shape[0], product of the rest): outputs by inputs for a linear layer,
    output channels by unfolded inputs (C_in / groups * kernel size) for a convolution.

    Args:
        entries: weight name -> (A, S). A acts on the inputs: (d, d), or (d,) for a diagonal, or a
            number; S on the outputs: (p, p), (p,) or a number.

        >>> import torch, pergrad
        >>> model = torch.nn.Linear(2, 1)
        >>> J = pergrad.gradients(model(torch.ones(3, 2)).squeeze(1), model)
        >>> P = pergrad.precondition.Kronecker({"weight": (torch.eye(2) * 2, 3.0)})
        >>> J.precondition(P).dense()["weight"][0]
        tensor([[6., 6.]])
    """

    def __init__(self, entries: Mapping[str, tuple[Side, Side]]) -> None:
        self.entries = {
            name: tuple(as_tensor(side) for side in pair)
            if isinstance(pair, (tuple, list))
            else pair
            for name, pair in entries.items()
        }

    def __repr__(self) -> str:
        return f"Kronecker({', '.join(self.entries)})"

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Every side is square, a diagonal or a number, and of its parameter's size."""
        _known(self.entries, shapes)
        for name, entry in self.entries.items():
            if not isinstance(entry, (tuple, list)) or len(entry) != 2:
                raise UsageError(f"Kronecker takes a pair (A, S) for `{name}`.")
            shape = shapes[name]
            outputs = shape[0] if shape else 1
            inputs_ = 1
            for size in shape[1:]:
                inputs_ *= size
            for side, size, which in ((entry[0], inputs_, "A"), (entry[1], outputs, "S")):
                if isinstance(side, Tensor):
                    fits = tuple(side.shape) in ((size, size), (size,), ())
                    if not fits:
                        raise UsageError(
                            f"Kronecker has {which} of shape {tuple(side.shape)} for `{name}`, "
                            f"whose shape is {tuple(shape)}: it has to be ({size}, {size}), "
                            f"({size},) or a number."
                        )
                elif not isinstance(side, (int, float)):
                    raise UsageError(
                        f"Kronecker has {which} of type {type(side).__name__} for `{name}`: pass a "
                        "tensor or a number."
                    )

    def apply(self, name: str, factor: Factor) -> Factor:
        """S G A."""
        entry = self.entries.get(name)
        if entry is None:
            return factor
        a, s = (_side(side, factor) for side in entry)
        return factor.kronecker(a, s)


def _side(side: Side, factor: Factor) -> Side:
    if not isinstance(side, Tensor):
        return side
    return side.item() if side.dim() == 0 else side.detach().to(factor.device, factor.dtype)
