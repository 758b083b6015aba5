"""dattri: `TracInAttributor`, one checkpoint of weight 1, exact: its projection switched off."""

from collections.abc import Callable
from functools import partial

import torch
import tqdm
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

tqdm.tqdm = partial(tqdm.tqdm, disable=True)  # its progress bar would be timed too

from dattri.algorithm.tracin import TracInAttributor  # noqa: E402
from dattri.task import AttributionTask  # noqa: E402

from workloads import Step  # noqa: E402

Batch = tuple[Tensor, ...]


def _products(step: Step) -> Callable[[Batch, Batch], Tensor]:
    def loss(params: dict[str, Tensor], example: Batch) -> Tensor:
        def call(*inputs: Tensor) -> Tensor:
            return functional_call(step.model, params, inputs)

        return step.loss(call, *(t[None] for t in example))[0]

    task = AttributionTask(loss_func=loss, model=step.model, checkpoints=step.model.state_dict())
    attributor = TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=False)
    attributor.projector_kwargs = None

    def run(left: Batch, right: Batch) -> Tensor:
        loaders = [DataLoader(TensorDataset(*side), batch_size=len(side[0]))
                   for side in (left, right)]  # fmt: skip
        with sdpa_kernel(SDPBackend.MATH):
            return attributor.attribute(*loaders)

    return run


def gram(step: Step) -> Callable[[Batch], Tensor]:
    products = _products(step)
    return lambda batch: products(batch, batch)


def cross(step: Step) -> Callable[[Batch], Tensor]:
    products = _products(step)
    return lambda batch: products(batch, step.reference)
