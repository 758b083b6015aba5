"""Small models around the sample inputs of torch's own databases of ops and modules.

Each sample becomes several models, by how the op stands to parameters and examples:

  leaf          the op's inputs are parameters; every loss is another mixture of its output
  activations   its inputs are data times parameters; an example is an index of the first dimension
  last          the same; an example is an index of the last dimension
  rows          the same; an example is two neighbours along the first dimension
  pieces        the op is called once for each example, in a loop

A model is a function without arguments that makes the losses (B,) anew, and its parameters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

WAYS = ("leaf", "activations", "last", "rows", "pieces")
EXAMPLES = 3
LARGEST = 20_000  # numbers in an output: the loop has to stay quick


class NoModel(Exception):
    """The op cannot be used in this way with this sample."""


@dataclass
class Model:
    """One op or module in one place."""

    name: str
    way: str
    forward: Callable[[], Tensor]
    params: list[Tensor]
    activations: list[Tensor]  # what the op was handed in the latest forward pass


def names() -> list[str]:
    """Everything there are samples for."""
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    ops = [f"op:{_full_name(op)}" for op in op_db if op.supports_autograd]
    return ops + [f"module:{info.name}" for info in module_db]


def _full_name(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def models(name: str, dtype: torch.dtype, most: int) -> Iterator[Model]:
    """The models of one op or module, from at most so many samples."""
    kind, _, short = name.partition(":")
    calls = _of_op(short, dtype) if kind == "op" else _of_module(short, dtype)
    for number, (function, inputs, params) in enumerate(calls):
        if number == most:
            return
        for way in WAYS:
            model = _model(f"{name}[{number}]", way, function, inputs, params)
            if model is not None:
                yield model


Call = tuple[Callable[..., Any], Any, list[Tensor]]  # function, its inputs, parameters of its own


def _of_op(short: str, dtype: torch.dtype) -> Iterator[Call]:
    from torch.testing._internal.common_methods_invocations import op_db

    op = next(op for op in op_db if _full_name(op) == short)
    if dtype not in op.supported_backward_dtypes("cpu"):
        return
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        yield op.op, ((sample.input, *sample.args), sample.kwargs), []


def _of_module(short: str, dtype: torch.dtype) -> Iterator[Call]:
    from torch.testing._internal.common_modules import module_db

    info = next(i for i in module_db if i.name == short)
    for training in (False, True):
        for sample in info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=True, training=training
        ):
            made, call = sample.constructor_input, sample.forward_input
            if call is None:
                continue
            module = info.module_cls(*made.args, **made.kwargs).to(dtype).train(training)
            yield module, (call.args, call.kwargs), list(module.parameters())


def _model(
    name: str, way: str, function: Callable[..., Any], inputs: Any, more: list[Tensor]
) -> Model | None:
    leaves, spec = tree_flatten(inputs)
    at = [i for i, leaf in enumerate(leaves) if _differentiable(leaf)]
    if not at and not more:
        return None
    data = {i: leaves[i].detach().clone() for i in at}
    params = [
        nn.Parameter(torch.ones_like(d) if way != "leaf" else d.clone()) for d in data.values()
    ]
    fixed = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, leaves)

    def call(changed: dict[int, Tensor]) -> Tensor:
        given = [changed.get(i, leaf) for i, leaf in enumerate(fixed)]
        args, kwargs = tree_unflatten(given, spec)
        torch.manual_seed(5)  # ops that draw random numbers draw the same ones each time
        return _real(function(*args, **kwargs))

    handed: list[Tensor] = []

    def activations() -> dict[int, Tensor]:
        found = {i: data[i] * p for i, p in zip(at, params, strict=True)}
        handed[:] = found.values()
        return found

    def forward() -> Tensor:
        if way == "leaf":
            out = call({i: p * 1 for i, p in zip(at, params, strict=True)}).reshape(-1)
            shares = torch.linspace(-1, 1, EXAMPLES * out.numel(), dtype=out.dtype).cos()
            return (shares.view(EXAMPLES, -1) * out).sum(1)
        if way == "pieces":
            outs = [
                call({i: (1 + 0.1 * b) * a for i, a in activations().items()}).square().sum()
                for b in range(EXAMPLES)
            ]
            return torch.stack(outs)
        out = call(activations())
        if out.dim() == 0 or out.numel() > LARGEST:
            raise NoModel
        out = out.movedim(-1, 0) if way == "last" else out
        if way == "rows":
            if out.shape[0] % 2:
                raise NoModel
            out = out.reshape(out.shape[0] // 2, -1)
        rows = out.reshape(out.shape[0], -1)
        if not 2 <= len(rows) <= 64:
            raise NoModel
        return (rows * torch.linspace(-1, 2, rows.shape[1], dtype=rows.dtype)).sum(
            1
        ).sin() + rows.square().sum(1)

    return Model(name, way, forward, [*params, *more], handed)


def _differentiable(leaf: object) -> bool:
    return (
        isinstance(leaf, Tensor)
        and leaf.requires_grad
        and leaf.is_floating_point()
        and leaf.layout is torch.strided
    )


def _real(out: Any) -> Tensor:
    """The differentiable outputs, as one tensor if they have a first dimension in common."""
    tensors = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor) and t.requires_grad]
    tensors = [t.to_dense() if t.layout is not torch.strided else t for t in tensors]
    tensors = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
    if not tensors:
        raise NoModel
    first = tensors[0]
    same = [
        t for t in tensors if t.dim() and first.dim() and t.shape[0] == first.shape[0] and t.numel()
    ]
    if len(same) > 1:
        return torch.cat([t.reshape(t.shape[0], -1) for t in same], 1)
    return first
