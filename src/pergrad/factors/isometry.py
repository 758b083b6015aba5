"""Isometries: views and permutations of a tensor, as data.

Owns: `Isometry`, and how chains of steps simplify.
Does not know: factors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from torch import Tensor

Step = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Isometry:
    """("view", shape) and ("permute", order) steps from tensors of shape `source`; data only."""

    source: tuple[int, ...]
    steps: tuple[Step, ...]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Before the first step, and after every step."""
        shapes = [self.source]
        for kind, how in self.steps:
            now = shapes[-1]
            shapes.append(how if kind == "view" else tuple(now[i] for i in how))
        return shapes

    @property
    def target(self) -> tuple[int, ...]:
        """The shape that comes out."""
        return self.shapes[-1]

    def apply(self, x: Tensor) -> Tensor:
        """(n, *source) -> (n, *target)."""
        for kind, how in self.steps:
            if kind == "view":
                x = x.reshape(len(x), *how)
            else:
                x = x.permute(0, *(i + 1 for i in how))
        return x

    def invert(self, x: Tensor) -> Tensor:
        """(n, *target) -> (n, *source)."""
        return self.inverse().apply(x)

    def inverse(self) -> "Isometry":
        """The same steps backwards."""
        steps: list[Step] = []
        for before, (kind, how) in zip(self.shapes[-2::-1], self.steps[::-1], strict=True):
            if kind == "view":
                steps.append((kind, before))
            else:
                steps.append((kind, tuple(how.index(i) for i in range(len(how)))))
        return Isometry(self.target, tuple(steps))


def isometry(source: Sequence[int], steps: Sequence[Step]) -> Isometry:
    """The shortest chain that does the same: no step without effect, none that undoes another."""
    return _isometry(tuple(source), tuple(steps))


@lru_cache(maxsize=1024)  # the same few, at every step of a training
def _isometry(source: tuple[int, ...], steps: tuple[Step, ...]) -> Isometry:
    short: list[Step] = []
    shapes = [source]  # before each step of `short`, and after the last
    for kind, how in steps:
        how = tuple(how)
        if kind == "view":
            how = _resolved(shapes[-1], how)
        elif kind != "permute" or sorted(how) != list(range(len(shapes[-1]))):
            raise ValueError(f"{kind} {how} is no isometric step from {shapes[-1]}.")
        elif [i for i in how if shapes[-1][i] != 1] == [
            i for i in range(len(how)) if shapes[-1][i] != 1
        ]:  # only dimensions of size 1 move
            kind, how = "view", tuple(shapes[-1][i] for i in how)
        if short and short[-1][0] == kind:
            _, last = short.pop()
            shapes.pop()
            how = how if kind == "view" else tuple(last[i] for i in how)
        now = shapes[-1]
        if how != (now if kind == "view" else tuple(range(len(now)))):
            short.append((kind, how))
            shapes.append(how if kind == "view" else tuple(now[i] for i in how))
    return Isometry(source, tuple(short))


def _resolved(now: tuple[int, ...], how: tuple[int, ...]) -> tuple[int, ...]:
    """A view's shape with -1 spelled out."""
    if -1 in how:
        rest = prod(n for n in how if n != -1)
        how = tuple(prod(now) // max(1, rest) if n == -1 else n for n in how)
    if prod(how) != prod(now):
        raise ValueError(f"{now} cannot be viewed as {how}.")
    return how
