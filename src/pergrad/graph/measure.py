"""Layouts measured rather than derived: which example does each element of a cotangent follow?

Owns: backward passes over a graph with made-up seeds, of which `powers` reads the owners, and the
check of layouts that were derived.
Does not know: ops. It runs nodes itself, one by one, so that no hook of the user's and no
retained `.grad` ever sees a made-up gradient.
"""

from collections.abc import Callable, Container, Iterable, Mapping

import torch
from torch import Tensor

from pergrad.errors import UnsupportedError
from pergrad.graph import nodes
from pergrad.graph.flaws import doubtful, look, suspects
from pergrad.graph.layout import NOBODY, Layout
from pergrad.graph.powers import MANY, Run, hold, layout_of, ones, owners_of, parts, times, whole
from pergrad.graph.uses import Measured
from pergrad.graph.walk import Graph, Slot

Visit = Callable[[Slot, Tensor], None]


def measure(
    losses: Tensor, graph: Graph, slots: list[Slot], before: Measured | None = None
) -> Measured:
    """The layout of the cotangent at each slot, or None where examples meet in one element.

    What was found `before` at all of them in an equal graph is returned if it holds: a pass less.
    """
    run, narrow = _run(losses, graph), _narrow(graph)
    plain = run(ones(graph.batch), slots)
    expected = {slot: layout for slot in slots if before and (layout := before[slot]) is not None}
    if len(expected) == len(slots) and not narrow and hold(run, plain, expected, graph.batch):
        return dict(expected)
    return {
        slot: layout_of(graph.shape(slot), owner, graph.batch)
        for slot, owner in owners_of(run, plain, graph.batch, narrow).items()
    }


def _run(losses: Tensor, graph: Graph) -> Run[Slot]:
    """A pass over the graph for seeds of the examples."""
    return lambda seeds, slots: _pass(losses, graph, slots, seeds)


def stand_beside(losses: Tensor, graph: Graph, slots: Iterable[Slot]) -> bool:
    """Whether what all examples share is merely joined with them: inducing points, a support set.

    Each example then has rows that no other loss depends on, and the shared rows are a block before
    or after those. Where examples interact, their own rows depend on several losses.
    """
    run, narrow = _run(losses, graph), _narrow(graph)
    owners = owners_of(run, run(ones(graph.batch), list(slots)), graph.batch, narrow)
    return all(
        _beside(whole(graph.shape(slot), owner), graph.batch) for slot, owner in owners.items()
    )


def _beside(owner: Tensor, examples: int) -> bool:
    for dim in range(owner.dim()):
        if not owner.numel():
            return False
        rows = owner.movedim(dim, 0).reshape(owner.shape[dim], -1)
        shared = (rows == MANY).any(1)
        count = int(shared.sum())
        if not 0 < count < len(rows) or not (shared[:count].all() or shared[-count:].all()):
            continue
        rest = rows[~shared]
        own = rest.amax(1)
        alone = ((rest == own[:, None]) | (rest == NOBODY)).all()
        if alone and own[own >= 0].unique().numel() == examples:
            return True
    return False


def _narrow(graph: Graph) -> bool:
    """Whether float16 occurs, which has no room for seeds other than signs."""
    return any(
        meta.dtype == torch.float16
        for i, leads in enumerate(graph.leads)
        if leads
        for meta in graph.metas(i)
    )


def _pass(losses: Tensor, graph: Graph, slots: list[Slot], seeds: Tensor,
          visit: Visit | None = None) -> dict[Slot, Tensor | None]:  # fmt: skip
    """The cotangents at `slots` for the given seeds; no hook runs, nothing is freed.

    With `visit`, each is handed over once it is complete, and not kept.
    """
    found: dict[Slot, Tensor | None] = dict.fromkeys(slots)
    at_node: dict[int, list[int]] = {}
    for i, number in slots:
        at_node.setdefault(i, []).append(number)
    above = _above(graph, at_node)
    doubted = doubtful(graph, suspects(graph))

    def work() -> None:
        root, number = graph.root
        grads: dict[int, list[Tensor | None]] = {root: [None] * len(graph.metas(root))}
        seed = seeds if graph.starts is None else torch.ones(graph.shape(graph.root))
        grads[root][number] = seed.to(dtype=losses.dtype, device=losses.device)
        for i in range(len(graph.nodes)):
            here = grads.pop(i, None)
            if here is None:
                continue
            for number in at_node.get(i, ()):
                value = here[number]
                if visit is None:
                    found[i, number] = parts(value)
                elif value is not None:
                    visit((i, number), value if value.layout is torch.strided else value.to_dense())
            if i not in above:
                continue
            if i in doubted:
                look(graph, i, here)
            results = nodes.call(graph.nodes[i], here, last_read=True)
            del here
            for k, (child, out) in enumerate(graph.edges[i]):
                value = results[k]
                if value is None or not (child in above or child in at_node):
                    continue
                if graph.starts is not None and (i, k) in graph.starts:
                    value = value * times(seeds, graph.starts[i, k], nobody=1.0).to(value)
                below = grads.setdefault(child, [None] * len(graph.metas(child)))
                old = below[out]
                below[out] = value if old is None else old + value
                del value, old, below
            del results

    with (
        torch.no_grad(),
        nodes.selections_untouched(graph.nodes),
        nodes.compiled_regions_kept(graph.python),
    ):
        nodes.inside_pass(losses, [graph.edge(slot) for slot in slots], work)
    return found


def _above(graph: Graph, wanted: Container[int]) -> set[int]:
    """Nodes strictly above one of the wanted ones."""
    above: set[int] = set()
    for i in range(len(graph.nodes) - 1, -1, -1):
        if any(c in wanted or c in above for c, _ in graph.edges[i] if c >= 0):
            above.add(i)
    return above


def verify(
    losses: Tensor,
    graph: Graph,
    layouts: Mapping[Slot, Layout],
    everywhere: Callable[[], Mapping[Slot, Layout]],
) -> None:
    """Hold layouts that were derived from the ops' structure against the numbers.

    Two passes: seeds of one, and seeds of random signs and powers of two. Only a fingerprint of
    each cotangent is kept between them, so that the memory is that of one backward. Where they
    disagree, the layouts `everywhere` tell at which op it begins.

    Raises:
        UnsupportedError: an element does not follow the example that it was derived to belong to.
    """
    wrong = _wrong(losses, graph, layouts)
    if not wrong:
        return
    first = min([*wrong, *_wrong(losses, graph, everywhere())])  # those above come first
    parents = [graph.op(i) for i, below in enumerate(graph.edges) if first in below]
    near = graph.targets.get(first) or (graph.names_below(first[0], 1) or ["?"])[0]
    raise UnsupportedError(
        f"The gradient that {_either(parents)} hands down (near parameter `{near}`) does not "
        "follow the examples as the op's structure says. Either torch's own backward of that op is "
        "wrong for this input, in your training too (`.contiguous()` on the input may mend it), or "
        "this is a defect of pergrad; please report it with this model. No number is returned "
        "rather than a wrong one."
    )


def _either(ops: Iterable[str]) -> str:
    return " or ".join(f"`{name}`" for name in dict.fromkeys(ops)) or "the losses' own op"


def _wrong(losses: Tensor, graph: Graph, layouts: Mapping[Slot, Layout]) -> list[Slot]:
    """The slots at which the numbers are not where the layouts say."""
    examples = graph.batch
    generator = torch.Generator().manual_seed(21)
    signs = torch.randint(0, 2, (examples,), generator=generator, device="cpu") * 2.0 - 1.0
    powers = torch.randint(0, 8, (examples,), generator=generator, device="cpu")
    narrow = _narrow(graph)
    wrong = [] if narrow else _unlike(losses, graph, layouts, signs * 2.0**powers)
    if wrong or narrow:
        # No room for powers. Signs that spell out the examples' numbers tell any two apart.
        numbers = torch.arange(examples, device="cpu")
        digits = [(numbers >> place) % 2 for place in range((examples - 1).bit_length())]
        wrong = [w for d in digits for w in _unlike(losses, graph, layouts, 1.0 - 2.0 * d)]
        if wrong:
            # A backward that is no linear map: leave examples out, and put them in.
            masks = [(d == bit).double() for d in digits for bit in (0, 1)]
            wrong = [w for mask in masks for w in _unlike(losses, graph, layouts, mask)]
    return wrong


def _unlike(
    losses: Tensor, graph: Graph, layouts: Mapping[Slot, Layout], seeds: Tensor
) -> list[Slot]:
    """The slots at which a pass with `seeds` is not the plain one times the owner's seed."""
    slots = list(layouts)
    prints: dict[Slot, float] = {}
    wrong: list[Slot] = []
    masks = bool((seeds == 0).any())

    def factor(slot: Slot, of: Tensor, like: Tensor) -> Tensor:
        owner = layouts[slot].owner
        return torch.where(owner < 0, 0.0, of[owner.clamp_min(0)]).to(like)

    def first(slot: Slot, g: Tensor) -> None:
        prints[slot] = _fingerprint(g, factor(slot, seeds, g) if masks else None)

    _pass(losses, graph, slots, torch.ones(graph.batch, device="cpu"), first)

    def compare(slot: Slot, g: Tensor) -> None:
        mine = _fingerprint(g, None if masks else factor(slot, 1.0 / seeds, g))
        before = prints.get(slot, 0.0)
        exact = g.device.type == "cpu"
        if mine != before and (exact or abs(mine - before) > 1e-3 * max(abs(mine), abs(before))):
            wrong.append(slot)

    _pass(losses, graph, slots, seeds, compare)
    return wrong


_PIECE = 1 << 16  # elements at a time: the check should not need the memory of a step


def _fingerprint(g: Tensor, back: Tensor | None = None) -> float:
    """A number that changes with any bit of g * back; on a GPU, where sums vary, a sum."""
    if g.dim() == 0:
        g, back = g[None], None if back is None else back[None]
    rows = max(1, _PIECE * g.shape[0] // max(1, g.numel()))
    total: float = 0
    for start in range(0, g.shape[0], rows):
        piece = g[start : start + rows]
        if back is not None:
            piece = piece * (back if back.shape[0] == 1 else back[start : start + rows])
        total += _bits(piece, start * (g.numel() // g.shape[0]))
    return total


def _bits(g: Tensor, offset: int) -> float:
    g = torch.view_as_real(g.resolve_conj()) if g.is_complex() else g
    g = torch.nan_to_num(g.reshape(-1), nan=0.0, posinf=0.0, neginf=0.0)
    if g.device.type != "cpu":
        weights = torch.arange(g.numel(), device=g.device).remainder(97).add(1.0)
        return float((g.double().abs() * weights).sum())
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[g.element_size()]
    bits = (g + 0).view(whole).long()  # + 0: minus zero and zero are the same gradient
    # A product keeps of a changed sign, the highest bit, no more than the factor's parity: mix
    # high bits into low ones first, and weigh by odd numbers.
    bits = bits ^ (bits >> 31)
    bits = bits * -0x61C8864680B583EB
    bits = bits ^ (bits >> 29)
    places = torch.arange(offset, offset + bits.numel(), device="cpu")
    return int((bits * (places * 0x9E3779B2 + 0x85EBCA6B)).sum())
