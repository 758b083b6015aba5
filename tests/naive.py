"""The judge: per-example gradients by naive loops, and what follows from them, in float64.

Owns: the two references, and the definition of every number that the tests compare with. One
backward for each example of one forward, and one forward and backward for each example alone: where
they disagree, examples influence each other.
Does not know: pergrad. Nothing here may import it.

Gradients are a dict: name -> (B, *shape of the parameter), float64.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

Grads = dict[str, Tensor]
Params = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]


def named(params: Params) -> dict[str, Tensor]:
    """What requires grad, by name; one tensor under two names counts once, under the first."""
    if isinstance(params, nn.Module):
        pairs = list(params.named_parameters(remove_duplicate=False))
    elif isinstance(params, Mapping):
        pairs = list(params.items())
    else:
        pairs = [(str(i), p) for i, p in enumerate(params)]
    found: dict[str, Tensor] = {}
    for name, p in pairs:
        if p.requires_grad and all(p is not q for q in found.values()):
            found[name] = p
    return found


def one_grad(
    loss: Tensor, params: Mapping[str, Tensor], *, retain_graph: bool = True
) -> dict[str, Tensor]:
    """The gradient of one loss, by name; zeros for what it does not reach."""
    if not loss.requires_grad:
        return {n: torch.zeros_like(p, dtype=torch.float64) for n, p in params.items()}
    grads = torch.autograd.grad(
        loss, list(params.values()), retain_graph=retain_graph, allow_unused=True
    )
    return {
        n: torch.zeros_like(p, dtype=torch.float64) if g is None else g.to_dense().detach().double()
        for (n, p), g in zip(params.items(), grads, strict=True)
    }


def _stack(rows: list[dict[str, Tensor]], params: Mapping[str, Tensor]) -> Grads:
    if not rows:
        return {n: torch.zeros((0, *p.shape), dtype=torch.float64) for n, p in params.items()}
    return {n: torch.stack([row[n] for row in rows]).detach() for n in params}


def loop_grads(losses: Tensor, params: Params, *, retain_graph: bool = True) -> Grads:
    """B backward passes through the graph of one forward pass."""
    found, last = named(params), len(losses) - 1
    rows = [
        one_grad(losses[b], found, retain_graph=retain_graph or b < last)
        for b in range(len(losses))
    ]
    return _stack(rows, found)


def alone_grads(loss_of: Callable[[int], Tensor], params: Params, batch: int) -> Grads:
    """B forward and backward passes, of one example each. `loss_of(i)` has one element."""
    found = named(params)
    rows = [one_grad(loss_of(b).reshape(()), found, retain_graph=False) for b in range(batch)]
    return _stack(rows, found)


def live_rows(losses: Tensor, params: Params) -> Tensor:
    """(B, P), by the loop, differentiable: for what create_graph=True has to agree with."""
    found = named(params)
    rows = []
    for b in range(len(losses)):
        grads = torch.autograd.grad(
            losses[b], list(found.values()), create_graph=True, allow_unused=True
        )
        parts = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(found.values(), grads, strict=True)
        ]
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


# -- what follows from the gradients ---------------------------------------------------------------


def flat(grads: Grads) -> Tensor:
    """(B, P)"""
    return torch.cat([g[:, None].flatten(1) for g in grads.values()], 1).double()


def norms(grads: Grads) -> Tensor:
    """(B,)"""
    return flat(grads).norm(dim=1)


def norms_by_parameter(grads: Grads) -> dict[str, Tensor]:
    """name -> (B,)"""
    return {n: norms({n: g}) for n, g in grads.items()}


def gram(grads: Grads, other: Grads | None = None) -> Tensor:
    """(B, K): inner products of all rows with all rows, matched by name."""
    other = grads if other is None else {n: other[n] for n in grads}
    return flat(grads) @ flat(other).T


def row_dots(grads: Grads, other: Grads) -> Tensor:
    """(B,): inner products of row b with row b."""
    return (flat(grads) * flat({n: other[n] for n in grads})).sum(1)


def cosines(grads: Grads, other: Grads) -> Tensor:
    """(B, K); 0 where a row is zero."""
    scale = norms(grads)[:, None] * norms(other)[None]
    return torch.where(scale == 0, 0.0, gram(grads, other) / torch.where(scale == 0, 1.0, scale))


def matvec(grads: Grads, direction: Mapping[str, Tensor]) -> Tensor:
    """(B,): inner products with one direction."""
    return flat(grads) @ torch.cat([direction[n].double().reshape(-1) for n in grads])


def weighted_sum(grads: Grads, c: Tensor) -> dict[str, Tensor]:
    """name -> sum over b of c[b] times row b, shaped as the parameter"""
    return {n: torch.tensordot(c.double(), g, 1) for n, g in grads.items()}


def take(grads: Grads, index: object) -> Grads:
    """Some of the rows."""
    return {n: g[index] for n, g in grads.items()}


def scale(grads: Grads, c: Tensor) -> Grads:
    """Row b times c[b]."""
    return {n: g * c.double().reshape(-1, *[1] * (g.dim() - 1)) for n, g in grads.items()}


def clip_weights(grads: Grads, max_norm: float) -> Tensor:
    """(B,): min(1, max_norm / norm); 1 where the norm is 0."""
    weights = [1.0 if n == 0 else min(1.0, max_norm / n) for n in norms(grads).tolist()]
    return torch.tensor(weights, dtype=torch.float64)


def kronecker(G: Tensor, A: Tensor | float, S: Tensor | float) -> Tensor:
    """S G A for every row of G (B, p, ...); A acts on all but the first two dimensions."""
    rows = G.flatten(2)
    if isinstance(A, Tensor):
        rows = rows @ (A if A.dim() == 2 else A.diag())
    else:
        rows = rows * A
    if isinstance(S, Tensor):
        rows = torch.einsum("pq,bqd->bpd", S if S.dim() == 2 else S.diag(), rows)
    else:
        rows = rows * S
    return rows.reshape(G.shape)
