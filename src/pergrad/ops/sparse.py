"""Sparse data in a matrix product: bags of words, one-hot rows.

Owns: the factor of the dense operand, from the numbers that are stored: each adds a row.
Does not know: which operand of which op is the weight.
"""

from torch import Tensor

from pergrad.factors import Factor, mapped
from pergrad.graph.layout import Layout
from pergrad.ops.rows import Partition, row_owners, rows_by_id


def of_right_operand(
    data: Tensor, g: Tensor, layout: Layout, batch: int, shape: tuple[int, ...]
) -> Factor | None:
    """Of w in data @ w, (n, k) by (k, ...), where each row of the result has one owner.

    The number at (r, c) adds itself times g[r] to row c.
    """
    owners = row_owners(layout, (0,))
    assert owners is not None
    (rows, columns), values = _entries(data)
    scaled = values.reshape(-1, *[1] * (g.dim() - 1)) * g[rows]
    return rows_by_id(columns, scaled, Partition(owners[rows.cpu()], batch), shape)


def of_left_operand(
    data: Tensor, g: Tensor, layout: Layout, batch: int, shape: tuple[int, ...]
) -> Factor | None:
    """Of w in w @ data, (n, k) by (k, m), where each column of the result has one owner."""
    owners = row_owners(layout, (1,))
    assert owners is not None
    (rows, columns), values = _entries(data)
    scaled = values[:, None] * g.mT[columns]
    groups = Partition(owners[columns.cpu()], batch)
    turned = rows_by_id(rows, scaled, groups, (shape[1], shape[0]))
    return None if turned is None else mapped(turned, (("permute", (1, 0)),))


def _entries(data: Tensor) -> tuple[Tensor, Tensor]:
    listed = data.to_sparse_coo().coalesce()
    return listed.indices(), listed.values()
