"""An architecture under torch.compile.

Owns: compiling it, counting the regions that came of it, and why parameters go to the fallback.
Does not know: the loop, how results are compared.
"""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

import pergrad
from pergrad.graph import nodes

from .registry import Problem


class NotCompiled(Exception):
    """What torch itself says when it cannot compile the model, or run what it compiled."""


def compiled(problem: Problem, backend: str) -> tuple[Problem, int]:
    """The same problem with its model compiled, and the number of regions in its graph.

    Where calling the model compiles nothing, since the losses are made from its parts, they are
    compiled with it.
    """
    torch.compiler.reset()
    problem.losses(0)  # what is wrong without compilation is not torch.compile's
    model = problem.params
    try:
        if isinstance(model, nn.Module):
            model.compile(backend=backend)
            if count := len(regions(problem.losses(0))):
                return problem, count
            model._compiled_call_impl = None
        losses = torch.compile(problem.losses, backend=backend)
        if count := len(regions(losses(0))):
            return Problem(problem.params, losses), count
    except Exception as error:
        raise NotCompiled(_in_a_line(error)) from error
    raise NotCompiled("torch compiles nothing of it that has parameters")


def torchs_own_error(losses: Tensor, params: Mapping[str, Tensor]) -> str:
    """What torch says when it cannot run a plain backward pass of the compiled losses."""
    try:
        torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True)
    except Exception as error:
        return _in_a_line(error)
    return ""


def _in_a_line(error: Exception) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0]}"


def regions(losses: Tensor) -> list[Any]:
    """The nodes of compiled regions in the graph below the losses."""
    waiting, seen, found = [losses.grad_fn], {None}, []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        found += [node] if nodes.is_compiled(node) else []
        waiting += [below for below, _ in node.next_functions]
    return found


def kept(losses: Tensor) -> AbstractContextManager[None]:
    """Within this block regions may run again and again, also if they were compiled to run once."""
    return nodes.compiled_regions_kept(regions(losses))


def reasons(coverage: pergrad.Coverage) -> list[str]:
    """What `explain` says of the parameters in compiled regions that are left to the fallback."""
    found = {
        match[1]
        for row in coverage.rows
        if row.how == "fallback" and (match := re.match(r"CompiledFunction\S* \((.*)\)$", row.op))
    }
    return sorted(found)
