"""TorchJD: `autogram.Engine`, the Gram matrix accumulated layer by layer with vmap.

As for Opacus, the models look their positions up for each example.
"""

from collections.abc import Callable

from torch import Tensor
from torchjd.autogram import Engine

from workloads import Step


def gram(step: Step) -> Callable[[tuple[Tensor, ...]], Tensor]:
    if hasattr(step.model, "expand"):
        step.model.expand = True
    engine = Engine(step.model, batch_dim=0)

    def run(batch: tuple[Tensor, ...]) -> Tensor:
        step.model.zero_grad(set_to_none=True)
        return engine.compute_gramian(step.losses(batch))

    return run
