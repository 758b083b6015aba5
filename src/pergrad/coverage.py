"""The report of `explain`: which op uses which parameter, and how it is served.

Owns: `Coverage` and its table.
Does not know: the graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pergrad.engine.pass_ import Record
from pergrad.engine.places import module_of
from pergrad.factors import Factor
from pergrad.inputs import names_list


@dataclass(frozen=True, slots=True)
class Row:
    """One use of a parameter."""

    parameter: str
    module: str
    op: str
    how: str  # "rule", "fallback", "mixed" or "unreached"
    layout: str
    method: str
    cost: int  # multiply-adds of the squared norms
    size: int  # numbers in the parameter


@dataclass(frozen=True, slots=True)
class Coverage:
    """Every use of every parameter, one row each; prints as a table."""

    rows: tuple[Row, ...]
    examples: int
    price: str = ""  # of several losses that depend on the same rows of data, in words

    def _share(self, how: str) -> float:
        """Share of the parameters, by count of numbers, whose uses are all served at least so."""
        order = ("unreached", "rule", "fallback", "mixed")
        worst: dict[str, tuple[int, int]] = {}
        for row in self.rows:
            rank = order.index(row.how)
            worst[row.parameter] = max(worst.get(row.parameter, (0, row.size)), (rank, row.size))
        total = sum(size for _, size in worst.values())
        if not total:
            return 1.0 if how == "rule" else 0.0
        return sum(size for rank, size in worst.values() if order[rank] == how) / total

    @property
    def exact_share(self) -> float:
        """Share of the parameters, by count, that a rule serves."""
        return self._share("rule")

    @property
    def fallback_share(self) -> float:
        """Share of the parameters that need the fallback, one backward of the op per example."""
        return self._share("fallback")

    @property
    def mixed_share(self) -> float:
        """Share of the parameters below an op that makes examples interact."""
        return self._share("mixed")

    @property
    def unreached_share(self) -> float:
        """Share of the parameters that no loss reaches, and whose gradients are zero."""
        return self._share("unreached")

    def __str__(self) -> str:
        head = ("parameter", "module", "op", "how", "layout", "method", "cost")
        table = [head] + [
            (r.parameter, r.module or "(model)", r.op, r.how, r.layout, r.method, f"{r.cost:,}")
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = []
        for line in table:
            cells = [cell.ljust(w) for cell, w in zip(line[:-1], widths, strict=False)]
            lines.append("  ".join([*cells, line[-1].rjust(widths[-1])]))
        names = {row.parameter for row in self.rows}
        sizes = {row.parameter: row.size for row in self.rows}
        lines.append(
            f"{len(names)} parameters ({sum(sizes.values()):,} numbers): "
            f"{self.exact_share:.1%} by rule, {self.fallback_share:.1%} by fallback, "
            f"{self.mixed_share:.1%} mixed".replace("%", " %")
        )
        if self.unreached_share:
            lines[-1] += f", {self.unreached_share:.1%} reached by no loss".replace("%", " %")
            idle = list(dict.fromkeys(r.parameter for r in self.rows if r.how == "unreached"))
            lines.append(
                f"No loss reaches {names_list(idle)}: gradients of 0. Unused, or detached?"
            )
        if self.price:
            lines.append(self.price)
        elif self.mixed_share:
            lines.append(
                'Examples interact: with on_mixing="exact" the mixed parameters cost up to '
                f"{self.examples} backward passes, one for each loss."
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


def coverage_of(
    named: Mapping[str, Tensor], records: list[Record], examples: int, price: str
) -> Coverage:
    """One row per record, in the order of the parameters; a row for each parameter not reached."""
    by_name: dict[str, list[Record]] = {name: [] for name in named}
    for record in records:
        by_name[record.parameter].append(record)
    rows = []
    for name, found in by_name.items():
        size = named[name].numel()
        module = module_of(name)
        if not found:
            rows.append(Row(name, module, "-", "unreached", "-", "-", 0, size))
        for r in found:
            method, cost = _method(r.factor)
            rows.append(Row(name, module, r.op, r.how, r.layout, method, cost, size))
    return Coverage(tuple(rows), examples, price)


def _method(factor: Factor | None) -> tuple[str, int]:
    if factor is None:
        return "none", 0
    with torch.no_grad():  # as in the pass that it tells about
        return factor.norm_method, factor.norm_cost
