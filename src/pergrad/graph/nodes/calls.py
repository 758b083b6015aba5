"""One node's backward, run alone.

Owns: `call` and `raw_call`: no hooks fire, nothing is freed, nothing is accumulated.
Does not know: which nodes are called, and why.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pergrad.errors import UnsupportedError
from pergrad.graph.nodes.reading import (
    Node,
    edges,
    fields,
    is_python,
    metas,
    nested,
    op_name,
)
from pergrad.graph.nodes.unpacking import before_reading, in_our_words


def call(
    node: Node, cotangents: Sequence[Tensor | None], *, last_read: bool = False
) -> tuple[Tensor | None, ...]:
    """Run one node's backward alone: no hooks fire, nothing is freed, nothing is accumulated.

    The results are brought to shape and dtype of the op's inputs where only the engine would
    have done so (see `raw_call` for why). `last_read`: nobody in this pass will run the node again.
    """
    results = raw_call(node, cotangents, last_read=last_read)
    return tuple(
        None if value is None or child is None else _fit(value, child, number)
        for value, (child, number) in zip(results, edges(node), strict=True)
    )


def raw_call(
    node: Node, cotangents: Sequence[Tensor | None], *, last_read: bool = False
) -> tuple[Tensor | None, ...]:
    """As `call`, but the gradient of a broadcast operand keeps the output's shape.

    torch's engine, not the node, sums such a gradient to the operand's shape.
    """
    before_reading(node, fields(type(node))[1], another=not last_read)
    with in_our_words():
        if is_python(node):
            # A Python Function gets None otherwise, where the engine would give it zeros.
            filled = [
                torch.zeros(m.shape, dtype=m.dtype, device=m.device) if c is None else c
                for c, m in zip(cotangents, metas(node), strict=True)
            ]
            return _of_tensors(node, node.apply(*filled))
        else:
            results = node(*cotangents)
    if not isinstance(results, (tuple, list)):
        results = (results,)
    count = len(edges(node))
    return tuple(results)[:count] + (None,) * (count - len(results))


def _fit(value: Tensor, child: Node, number: int) -> Tensor:
    meta = metas(child)[number]
    if value.layout is not torch.strided:  # such as gather(sparse_grad=True) returns
        if value.is_nested:
            raise nested(child)
        value = value.to_dense()
    if tuple(value.shape) != meta.shape:
        value = value.sum_to_size(meta.shape)
    if value.dtype != meta.dtype:
        value = value.to(meta.dtype)
    return value


def _of_tensors(node: Node, results: Any) -> tuple[Tensor | None, ...]:
    """What a Function's backward returned, by edge: arguments that are no tensors have no edge."""
    if not isinstance(results, (tuple, list)):
        results = (results,)
    below = edges(node)
    live = [k for k, (child, _) in enumerate(below) if child is not None]
    needed = [i for i, needs in enumerate(node.needs_input_grad) if needs]
    if len(live) != len(needed) or (needed and needed[-1] >= len(results)):
        raise UnsupportedError(
            f"The backward of the autograd.Function `{op_name(node)}` returns {len(results)} "
            f"gradients for {len(node.needs_input_grad)} arguments, so pergrad cannot tell which "
            "is whose. Return one gradient (or None) for each argument of forward."
        )
    found: list[Tensor | None] = [None] * len(below)
    for k, i in zip(live, needed, strict=True):
        found[k] = results[i]
    return tuple(found)
