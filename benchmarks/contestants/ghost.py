"""Opacus: ghost clipping for linear layers and embeddings, one layer's gradients for the rest.

Where a model looks its positions up once for the whole batch, Opacus sees a batch of one and
stops, so the models here offer to look them up for each example (`expand`); pergrad and all others
run the model as it is.
"""

import warnings
from collections.abc import Callable
from typing import Any

from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import Tensor, nn

from workloads import Step

Batch = tuple[Tensor, ...]

warnings.filterwarnings("ignore", message="Full backward hook is firing")


def _wrapped(step: Step) -> nn.Module:
    if hasattr(step.model, "expand"):
        step.model.expand = True
    return GradSampleModuleFastGradientClipping(
        step.model, loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True
    )


def norms(step: Step) -> Callable[[Batch], Tensor]:
    model = _wrapped(step)

    def run(batch: Batch) -> Tensor:
        model.zero_grad(set_to_none=True)
        step.loss(model, *batch).mean().backward()
        return model.get_norm_sample()

    return run


lengths = norms


def clip(step: Step) -> Callable[[Batch], tuple[Tensor, dict[str, Any]]]:
    model = _wrapped(step)
    params = step.params()

    def run(batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        model.zero_grad(set_to_none=True)
        losses = step.loss(model, *batch)
        losses.mean().backward(retain_graph=True)
        found, weights = model.get_norm_sample(), model.get_clipping_coef()
        model.zero_grad(set_to_none=True)
        model.disable_hooks()
        (weights * losses).sum().backward()
        model.enable_hooks()
        return found, {name: p.grad for name, p in params.items()}

    return run
