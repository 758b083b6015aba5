"""Hooks that torch keeps on nodes and tensors.

Owns: registering ours, reading those of others, and how many there have been.
Does not know: where in a graph a hook is, what it does.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from pergrad.graph.nodes.reading import Node

Hook = Callable[..., Any]
Functions = OrderedDict[int, Hook]  # by the number under which it was registered

_OURS = [0]  # how many hooks pergrad itself has registered


def before(node: Node, function: Hook) -> RemovableHandle:
    """Call `function` with the node's cotangents before the node runs in a backward pass."""
    handle: RemovableHandle = node.register_prehook(function)
    _OURS[0] += 1
    return handle


def hooks_registered() -> int:
    """A number that grows with every hook that anybody but pergrad registers, on anything."""
    return RemovableHandle.next_id - _OURS[0]


def tensor_hooks(tensor: Tensor) -> Functions | None:
    """The hooks on a tensor, if any, as torch keeps them; its graph keeps them, too."""
    hooks: Any = tensor._backward_hooks
    return hooks or None


def hooks_after_accumulation(tensor: Tensor) -> list[Hook]:
    """What `.backward()` calls with a leaf whenever it has added to the leaf's `.grad`."""
    hooks: Any = tensor._post_accumulate_grad_hooks
    return list(hooks.values()) if hooks else []


def hooks_of_node(node: Node) -> list[tuple[bool, Functions]]:
    """What is registered on a node itself: (whether it is called before the node runs, hooks).

    torch keeps them in dictionaries to which only the handle of a further hook leads.
    """
    found = []
    for first, register in ((True, node.register_prehook), (False, node.register_hook)):
        handle = register(_nothing)
        _OURS[0] += 1
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if hooks:
            found.append((first, hooks))
    return found


def _nothing(*_: Any) -> None:
    return None


def call_tensor_hooks(edges: Sequence[GradientEdge], gradients: Sequence[Tensor]) -> None:
    """Call the hooks of the tensors that a node has made, and nothing else."""
    with torch.enable_grad():
        torch.autograd.grad(edges, edges, gradients, retain_graph=True, allow_unused=True)
