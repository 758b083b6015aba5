"""What is used later in a pass, and whether it stayed as it was.

Owns: `Held` for factors, `Untouched` for any tensors, and the message to whoever writes over their
memory during a pass.
Does not know: why they have to wait.
"""

from collections.abc import Iterable

from torch import Tensor

from pergrad.errors import UsageError
from pergrad.factors import Factor
from pergrad.graph import nodes


class Untouched:
    """Tensors that are read later: those that ops saved, the gradients that torch's pass went on
    with. What a user's hooks do with that memory after the pass has come by, torch allows, but a
    number made of it would be wrong.
    """

    __slots__ = ("_versions",)

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._versions = [(tensor, nodes.version(tensor)) for tensor in tensors]

    @property
    def overwritten(self) -> bool:
        """Whether one was written to in the meantime."""
        return any(nodes.version(tensor) != version for tensor, version in self._versions)

    def check(self, name: str) -> None:
        """Nothing, if the gradients of the parameter of this name may be computed from them.

        Raises:
            UsageError: a tensor was written to in the meantime.
        """
        if self.overwritten:
            raise UsageError(
                f"What the gradients of `{name}` are computed from was overwritten during the "
                "backward pass: by an unpack hook of saved_tensors_hooks that returns the same "
                "memory again, or by a hook that changes a gradient in place. Return a new tensor "
                "from that hook, or change a clone."
            )


class Held(Untouched):
    """A factor of one parameter, to be used later."""

    __slots__ = ("_factor",)

    def __init__(self, factor: Factor) -> None:
        super().__init__(factor.tensors())
        self._factor = factor

    def factor(self, name: str) -> Factor:
        """The factor, of the parameter of this name.

        Raises:
            UsageError: as in `check`.
        """
        self.check(name)
        return self._factor
