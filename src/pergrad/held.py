"""Factors that are used later, and whether what they are made of stayed as it was.

Owns: `Held`, and the message to whoever writes over its memory during a pass.
Does not know: why a factor has to wait.
"""

from pergrad.errors import UsageError
from pergrad.factors import Factor
from pergrad.graph import nodes


class Held:
    """A factor of one parameter, to be used later.

    It reads the tensors that ops saved and the gradients that torch's pass went on with. What a
    user's hooks do with that memory after the pass has come by, torch allows, but a number made of
    it would be wrong.
    """

    __slots__ = ("_factor", "_versions")

    def __init__(self, factor: Factor) -> None:
        self._factor = factor
        self._versions = [(tensor, nodes.version(tensor)) for tensor in factor.tensors()]

    @property
    def overwritten(self) -> bool:
        """Whether a tensor that it is made of was written to in the meantime."""
        return any(nodes.version(tensor) != version for tensor, version in self._versions)

    def factor(self, name: str) -> Factor:
        """The factor, of the parameter of this name.

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
        return self._factor
