"""The floor under pergrad: the forward pass, and the half of the backward that gives cotangents.

Nobody who reads gradients off torch's graph can be faster. It is what pergrad does, without the
products that make norms of the cotangents.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pergrad
from pergrad.engine.pass_ import Pass
from workloads import Step


def _nothing(*_: object) -> None:
    """Not a mock: that would keep what it is called with."""


def norms(step: Step) -> Callable[..., None]:
    def run(batch: tuple[Any, ...]) -> None:
        # every hook is there and is called with its cotangents; none is served
        with (
            mock.patch.object(Pass, "serve", _nothing),
            mock.patch.object(Pass, "check_complete", _nothing),
        ):
            pergrad.norms(step.losses(batch), step.model)

    return run
