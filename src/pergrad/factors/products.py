"""The table of products: which formula takes the inner products of which two kinds of factors.

Owns: `Products`, the look-up by both classes, and its two tables, `dots` and `grams`.
Does not know: which kinds there are, nor a formula: each stands beside its kind.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

Formula = Callable[[Any, Any], Tensor | None]
_Formula = TypeVar("_Formula", bound=Formula)


class Products:
    """One product of two factors, by formulas that are registered for pairs of kinds.

    A formula may answer None, "not these sizes". Asked in turn, until one answers: the formulas of
    the pair and of what its classes derive from, the most special first; those of the pair swapped;
    the general one.
    """

    def __init__(self, name: str, turned: Callable[[Tensor], Tensor]) -> None:
        self.name = name
        self._turned = turned  # the product of a pair from that of the pair swapped
        self._root: type = object
        self._formulas: dict[tuple[type, type], Formula] = {}
        self._remembered: dict[tuple[type, type], list[tuple[Formula, bool]]] = {}

    def general(self, root: type) -> Callable[[_Formula], _Formula]:
        """The formula that serves every two classes that derive from `root`."""
        self._root = root
        return self.register(root, root)

    def register(self, left: type, right: type) -> Callable[[_Formula], _Formula]:
        """A formula for a factor of the class `left` and one of `right`, in this order.

        Raises:
            TypeError: one of them is no class of factors.
            ValueError: the pair has a formula.
        """
        for kind in (left, right):
            self._check(kind)
        if (left, right) in self._formulas:
            raise ValueError(
                f"{self.name} of {left.__name__} and {right.__name__} has a formula: "
                f"{self._formulas[left, right].__qualname__}. Let that one answer None where "
                "another is meant to serve."
            )

        def add(formula: _Formula) -> _Formula:
            self._formulas[left, right] = formula
            self._remembered.clear()
            return formula

        return add

    def __call__(self, f: Any, h: Any) -> Tensor:
        """The product of two factors.

        Raises:
            TypeError: one of them is no factor.
        """
        pair = type(f), type(h)
        for formula, swapped in self._remembered.get(pair) or self._remember(*pair):
            found = formula(h, f) if swapped else formula(f, h)
            if found is not None:
                return self._turned(found) if swapped else found
        raise NotImplementedError(f"No formula answers {self.name} of {f} and {h}.")

    def _remember(self, left: type, right: type) -> list[tuple[Formula, bool]]:
        for kind in (left, right):
            self._check(kind)
        last = (self._root, self._root)
        special = [(pair, False) for pair in self._pairs(left, right) if pair != last]
        special += [(pair, True) for pair in self._pairs(right, left) if pair != last]
        found = [(self._formulas[pair], swapped) for pair, swapped in [*special, (last, False)]]
        self._remembered[left, right] = found
        return found

    def _pairs(self, left: type, right: type) -> list[tuple[type, type]]:
        pairs = [(one, two) for one in left.__mro__ for two in right.__mro__]
        return [pair for pair in pairs if pair in self._formulas]

    def _check(self, kind: type) -> None:
        if not issubclass(kind, self._root):
            raise TypeError(
                f"{kind.__name__} is no kind of factor, so {self.name} has no formula for it. "
                f"A kind is a class that derives from {self._root.__name__}; "
                f"`@{self.name}s.register(Kind, Other)` gives it products of its own."
            )


dots = Products("dot", lambda products: products)  # (B,): row b with row b
grams = Products("gram", lambda products: products.mT)  # (B, K): all pairs
