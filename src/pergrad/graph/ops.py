"""The table of ops: what each op family says of its ops. Empty until the families fill it.

Owns: what may be said of an op (`Traits`), how it is said (`declare`, `owners`, `steps`), and
`transfer`: from the owners of the cotangents at an op's outputs to those at its inputs.
Does not know: any op by name, parameters' names, rules, factors.

`owners` registers a function that tells the owners of the gradient at each input by the op's
structure alone, whatever the numbers are. It returns, for every input, a `Layout`, or why there is
none:
  SHARED      the gradient is a sum over examples because the input lacks the example dimension
  CONTRACTED  the gradient is a sum over examples by a contraction (the weight of a matmul)
  MIXING      the op makes examples interact whatever the data is
  UNKNOWN     the structure does not tell; the layout has to be measured
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor

from pergrad.errors import UsageError
from pergrad.graph import nodes
from pergrad.graph.layout import Layout, compressed, constant, placed_along


class Why(Enum):
    """Why an input's gradient has no layout."""

    SHARED = "shared"
    CONTRACTED = "contracted"
    MIXING = "mixing"
    UNKNOWN = "unknown"


class Reads(Enum):
    """Whether data, not parameters and constants alone, enters at an op itself."""

    NOTHING = "an input that needs no gradient is a constant: a mask, a scale"
    MISSING = "an input that needs no gradient is data"
    LARGER = "an input that needs no gradient is data if it is larger than all others"
    ALWAYS = "indices into a table"
    UNKNOWN = "it may, unless nothing but parameters lies below"


Result = Layout | Why | None
Shape = tuple[int, ...]
# ("view", shape) | ("permute", dims) | ("embed", shape, dim, start)
Step = tuple  # and, until its indices can be read, ("look up", node)


@dataclass(slots=True)
class Op:
    """One node, as the functions of its family see it."""

    node: Any
    name: str
    out_shapes: list[Shape]
    in_shapes: list[Shape | None]  # None: the input needs no gradient
    parameter: list[bool]  # whether an input depends on the requested parameters alone
    examples: int = 0  # in the batch
    real: bool = True  # whether input and output hold real floating-point numbers
    read: dict[str, Any] = field(default_factory=dict)  # the saved indices that were asked for

    def attr(self, name: str) -> Any:
        """A number that the op saved."""
        return attribute(self.name, self.node, name)

    def data(self, name: str) -> Any:
        """A saved index tensor: what follows holds for this batch only."""
        check_declared(self.name, name)
        if name not in self.read:
            self.read[name] = nodes.saved(self.node, name)
        return self.read[name]


Transfer = Callable[[Op, Layout], list[Result]]
TransferAll = Callable[[Op, list[Layout | None]], list[Result]]
Cut = Callable[[Op], tuple[int, slice]]
Steps = Callable[[Op, int], tuple[Step, ...] | None]
Told = Callable[[str, Any, Tensor], str | None]


@dataclass(frozen=True, slots=True)
class Flaw:
    """That torch's own backward of an op is wrong for tensors that lie in memory in some way."""

    shapes: Callable[[Shape], bool]  # of the output: it may be, however the rest is
    vectors: tuple[str, ...]  # saved with it: or it may be if one of these does not lie dense
    told: Told  # of op, node, cotangent: for what it is wrong, and what mends it; None if it is not


@dataclass(slots=True)
class Traits:
    """What is known of an op."""

    reads: Reads = Reads.UNKNOWN
    needs: frozenset[str] = frozenset()  # what is read of all that torch saves with it
    weights: bool = False  # a rule serves its parameters: they are left to it in any case
    batched: bool = False  # a product of matrices (b, k, m), which may be one that was expanded
    looks_up: bool = False  # its indices are data: what it returns is no longer a parameter
    joins: bool = False  # tensors laid beside each other: no number depends on two of them
    hides_saved: bool = False  # it runs other ops, and what those saved cannot be seen
    owners: Transfer | None = None
    owners_of_all: TransferAll | None = None  # in its place: all outputs' owners at once
    cut: Cut | None = None
    steps: Steps | None = None
    steps_read_data: bool = False
    keeps_order: bool = False  # the same elements, one after the other in the same order
    expands: bool = False  # the same elements, along some dimensions many times
    flaw: Flaw | None = None


_TABLE: dict[str, Traits] = {}
_NOTHING_KNOWN = Traits()


def declare(
    *names: str,
    needs: Iterable[str] = (),
    reads: Reads = Reads.NOTHING,
    weights: bool = False,
    batched: bool = False,
    looks_up: bool = False,
    joins: bool = False,
    hides_saved: bool = False,
) -> None:
    """Enter ops into the table; see `Traits` for what may be said of them.

    `needs` names every field of the node, number or tensor, that a function of the family reads.

    Raises:
        UsageError: one of them is there already.
    """
    for name in names:
        if name in _TABLE:
            raise UsageError(
                f"The op `{name}` is declared twice. Declare an op once, in the file of its family "
                "in pergrad/ops."
            )
        _TABLE[name] = Traits(
            reads, frozenset(needs), weights, batched, looks_up, joins, hides_saved
        )


def declared(name: str) -> Traits:
    """What is known of an op that has to be in the table.

    Raises:
        UsageError: no family has declared it.
    """
    found = _TABLE.get(name)
    if found is None:
        raise UsageError(
            f"No family in pergrad/ops declares an op `{name}`. Is it spelt as `pergrad.explain` "
            "shows it, and does its file `declare` it first?"
        )
    return found


def traits(name: str) -> Traits:
    """What is known of an op, if anything."""
    return _TABLE.get(name, _NOTHING_KNOWN)


def known_ops() -> dict[str, Traits]:
    """All ops that have been declared."""
    return dict(_TABLE)


def check_declared(name: str, field: str) -> None:
    """Refuse to read what the op's declaration does not say.

    Raises:
        UsageError: `needs` lacks the field.
    """
    if field not in _TABLE.get(name, _NOTHING_KNOWN).needs:
        raise UsageError(
            f"A function of the op `{name}` reads the field `{field}`, which its declaration does "
            f'not name. Add "{field}" to `needs` where pergrad/ops declares the op.'
        )


def attribute(name: str, node: Any, field: str) -> Any:
    """A number that an op saved, if its declaration says so."""
    check_declared(name, field)
    return nodes.attribute(node, field)


def saved(name: str, node: Any, field: str, *, dense: bool = True) -> Any:
    """A tensor that an op saved (or a number, or None), if its declaration says so.

    Sparse ones as they are, or dense.
    """
    check_declared(name, field)
    return nodes.saved(node, field, dense=dense)


def check_fields() -> None:
    """Hold all declarations against the installed torch, by name; no op is run.

    Raises:
        UnsupportedError: torch saves something else with an op that it has.
    """
    for name, entry in _TABLE.items():
        nodes.check_saved(name, entry.needs)


def once(name: str, what: str, before: object) -> None:
    """Refuse a second function for the same purpose."""
    if before is not None:
        raise UsageError(
            f"The op `{name}` has two functions for its {what}. Register one, with the ops of its "
            "family in pergrad/ops."
        )


def owners(*names: str) -> Callable[[Transfer], Transfer]:
    """Register how ownership moves through ops of which one output has a cotangent."""

    def add(function: Transfer) -> Transfer:
        for name in names:
            entry = declared(name)
            once(name, "owners", entry.owners or entry.owners_of_all)
            entry.owners = function
        return function

    return add


def owners_of_all(*names: str) -> Callable[[TransferAll], TransferAll]:
    """As `owners`, for ops that need the layouts at all their outputs together."""

    def add(function: TransferAll) -> TransferAll:
        for name in names:
            entry = declared(name)
            once(name, "owners", entry.owners or entry.owners_of_all)
            entry.owners_of_all = function
        return function

    return add


def cuts(*names: str) -> Callable[[Cut], Cut]:
    """Register ops that cut something out along one dimension: which, and from where to where."""

    def add(function: Cut) -> Cut:
        for name in names:
            entry = declared(name)
            once(name, "cuts", entry.cut)
            entry.cut = function
        return function

    return add


def steps(
    *names: str, read_data: bool = False, keeps_order: bool = False, expands: bool = False
) -> Callable[[Steps], Steps]:
    """Register ops that only rearrange their input.

    The function is handed an op and the number of an output, and returns the steps (an isometry)
    by which a gradient there becomes one of the input; None if it does not for these arguments.
    With `read_data` that depends on saved indices, and is asked for once per batch.
    """

    def add(function: Steps) -> Steps:
        for name in names:
            entry = declared(name)
            once(name, "steps", entry.steps)
            entry.steps, entry.steps_read_data = function, read_data
            entry.keeps_order, entry.expands = keeps_order, expands
        return function

    return add


def flawed(
    *names: str, shapes: Callable[[Shape], bool], vectors: tuple[str, ...]
) -> Callable[[Told], Told]:
    """Register ops whose backward in torch is wrong for some tensors; see `Flaw`."""

    def add(function: Told) -> Told:
        for name in names:
            entry = declared(name)
            once(name, "flaw", entry.flaw)
            entry.flaw = Flaw(shapes, vectors, function)
        return function

    return add


def understands(name: str) -> bool:
    """Whether the op's structure is known here."""
    entry = traits(name)
    return entry.owners is not None or entry.owners_of_all is not None


def cut_out(op: Op, out: Layout) -> Layout | None:
    """Owners at the input of an op that cuts something out: nobody's where it takes nothing.

    `transfer` may claim more for an example, which is as right as long as nobody else claims it.
    """
    entry, shape = traits(op.name), op.in_shapes[0]
    if entry.cut is None or shape is None:
        return None
    dim, index = entry.cut(op)
    owner = out.owner if len(out.shape) == len(shape) else out.owner.unsqueeze(dim)
    return compressed(shape, placed_along(owner, dim, shape[dim], index))


def transfer(op: Op, outs: list[Layout | None]) -> list[Result]:
    """Owners of the gradient at each input of `op`, from those of the cotangents at its outputs."""
    if all(shape is None for shape in op.in_shapes):
        return [None] * len(op.in_shapes)  # a requested tensor that was computed from others
    entry = traits(op.name)
    used = [out for out in outs if out is not None]
    constants = {int(out.owner) for out in used if out.is_constant}
    if len(constants) == 1 and all(out.is_constant for out in used):
        # One example owns every cotangent: linearity alone says that it owns every gradient.
        # Weights stop here all the same, so that their rule serves them.
        (example,) = constants
        return [
            None if s is None else Why.SHARED if entry.weights and p else constant(s, example)
            for s, p in zip(op.in_shapes, op.parameter, strict=True)
        ]
    if entry.owners_of_all is not None:
        return entry.owners_of_all(op, outs)
    if entry.owners is None or outs[0] is None or len(used) > 1:
        return unknown(op)
    return entry.owners(op, outs[0])


# --- For the functions of the families ------------------------------------------------------------


def unknown(op: Op) -> list[Result]:
    """No statement about any input."""
    return [None if s is None else Why.UNKNOWN for s in op.in_shapes]


def contracted(shapes: Iterable[Shape | None]) -> list[Result]:
    """Weights: a gradient sums over examples wherever there is one."""
    return [None if s is None else Why.CONTRACTED for s in shapes]


def or_why(layout: Layout | None, why: Why) -> Result:
    """The layout, or why there is none."""
    return why if layout is None else layout


def resized(layout: Layout | None, shape: Sequence[int], why: Why = Why.UNKNOWN) -> Result:
    """The same map on a tensor of another size along the dimensions that do not vary."""
    if layout is None or not _fits(layout, shape):
        return why
    return Layout(tuple(shape), layout.owner)


def _fits(layout: Layout, shape: Sequence[int]) -> bool:
    """Whether the map makes sense for a tensor of `shape`."""
    return len(layout.owner.shape) == len(shape) and all(
        o in (1, s) for o, s in zip(layout.owner.shape, shape, strict=True)
    )


def positive(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim + rank if dim < 0 else dim
