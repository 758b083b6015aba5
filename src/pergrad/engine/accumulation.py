"""What a backward pass does with a finished gradient.

Owns: adding to `.grad`, sparse or dense, and the hooks that follow.
Does not know: where the gradient comes from.
"""

from torch import Tensor

from pergrad.graph import nodes


def accumulate(p: Tensor, value: Tensor) -> None:
    """As torch does at the end of a backward pass, hooks included."""
    value = value.detach().to(p.dtype)
    if not value.is_sparse:
        value = value.reshape(p.shape).contiguous()
    if p.grad is None:
        p.grad = value  # a weighted sum is nobody else's
    elif p.grad.is_sparse and not value.is_sparse:
        p.grad = value + p.grad.detach()
    else:
        p.grad = p.grad.detach() + value if p.grad.requires_grad else p.grad.add_(value)
    for hook in nodes.hooks_after_accumulation(p):
        hook(p)
