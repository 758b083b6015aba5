"""Ops whose backward in torch itself is wrong for tensors that lie in memory in certain ways.

Owns: where in a graph that may be, and the look at what arrives there, in every pass: a plan is the
same for tensors that lie otherwise, and a check of layouts sees only what leaves its example.
Does not know: any op, and what is wrong with its backward (`flawed` in the table tells).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from pergrad.errors import UnsupportedError
from pergrad.graph import nodes
from pergrad.graph.ops import traits
from pergrad.graph.walk import Graph


@dataclass(frozen=True, slots=True)
class Suspects:
    """Nodes at which torch's backward may be wrong, of any graph of one key."""

    shapes: tuple[int, ...] = ()  # because of their shapes
    vectors: tuple[int, ...] = ()  # others: if vectors that they saved do not lie dense


def suspects(graph: Graph) -> Suspects:
    """Those above what depends on parameters alone."""
    shapes: list[int] = []
    vectors: list[int] = []
    for i, leads in enumerate(graph.leads):
        flaw = traits(graph.op(i)).flaw if leads and not graph.pure[i] else None
        if flaw is None:  # the device is looked at where a gradient comes: keys have none
            continue
        (shapes if flaw.shapes(graph.shape((i, 0))) else vectors).append(i)
    return Suspects(tuple(shapes), tuple(vectors))


def doubtful(graph: Graph, among: Suspects) -> frozenset[int]:
    """The suspects of this very graph whose cotangents have to be looked at."""
    if not (among.shapes or among.vectors):
        return frozenset()
    found = set(among.shapes)
    for i in among.vectors:
        flaw = traits(graph.op(i)).flaw
        if flaw is not None and not nodes.lie_dense(graph.nodes[i], flaw.vectors):
            found.add(i)
    return frozenset(found)


def look(graph: Graph, i: int, cotangents: Sequence[Tensor | None]) -> None:
    """Look at what arrives at a doubtful node.

    Raises:
        UnsupportedError: torch's backward of it is wrong for that.
    """
    flaw, (g, *_) = traits(graph.op(i)).flaw, cotangents
    if flaw is None or g is None or g.numel() == 0 or g.device.type != "cpu":
        return
    why = flaw.told(graph.op(i), graph.nodes[i], g)
    if why is None:
        return
    below = graph.names_below(i, 1)
    near = f" (near parameter `{below[0]}`)" if below else ""
    raise UnsupportedError(
        f"torch's own backward of `{graph.op(i)}`{near} is wrong {why}, or use a release of torch "
        "in which it is right. No number is returned rather than a wrong one."
    )


@contextmanager
def watched(graph: Graph, at: frozenset[int]) -> Iterator[None]:
    """Look at what arrives at these nodes, in every pass that comes by them within."""
    handles = []
    try:
        for i in at:
            handles.append(nodes.before(graph.nodes[i], partial(look, graph, i)))
        yield
    finally:
        for handle in handles:
            handle.remove()
