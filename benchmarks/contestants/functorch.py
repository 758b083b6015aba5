"""`torch.func`: all per-example gradients by `vmap(grad)`, then what is asked of them.

Where the gradients of a batch are larger than `CHUNK_BYTES`, in chunks of examples, as a user who
runs out of memory would; a Gram matrix needs them all at once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from workloads import Step

CHUNK_BYTES = 3 << 30

Batch = tuple[Tensor, ...]
Gradients = dict[str, Tensor]  # name -> (examples, *shape)


def _all(step: Step) -> Callable[[Batch], Gradients]:
    def one(params: Gradients, *example: Tensor) -> Tensor:
        def call(*inputs: Tensor) -> Tensor:
            return functional_call(step.model, params, inputs)

        return step.loss(call, *(t[None] for t in example))[0]

    # the same dropout for everyone is no concern here: the models have none
    gradients = vmap(grad(one), (None, *(0 for _ in step.batch)))

    def run(batch: Batch) -> Gradients:
        params = {name: p.detach() for name, p in step.params().items()}
        with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused attention, and loops
            return gradients(params, *batch)

    return run


def _chunks(step: Step) -> Callable[[Batch], Iterator[Gradients]]:
    gradients = _all(step)
    each = sum(p.numel() * p.element_size() for p in step.params().values())
    size = max(1, CHUNK_BYTES // each)

    def run(batch: Batch) -> Iterator[Gradients]:
        for lo in range(0, len(batch[0]), size):
            yield gradients(tuple(t[lo : lo + size] for t in batch))

    return run


def _norms(grads: Gradients) -> Tensor:
    return torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()


def _products(left: Gradients, right: Gradients) -> Tensor:
    return torch.stack([left[n].flatten(1) @ right[n].flatten(1).T for n in left]).sum(0)


def norms(step: Step) -> Callable[[Batch], Tensor]:
    gradients = _chunks(step)
    return lambda batch: torch.cat([_norms(grads) for grads in gradients(batch)])


lengths = norms


def gram(step: Step) -> Callable[[Batch], Tensor]:
    gradients = _all(step)

    def run(batch: Batch) -> Tensor:
        grads = gradients(batch)
        return _products(grads, grads)

    return run


def cross(step: Step) -> Callable[[Batch], Tensor]:
    gradients, chunks = _all(step), _chunks(step)

    def run(batch: Batch) -> Tensor:
        others = gradients(step.reference)
        return torch.cat([_products(grads, others) for grads in chunks(batch)])

    return run


def direction(step: Step) -> Callable[[Batch], Tensor]:
    gradients, v = _chunks(step), {name: t[None] for name, t in step.direction().items()}
    return lambda batch: torch.cat([_products(grads, v)[:, 0] for grads in gradients(batch)])


def clip(step: Step) -> Callable[[Batch], tuple[Tensor, dict[str, Any]]]:
    gradients = _chunks(step)

    def run(batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        found, total = [], {name: torch.zeros_like(p) for name, p in step.params().items()}
        for grads in gradients(batch):
            found.append(_norms(grads))
            weights = (1.0 / found[-1]).clamp_max(1.0)
            for name, g in grads.items():
                total[name].add_((weights @ g.flatten(1)).view_as(total[name]))
        return torch.cat(found), total

    return run
