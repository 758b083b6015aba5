"""Uses of parameters that read the same data, and have a Gram of them in common.

Owns: which they are, found once per plan.
Does not know: who keeps the Gram (`factors.notes`), tensors.
"""

from math import prod

import torch

from pergrad.factors import costs
from pergrad.factors.constants import constants
from pergrad.graph.plan import Plan
from pergrad.graph.uses import Site
from pergrad.graph.walk import Graph
from pergrad.kernels import fused
from pergrad.rules import data_input

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
    child, number = graph.edges[site.node][data]
    while child >= 0 and graph.leads[child] and graph.op(child) in ("view", "unsafe_view"):
        child, number = graph.edges[child][0]
    return (child, number, graph.shape((site.node, 0))[0]) if child >= 0 else None
