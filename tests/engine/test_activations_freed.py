"""Activations that nobody else holds are freed while the pass goes on, as in a plain backward."""

import gc
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import pergrad


class _Asks(torch.autograd.Function):
    """The identity, which notes in its backward whether an activation is alive."""

    alive: ClassVar[list[bool]] = []
    activation: ClassVar[weakref.ref[Tensor]]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        _Asks.alive.append(_Asks.activation() is not None)
        return g


@pytest.mark.parametrize("hooked", [False, True], ids=["no hook", "a hook elsewhere in the graph"])
@pytest.mark.parametrize("verb", ["norms", "gradients", "backward", "plain"])
def test_an_activation_is_gone_once_the_pass_has_gone_by(verb: str, hooked: bool) -> None:
    first, second = nn.Linear(3, 4), nn.Linear(4, 4)
    lower = first(torch.randn(5, 3))
    if hooked:
        lower.register_hook(lambda g: None)
    activation = second(_Asks.apply(lower))
    losses = activation.square().sum(1)  # which saves it
    _Asks.activation, _Asks.alive = weakref.ref(activation), []
    del activation, lower
    gc.collect()
    assert _Asks.activation() is not None  # the graph holds it, and Python's object with it
    params = dict(first.named_parameters())
    if verb == "plain":
        losses.sum().backward()
    else:
        getattr(pergrad, verb)(losses, params)
    assert _Asks.alive[-1] is False  # passes before the last one measure the layout of `_Asks`
