"""The model and the random states during a scan, and as they were after it.

Owns: mode, device and buffers of the model, and the state of every random generator.
Does not know: what is done meanwhile.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pergrad.errors import UsageError
from pergrad.scans.options import Mode
from pergrad.scans.tensors import same


def check_made(model: nn.Module) -> None:
    """Every parameter and buffer has a shape.

    Raises:
        UsageError: one waits for a first batch to tell it.
    """
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if is_lazy(tensor):
                raise UsageError(
                    f"The {kind} `{name}` has no shape yet: it belongs to a lazy module, which "
                    "takes it from its first batch. Call the model on one batch before you score."
                )


@contextmanager
def prepared(model: nn.Module, mode: Mode, device: str | None = None) -> Iterator[None]:
    """The model in a mode and on a device, autograd on; all of it and all random states as before
    afterwards, also after an exception.
    """
    check_made(model)
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.init()  # so that its random state is there to be kept
    modules = [(module, module.training) for module in model.modules()]
    # batch norm in training mode changes its buffers, and moving a model replaces them
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    homes = {p.device for p in [*model.parameters(), *model.buffers()]}
    # the last is undone first, and each also where another one cannot be
    with ExitStack() as undo:
        undo.callback(_set_random_states, _random_states())
        undo.callback(_put_back, buffers)
        if device is not None and len(homes) == 1:
            undo.callback(model.to, next(iter(homes)))
        undo.callback(_set_modes, modules)
        if device is not None:
            model.to(device)
        if mode != "as is":
            model.train(mode == "train")
        with torch.inference_mode(False), torch.enable_grad():
            yield


def _set_modes(modules: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modules:
        module.training = training


def _put_back(buffers: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    """Each buffer itself, holding what it held."""
    for module, name, buffer, value in buffers:
        if getattr(module, name) is not buffer:
            setattr(module, name, buffer)
        try:
            changed = not same(buffer, value)
        except Exception:  # of a kind that nothing can be asked of: what it held is written again
            changed = True
        if changed:
            with torch.no_grad():
                buffer.copy_(value)


def _random_states() -> dict[str, Any]:
    states = {"torch": torch.get_rng_state(), "random": random.getstate()}
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    states["numpy"] = np.random.get_state()
    return states


def _set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["random"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
    if "mps" in states:
        torch.mps.set_rng_state(states["mps"])
    np.random.set_state(states["numpy"])
