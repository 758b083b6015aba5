"""The table from ops to rules, and what a rule is handed.

Owns: `Situation` (one use of parameters together with its cotangents) and the registry.
Does not know: how the graph was walked, what the factors are used for.

A rule is one pure function per op family. It returns, for each operand (by slot number) that it
serves, the factor of the operand's per-example gradient; None where that gradient is zero. An
operand it does not mention goes to the fallback.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from pergrad.errors import UsageError
from pergrad.factors import Factor
from pergrad.graph import nodes
from pergrad.graph.layout import Layout
from pergrad.graph.ops import check_declared, declared, once


@dataclass(frozen=True, slots=True)
class Operand:
    """The parameter side of one input of an op.

    `lead` and `shared` describe a weight that was expanded along the batch dimensions of a
    batched product: the sizes of those dimensions, and which of them are copies.
    """

    shape: tuple[int, ...]
    lead: tuple[int, ...] = ()
    shared: tuple[bool, ...] = ()


@dataclass(slots=True)
class Situation:
    """One op at which parameters meet examples, with the cotangents at its outputs."""

    node: Any
    name: str
    batch: int
    cotangents: list[Tensor | None]
    layouts: tuple[Layout | None, ...]
    operands: dict[int, Operand]  # by slot
    told: dict[int, str] = field(default_factory=dict)  # what `explain` says in the op's place
    times: int = 1  # so often the rows of the op stand in the cotangents, one after the other
    by_row: tuple[str, ...] = ()  # what the op saved of each row, and has to be had as often

    @property
    def g(self) -> Tensor:
        """The cotangent at the only output that has one."""
        g = self.cotangents[0]
        assert g is not None
        return g

    @property
    def layout(self) -> Layout:
        """Its layout."""
        layout = self.layouts[0]
        assert layout is not None
        return layout

    def saved(self, field: str, *, dense: bool = True) -> Any:
        """A tensor that the op saved; None if it saved none. Sparse ones as they are, or dense."""
        check_declared(self.name, field)
        value = nodes.saved(self.node, field, dense=dense)
        if self.times > 1 and field in self.by_row:
            return value.repeat(self.times, *[1] * (value.dim() - 1))
        return value

    def attr(self, field: str) -> Any:
        """A number that the op saved."""
        check_declared(self.name, field)
        return nodes.attribute(self.node, field)

    def tracing(self) -> bool:
        """Whether the result will be differentiated again (create_graph=True)."""
        return torch.is_grad_enabled()


Served = dict[int, Factor | None]
Rule = Callable[[Situation], Served]

Fields = Callable[[Situation], tuple[str, ...] | None]
# (node, cotangent) -> squared norms (B,) of each operand by slot; None: ask the rule
AtOnce = Callable[[Any, Tensor], dict[int, Tensor] | None]
FindAtOnce = Callable[[str, Any, Layout, Mapping[int, Operand], int], AtOnce | None]

_F = TypeVar("_F")

_RULES: dict[str, Rule] = {}
_BY_ROW: dict[str, Fields] = {}
_AT_ONCE: dict[str, FindAtOnce] = {}
_CALLS_NODE: set[str] = set()


def _enter(table: dict[str, _F], what: str, names: Iterable[str], function: _F) -> None:
    """Enter a function for ops that were declared, and have none yet."""
    for name in names:
        declared(name)
        once(name, what, table.get(name))
        table[name] = function


def rule(*names: str, calls_node: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for the named ops; `calls_node` if it runs the node's own backward.

    Complex cotangents go to the fallback: torch's own backward knows when to conjugate, and when
    to take the real part.
    """

    def add(function: Rule) -> Rule:
        @wraps(function)
        def real_only(use: Situation) -> Served:
            for g in use.cotangents:
                if g is not None and g.is_complex():
                    return {}
            return function(use)

        entered: Rule = real_only
        _enter(_RULES, "gradients", names, entered)
        if calls_node:
            _CALLS_NODE.update(names)
        return function

    return add


def by_row(*names: str) -> Callable[[Fields], Fields]:
    """Register ops whose rule takes the rows along the first dimension one by one.

    The function tells which of the saved fields that the rule reads have that dimension too; None
    if something else than rows comes in.
    """

    def add(function: Fields) -> Fields:
        _enter(_BY_ROW, "rows", names, function)
        return function

    return add


def fields_by_row(use: Situation) -> tuple[str, ...] | None:
    """What the op saved of each row; None if its rule does not go by rows."""
    function = _BY_ROW.get(use.name)
    return None if function is None else function(use)


def at_once(*names: str) -> Callable[[FindAtOnce], FindAtOnce]:
    """Register ops whose squared norms can be had without a factor, in their simplest form.

    The function is asked once for each use of a plan, with a node, whose saved numbers are those of
    every equal graph, the layout at its only output, the operands and the number of examples. What
    it returns computes by the very formula of the rule; None where the rule has more to find out.
    """

    def add(function: FindAtOnce) -> FindAtOnce:
        _enter(_AT_ONCE, "norms at once", names, function)
        return function

    return add


def norms_at_once(
    name: str,
    node: Any,
    layouts: tuple[Layout | None, ...],
    operands: Mapping[int, Operand],
    batch: int,
) -> AtOnce | None:
    """How the norms of one use can be had without factors, if they can."""
    function, layout = _AT_ONCE.get(name), layouts[0]
    if function is None or layout is None or len(layouts) > 1:
        return None
    return function(name, node, layout, operands, batch)


def rule_for(name: str) -> Rule | None:
    """The rule that serves an op, if any."""
    return _RULES.get(name)


def calls_node(name: str) -> bool:
    """Whether serving the op runs the node's own backward (a rule that does, or the fallback)."""
    return name not in _RULES or name in _CALLS_NODE


def check_imported(files: Iterable[str], imported: Container[str]) -> None:
    """Refuse to go on without a family: its ops would be served by the fallback, slowly.

    Raises:
        UsageError: a file of pergrad/ops that `pergrad.ops` does not import.
    """
    for name in files:
        if name not in imported:
            raise UsageError(
                f"The file `pergrad/ops/{name}.py` is imported by nobody, so nothing is known of "
                f"its ops. Add `{name}` to the imports in pergrad/ops/__init__.py."
            )
