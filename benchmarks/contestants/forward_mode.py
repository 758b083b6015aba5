"""Forward mode: the derivative of every loss along one direction is its gradient times that."""

from collections.abc import Callable

from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from workloads import Step


def direction(step: Step) -> Callable[[tuple[Tensor, ...]], Tensor]:
    v = step.direction()

    def run(batch: tuple[Tensor, ...]) -> Tensor:
        def losses(params: dict[str, Tensor]) -> Tensor:
            def call(*inputs: Tensor) -> Tensor:
                return functional_call(step.model, params, inputs)

            return step.loss(call, *batch)

        params = {name: p.detach() for name, p in step.params().items()}
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no forward mode
            return jvp(losses, (params,), (v,))[1]

    return run
