"""Uses of parameters that have something to tell each other, found once per plan.

Owns: which uses read the same data, and have a Gram of them in common; and which bias is added to
what a matrix product returns, whose norm tells the bias' too.
Does not know: who keeps what is shared (`factors.notes`, `serving`), tensors.
"""

from math import prod

import torch

from pergrad.factors import costs
from pergrad.factors.constants import constants
from pergrad.graph import nodes
from pergrad.graph.plan import Plan
from pergrad.graph.uses import Site
from pergrad.graph.walk import Graph, Slot
from pergrad.kernels import fused
from pergrad.rules import data_input, one_for_each

Source = tuple[int, int, int]  # a slot of the graph, and the rows in which it is read


def common_inputs(graph: Graph, plan: Plan) -> tuple[dict[int, Source], dict[Source, int]]:
    """Uses whose norms take the Gram of data that others read too: node -> source, and how many.

    Whoever would not form that Gram, not even at its share of the cost, is no reader of it.
    """
    batch = graph.metas(graph.root[0])[graph.root[1]].shape[0]
    found: dict[Source, dict[int, tuple[int, int, int]]] = {}
    for site in plan.sites:
        source = _source(graph, site)
        if source is not None:
            rows, p = graph.shape((site.node, 0))
            d = prod(plan.ends[site.node, max(site.slots)].shape) // max(p, 1)
            found.setdefault(source, {})[site.node] = (rows // max(batch, 1), p, d)
    common: dict[int, Source] = {}
    readers: dict[Source, int] = {}
    for source, sizes in found.items():
        meta = graph.metas(next(iter(sizes)))[0]
        dtype = torch.promote_types(meta.dtype, torch.float32)
        by, kernel = constants(meta.device, dtype), fused(meta.device, dtype) is not None
        count = 0
        while count != len(sizes):  # who leaves makes the share of the others larger
            count = len(sizes)
            sizes = {
                node: size
                for node, size in sizes.items()
                if costs.outer_norm_method(*size, count, by, fused=kernel) in ("gram", "fused")
            }
        if count > 1:
            common |= dict.fromkeys(sizes, source)
            readers[source] = count
    return common, readers


def _source(graph: Graph, site: Site) -> Source | None:
    """Where a matrix product's data come from, behind views of it, and how many rows they have."""
    data = data_input(graph.op(site.node), site.slots)
    if data is None:
        return None
    child, number = _behind_views(graph, graph.edges[site.node][data])
    return (child, number, graph.shape((site.node, 0))[0]) if child >= 0 else None


def products_below(graph: Graph, plan: Plan) -> dict[int, int]:
    """Additions of a bias to what a matrix product returns: the one's node -> the other's.

    So does `F.linear` wherever its input is not contiguous, as in all of `nn.MultiheadAttention`,
    and `x @ weight + bias`.
    """
    products = {
        site.node
        for site in plan.sites
        if graph.op(site.node) == "mm" and data_input("mm", site.slots) is not None
    }
    found: dict[int, int] = {}
    for site in plan.sites:
        inputs = graph.edges[site.node]  # one, where a number is added
        if graph.op(site.node) != "add" or len(site.slots) != 1 or len(inputs) != 2:
            continue
        bias = site.slots[0]
        other = inputs[1 - bias]
        node, _ = _behind_views(graph, other)
        shape, columns = plan.ends[site.node, bias].shape, graph.shape((site.node, 0))[-1:]
        if (
            nodes.attribute(graph.nodes[site.node], "alpha") == 1
            and node in products
            and node not in found.values()
            and graph.shape(other) == graph.shape((site.node, 0))
            and graph.shape((node, 0))[1:] == columns
            and one_for_each(columns[0], shape)
        ):
            found[site.node] = node
    return found


def _behind_views(graph: Graph, slot: Slot) -> Slot:
    child, number = slot
    while child >= 0 and graph.leads[child] and graph.op(child) in ("view", "unsafe_view"):
        child, number = graph.edges[child][0]
    return child, number
