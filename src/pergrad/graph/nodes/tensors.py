"""What torch knows of a tensor beside its numbers.

Owns: a tensor's hooks and version, and whether it wraps or stands for other tensors.
Does not know: nodes.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pergrad.graph.nodes.unpacking import PLAIN


@contextmanager
def hooks_aside(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, list[Callable[..., Any]]]]:
    """The tensor hooks of leaves, by name; they do not fire inside this block."""
    taken = {name: t._backward_hooks for name, t in tensors.items() if t._backward_hooks}
    before = {name: list(hooks.items()) for name, hooks in taken.items()}
    for name, hooks in taken.items():
        if tensors[name].is_leaf:
            hooks.clear()
    try:
        yield {
            name: [hook for _, hook in items]
            for name, items in before.items()
            if tensors[name].is_leaf
        }
    finally:
        for name, hooks in taken.items():
            if tensors[name].is_leaf:
                hooks.update(before[name])


def wraps_tensors(tensor: Tensor) -> bool:
    """Whether a tensor is a shell around others (DTensor, quantised, nested)."""
    return type(tensor) not in PLAIN and is_traceable_wrapper_subclass(tensor)


# Inside, attributes of tensors are torch's own, whatever a subclass overrides.
no_overrides = torch._C.DisableTorchFunctionSubclass


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor stands for others within vmap, grad or another transform of torch.func."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_flattened(tensor: Tensor | None) -> bool:
    """Whether a leaf is many parameters in one, as FullyShardedDataParallel makes it."""
    module = sys.modules.get("torch.distributed.fsdp._flat_param")
    return module is not None and isinstance(tensor, module.FlatParameter)


def version(tensor: Tensor) -> int:
    """How often a tensor's memory has been written in place; shared by its views."""
    return -1 if tensor.is_inference() else tensor._version


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """`version` of each; of thousands in a pass, for which a call each takes too long."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # one was made in inference mode, where nothing is counted
        return [version(tensor) for tensor in tensors]
