"""A scalar loss taken apart into what each example adds to it.

Owns: `parts`; `summands`, the same for a reading, which needs no values; the check that the parts
sum up to the loss; and what is said about summands that are no examples'.
Does not know: gradients.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pergrad.errors import UnsupportedError, UsageError
from pergrad.graph.layout import Layout
from pergrad.graph.walk import Graph, walk
from pergrad.training.trunk import Term, Trunk, start_edges, start_layout, take_apart

# Sums of many rows in another order: so many units of the last place, relative to the sum of sizes.
_ULPS = 64


def parts(
    loss: Tensor,
    examples: int | None = None,
    *,
    batch_dim: int = 0,
    rest: bool = False,
) -> Tensor:
    """What each example adds to a scalar loss, from the loss's graph.

        sum over b of parts[b] + rest = loss

    Loss functions of torch save what they were made from. It is read from the graph and reduced by
    example instead of over all rows, with the factors above. That the sum is the loss is checked.

    Args:
        loss: a scalar with a graph that no backward pass has used up.
        examples: how many examples it is made of, which have equal shares of its rows. None: each
            row is one.
        batch_dim: as in `reading`.
        rest: whether summands that belong to no example are left out, rather than refused.

    Returns:
        (B,), attached to the graph. It has two more attributes: `rest`, a scalar, the loss without
        the parts; and `how`, in words.

    Raises:
        UsageError: no scalar with a graph, or rows that the examples do not divide, or a summand
            that belongs to no example, without `rest`.
        UnsupportedError: an op reduced the rows that saves no values, such as a mean; `reading`
            needs none.

    Cost: the loss function once more, without its model. On a GPU the sum is waited for.

        >>> import torch, pergrad
        >>> import torch.nn.functional as F
        >>> model = torch.nn.Linear(2, 3)
        >>> loss = F.cross_entropy(model(torch.randn(4, 2)), torch.tensor([0, 2, 1, 1])) / 2
        >>> parts = pergrad.parts(loss)
        >>> torch.allclose(parts.sum(), loss)
        True
    """
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(f"`loss` is {what}; pass a scalar tensor. Losses (B,) are parts.")
    if not loss.requires_grad or loss.grad_fn is None:
        raise UsageError(
            "`loss` has no graph: it was computed under torch.no_grad() or detached. Pass it as it "
            "comes out of the forward pass, before backward."
        )
    graph = walk(loss, {})
    with torch.enable_grad():
        found = summands(loss, graph, examples, batch_dim, rest, live=True)
        if found.values is None:
            raise found.no_values()
        found.check()
        values = found.values
        values.rest = loss - values.sum()  # type: ignore[attr-defined]
        values.how = found.how  # type: ignore[attr-defined]
    return values


@dataclass(slots=True)
class Summands:
    """A scalar loss, taken apart."""

    loss: Tensor
    values: Tensor | None  # (B,)
    how: str
    without: str  # the first op without values
    exact: bool  # whether the parts are all of the loss
    tokens: Tensor  # (B,): how many rows of the first term each example has that count
    unit: Tensor  # what one row's loss is multiplied by

    def check(self) -> None:
        """The parts sum up to the loss.

        Raises:
            UnsupportedError: they do not.
        """
        if self.values is None or not self.exact:
            return
        values, loss = self.values.detach().double(), self.loss.double()
        eps = torch.finfo(self.loss.dtype).eps
        off = (values.sum() - loss).abs() > _ULPS * eps * values.abs().sum()
        if bool(off & torch.isfinite(loss)):
            raise UnsupportedError(
                f"The parts of the loss ({self.how}) sum up to {float(values.sum()):.6g}, the loss "
                f"is {float(loss):.6g}: something else was added to it, or changed in place. Give "
                "pergrad the losses (B,) in its place."
            )

    def no_values(self) -> UnsupportedError:
        """Why the parts have no values."""
        return UnsupportedError(
            f"The loss comes from `{self.without}`, which saves no values, so the parts of its "
            "examples cannot be computed from the graph. `pergrad.reading(loss, model, examples)` "
            "needs none for their norms; for values, give it the losses (B,)."
        )


def summands(
    loss: Tensor,
    graph: Graph,
    examples: int | None,
    batch_dim: int,
    rest: bool,
    *,
    live: bool = False,
) -> Summands:
    """Take a scalar apart, and tell its graph where examples begin to separate."""
    trunk = take_apart(graph)
    _refuse(trunk, graph, rest)
    if examples is None:
        term = trunk.terms[0]
        examples = term.shape[batch_dim] if len(term.shape) > abs(batch_dim) else 1
        examples = term.shape[0] if term.op == "nll_loss" else examples
    if not isinstance(examples, int) or isinstance(examples, bool) or examples < 0:
        raise UsageError(f"`examples` is {examples!r}; pass the number of examples in this batch.")
    layouts = [start_layout(graph, term, examples, batch_dim) for term in trunk.terms]
    graph.batch, graph.starts = examples, start_edges(trunk.terms, layouts)
    if trunk.others:
        _apart(graph, trunk)
    without = next((term.op for term in trunk.terms if term.values is None), "")
    values = None
    if not without:
        with torch.set_grad_enabled(live):
            values = sum(
                _by_example(term, layout, examples, loss)
                for term, layout in zip(trunk.terms, layouts, strict=True)
            )
    words = [_words(term, examples) for term in trunk.terms]
    words += [f"without `{graph.op(i)}`" for i in trunk.others]
    exact = not trunk.others and not (trunk.constant and rest)
    tokens, unit = _counts(trunk.terms, layouts, examples, loss)
    how = " + ".join(words)
    value = loss.detach().clone()  # a trainer may multiply it in place
    return Summands(value, values, how, without, exact, tokens, unit)  # type: ignore[arg-type]


def _words(term: Term, examples: int) -> str:
    rows = term.shape[0] if term.op == "nll_loss" or len(term.shape) == 1 else term.shape
    return f"`{term.op}` over {rows} rows of {examples} examples"


def _by_example(term: Term, layout: Layout, examples: int, loss: Tensor) -> Tensor:
    """(B,): the sum of each example's elements, times the factor."""
    assert term.values is not None
    total = _summed(term.values(), _owners(term, layout), examples)
    return (total * term.factor).to(torch.promote_types(loss.dtype, torch.float32))


@dataclass(frozen=True, slots=True)
class _Owners:
    """The example of each row of a term."""

    owner: Tensor
    memo: dict[Any, Any]  # the layout's: what was worked out from it
    name: str

    def each(self, shape: torch.Size, examples: int) -> int | None:
        """How many values each example has, if they lie in order; None if they do not."""
        key = "each", self.name, shape, examples
        if key not in self.memo:
            self.memo[key] = _in_order(self.owner.expand(shape).reshape(-1), examples)
        return self.memo[key]

    def all_rows(self, shape: tuple[int, ...], examples: int, device: torch.device) -> Tensor:
        """(B,): how many values each example has."""
        key = "rows", self.name, shape, examples, device
        if key not in self.memo:
            ones = torch.ones(1, dtype=torch.float64, device=device).expand(shape)
            self.memo[key] = _summed(ones, self, examples)
        return self.memo[key].clone()


def _in_order(owners: Tensor, examples: int) -> int | None:
    each, left = divmod(len(owners), examples) if examples else (0, 1)
    ideal = None if left else torch.arange(examples, device="cpu").repeat_interleave(each)
    return each if ideal is not None and torch.equal(ideal, owners.cpu()) else None


def _owners(term: Term, layout: Layout) -> _Owners:
    owner, rows = layout.owner, False
    if term.op.startswith(("nll", "multi")):  # a value for each row, not for each class
        rows = owner.dim() > 1
        owner = owner[:, 0] if rows else owner
    return _Owners(owner, layout.memo, "rows" if rows else "elements")


def _summed(values: Tensor, owners: _Owners, examples: int) -> Tensor:
    """(B,): the values of each example, summed in float32 or better."""
    wide = torch.promote_types(values.dtype, torch.float32)
    each = owners.each(values.shape, examples)
    if each is not None:
        values = values.reshape(examples, each)
        return values[:, 0].to(wide) if each == 1 else values.sum(1, dtype=wide)
    owner = owners.owner.to(values.device).expand(values.shape).reshape(-1)
    total = values.new_zeros(examples + 1, dtype=wide)
    rows = torch.where(owner < 0, examples, owner)
    return total.index_add(0, rows, values.reshape(-1).to(wide))[:examples]


def _counts(
    terms: list[Term], layouts: list[Layout], examples: int, loss: Tensor
) -> tuple[Tensor, Tensor]:
    """(B,), how many rows each example has that count; and what one row's loss is multiplied by."""
    chosen = next((k for k, term in enumerate(terms) if term.counted is not None), 0)
    term, owners = terms[chosen], _owners(terms[chosen], layouts[chosen])
    with torch.no_grad():
        if term.counted is not None:
            tokens = _summed(term.counted().to(torch.float64), owners, examples)
        else:
            shape = term.shape[:1] if term.op.startswith("multi") else term.shape
            tokens = owners.all_rows(shape, examples, loss.device)
        unit = torch.as_tensor(term.factor, dtype=torch.float64, device=loss.device)
        if term.mean:
            unit = unit / tokens.sum().clamp(min=1)
    return tokens, unit


def _refuse(trunk: Trunk, graph: Graph, rest: bool) -> None:
    if trunk.others and (not rest or not trunk.terms):
        op = graph.op(trunk.others[0])
        below = graph.names_below(trunk.others[0], 1)
        near = f" (near parameter `{below[0]}`)" if below else ""
        raise UsageError(
            f"A summand of the loss comes from `{op}`{near}, which is no sum or mean over examples "
            "that pergrad can take apart. If it belongs to no example, pass rest=True to leave it "
            "out; otherwise give pergrad.reading the losses (B,)."
        )
    if not trunk.terms:
        raise UsageError("Nothing in the graph of this loss is a sum or mean over examples.")


def _apart(graph: Graph, trunk: Trunk) -> None:
    """What is left out sends no gradient where the examples' gradients are read.

    Raises:
        UnsupportedError: it does.
    """
    starts = [graph.edges[i][k][0] for i, k in graph.starts or ()]
    here = graph.below(starts, everything=True)
    there = graph.below(trunk.others, everything=True)
    for i in sorted(there & here):
        if graph.leads[i] and not graph.pure[i]:
            raise UnsupportedError(
                f"The summand `{graph.op(trunk.others[0])}` of the loss belongs to no example and "
                f"goes backward through `{graph.op(i)}` as the examples do, so their gradients "
                "cannot be told apart in one pass. Give it a backward pass of its own, or take "
                "`pergrad.norms` of the losses (B,) before."
            )
