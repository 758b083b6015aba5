"""BackPACK: `BatchL2Grad`, squared norms of each parameter's per-example gradients."""

from collections.abc import Callable

import torch
from backpack import backpack, extend
from backpack.extensions import BatchL2Grad
from torch import Tensor

from workloads import Step


def norms(step: Step) -> Callable[[tuple[Tensor, ...]], Tensor]:
    model = extend(step.model)

    def run(batch: tuple[Tensor, ...]) -> Tensor:
        model.zero_grad(set_to_none=True)
        with backpack(BatchL2Grad()):
            step.loss(model, *batch).sum().backward()
        missing = [name for name, p in step.params().items() if not hasattr(p, "batch_l2")]
        if missing:
            raise NotImplementedError(f"no batch_l2 for {missing[0]} and {len(missing) - 1} more")
        return torch.stack([p.batch_l2 for p in step.params().values()]).sum(0).sqrt()

    return run
