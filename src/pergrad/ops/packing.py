"""Sequences of different lengths packed into one tensor: step by step, the examples still there.

Owns: how ownership moves through `pack_padded_sequence`; `pad_packed_sequence` is other ops.
Does not know: what reads the packed rows.
"""

import torch

from pergrad.graph.layout import Layout, compressed
from pergrad.graph.ops import Op, Result, declare, owners, unknown

declare("pack_padded_sequence", needs=["result1", "batch_first"])


@owners("pack_padded_sequence")
def _packed(op: Op, out: Layout) -> list[Result]:
    """(rows, ...) from (T, N, ...), or (N, T, ...) batch-first: one owner for each of N."""
    shape = op.in_shapes[0]
    assert shape is not None
    steps = op.data("result1").tolist()  # how many sequences are that long: never more than before
    columns = 0 if op.attr("batch_first") else 1
    owner = out.owner
    if owner.shape[0] != 1:
        first = owner[: steps[0]]
        again = torch.cat([first[:count] for count in steps])
        if steps[0] != shape[columns] or not torch.equal(again, owner):
            return unknown(op)
        owner = first
    return [compressed(shape, owner.unsqueeze(1 - columns))]
