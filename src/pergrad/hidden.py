"""Parameters whose gradients bypass the graph.

Owns: noticing them, and leaving their `.grad` as it was.
Does not know: the graph. A Function may hold a whole block and run a backward pass of its own
inside its backward, as reversible layers and other packages' checkpoints do. The block's parameters
are then absent from the graph, and their gradients, summed over examples, go straight to `.grad`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from pergrad.errors import UnsupportedError


@contextmanager
def nothing_hidden(params: Mapping[str, Tensor]) -> Iterator[None]:
    """Whatever passes run inside, no op of theirs has written to a parameter's `.grad`.

    Raises:
        UnsupportedError: one has. `.grad` is as before all the same.
    """
    before = {name: p.grad for name, p in params.items() if p.is_leaf}
    for name in before:
        params[name].grad = None
    hidden: list[str] = []
    try:
        yield
    finally:
        for name, grad in before.items():
            if params[name].grad is not None:
                hidden.append(name)
            params[name].grad = grad
    if hidden:
        raise UnsupportedError(
            f"An op of the graph runs a backward pass of its own, and so hides {len(hidden)} "
            f"parameters from it, the first being `{hidden[0]}`: their gradients would be missing "
            "without a word. Reversible layers do so, and some checkpoints. Compute the losses "
            "without them (they save memory, and change no result)."
        )
