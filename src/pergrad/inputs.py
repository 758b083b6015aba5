"""What users pass in, checked: losses, parameters, weights, directions.

Owns: every message about wrong input.
Does not know: the graph.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pergrad.arrays import as_tensor
from pergrad.errors import UnsupportedError, UsageError

Params = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]
Direction = Mapping[str, Tensor] | Sequence[Tensor] | Tensor


def named(params: Params) -> dict[str, Tensor]:
    """The tensors that require grad, by name; one tensor under two names counts once.

    Raises:
        UsageError: there is none, or something is not a tensor.
    """
    if isinstance(params, nn.Module):
        pairs: Iterable[tuple[str, Tensor]] = _of_module(params)
    elif isinstance(params, Mapping):
        pairs = params.items()
    elif isinstance(params, Tensor):
        pairs = [("0", params)]
    else:
        check_params(params)
        pairs = [(str(i), p) for i, p in enumerate(params)]
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, p in pairs:
        if not isinstance(p, Tensor):
            if isinstance(p, tuple) and len(p) == 2 and isinstance(p[1], Tensor):
                raise UsageError(
                    "`params` holds pairs (name, tensor). Pass dict(model.named_parameters()) or "
                    "the model itself."
                )
            groups = isinstance(p, Mapping) and "params" in p
            raise UsageError(
                f"`params` holds a {type(p).__name__} under {name!r}, not a tensor. "
                + (OF_OPTIMIZER if groups else "Pass the model, or the tensors you mean.")
            )
        if p.requires_grad and id(p) not in seen:
            if p.is_complex():
                raise UnsupportedError(
                    f"The parameter `{name}` is complex. Keep its parts in a real tensor of one "
                    "more dimension, use it through torch.view_as_complex, and pass that tensor."
                )
            seen.add(id(p))
            found[str(name)] = p
    if not found and isinstance(params, Mapping) and hasattr(params, "_metadata"):
        raise UsageError(
            "`params` is a state_dict(), whose tensors are cut from the model's graph. Pass the "
            "model itself, or dict(model.named_parameters())."
        )
    if not found:
        raise UsageError(
            "None of the parameters requires grad, so there is no gradient to measure. Call "
            "`model.requires_grad_(True)`, or pass the tensors you mean."
        )
    return found


def _of_module(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """As `named_parameters`, in a third of its time, where no class in the model has its own."""
    found: dict[str, Tensor] = {}
    stack, seen = [("", module)], set()
    while stack:
        prefix, at = stack.pop()
        if id(at) in seen:
            continue
        seen.add(id(at))
        own = type(at)
        if (
            own.named_parameters is not nn.Module.named_parameters
            or own.named_modules is not nn.Module.named_modules
            or not at.__dict__.keys().isdisjoint(("named_parameters", "named_modules"))
            or type(at._parameters) is not dict
            or type(at._modules) is not dict
        ):
            return module.named_parameters()
        for key, p in at._parameters.items():
            if p is not None:
                found[prefix + key] = p
        below = [
            (f"{prefix}{key}.", child) for key, child in at._modules.items() if child is not None
        ]
        stack += reversed(below)
    return found.items()


OF_OPTIMIZER = (
    "For the parameters that an optimizer changes, pass "
    '[p for group in optimizer.param_groups for p in group["params"]], or the model.'
)


def check_params(params: object) -> None:
    """Something that parameters can be read from.

    Raises:
        UsageError: it is an optimizer, or another thing that is not to be iterated over.
    """
    if isinstance(params, torch.optim.Optimizer):
        raise UsageError(f"`params` is an optimizer ({type(params).__name__}). {OF_OPTIMIZER}")
    if not isinstance(params, (nn.Module, Mapping, Iterable)) or isinstance(params, str):
        raise UsageError(
            f"`params` is a {type(params).__name__}. Pass a module, such as the model, a "
            "mapping from names to tensors, or an iterable of tensors."
        )


def check_losses(losses: object) -> Tensor:
    """A vector of losses that is attached to its graph.

    Raises:
        UsageError: it is a scalar, a matrix, an integer tensor, without graph, or elsewhere.
    """
    if not isinstance(losses, Tensor):
        raise UsageError(
            f"`losses` is a {type(losses).__name__}. Pass a tensor (B,), one loss per example."
            + _instead(losses)
        )
    if losses.dim() == 0:
        raise UsageError(
            "`losses` is a scalar: the examples have already been averaged or summed. Pass one "
            'loss per example: compute the loss with reduction="none", so that it has shape (B,).'
        )
    if losses.dim() > 1:
        shape = tuple(losses.shape)
        raise UsageError(
            f"`losses` has shape {shape}; pergrad takes one loss per example, shape (B,). If the "
            "examples lie along the first dimension, reduce the others: "
            "`losses.flatten(1).mean(1)` or `.sum(1)`, whichever your training uses."
        )
    if not losses.is_floating_point():
        raise UsageError(f"`losses` has dtype {losses.dtype}; a loss is a real number.")
    if losses.device.type == "meta":
        raise UsageError(
            "`losses` is on the meta device, which holds shapes but no numbers. Compute the losses "
            "on a device with memory."
        )
    if not losses.requires_grad:
        raise UsageError(
            "`losses` has no graph: it was computed under torch.no_grad() or detached, or no "
            "parameter required grad at that time. Run the forward pass with grad enabled and pass "
            "its result unchanged."
        )
    return losses


def _instead(losses: object) -> str:
    """What to write instead of some things that are not losses."""
    if isinstance(losses, nn.Module):
        return " The losses come first, then the model: pergrad.norms(losses, model)."
    if isinstance(losses, Mapping) and "loss" in losses:
        return " What a model returns in `loss` is a mean over the batch: compute the losses from "\
            'its logits, with reduction="none".'  # fmt: skip
    if isinstance(losses, Sequence) and losses and all(isinstance(x, Tensor) for x in losses):
        if all(x.dim() == 0 for x in losses):
            return " For a list of scalars: torch.stack(losses)."
        return " The losses come first, then the parameters: pergrad.norms(losses, params)."
    return ""


def row_weights(weights: object, like: Tensor) -> Tensor:
    """One real weight for each entry of `like` (B,), from such a tensor, a number, or None for 1.

    Raises:
        UsageError: neither of them.
    """
    if weights is None:
        return torch.ones_like(like)
    if isinstance(weights, (int, float)) and not isinstance(weights, bool):
        return torch.full_like(like, float(weights))
    return check_weights(weights, like, "a tensor (B,), or as many numbers, or one number")


_ANY_WEIGHTS = (
    "a tensor (B,), or as many numbers, one number, or a function from the norms (B,) to weights "
    "(B,) such as pergrad.clip(1.0)"
)


def check_weights(weights: object, losses: Tensor, forms: str = _ANY_WEIGHTS) -> Tensor:
    """One real weight per example."""
    weights = as_tensor(weights, losses.dtype, losses.device)
    if not isinstance(weights, Tensor):
        raise UsageError(f"`weights` is a {type(weights).__name__}. Pass {forms}.")
    if tuple(weights.shape) != tuple(losses.shape):
        raise UsageError(
            f"`weights` has shape {tuple(weights.shape)}, but there are {losses.shape[0]} examples:"
            f" pass one weight per example, shape ({losses.shape[0]},)."
        )
    if not weights.is_floating_point():
        raise UsageError(
            f"`weights` has dtype {weights.dtype}. Weights multiply gradients: pass floating point "
            "numbers, for instance `weights.float()`, or `weights.astype(float)` of an array."
        )
    if weights.device != losses.device:
        raise UsageError(
            f"`weights` is on device {weights.device}, the losses on {losses.device}: pass "
            f"`weights.to(losses.device)`."
        )
    return weights.detach()


def direction(
    v: Direction,
    shapes: Mapping[str, tuple[int, ...]],
    devices: Mapping[str, torch.device],
    what: str = "against",
) -> dict[str, Tensor]:
    """A direction in parameter space, by name, from any of its three forms.

    Raises:
        UsageError: a name, a shape or the number of elements differs from the parameters'.
    """
    total = sum(prod(shape) for shape in shapes.values())
    v = _without_arrays(v, devices)
    if isinstance(v, Tensor):
        if v.dim() != 1 or v.numel() != total:
            raise UsageError(
                f"The direction `{what}` has shape {tuple(v.shape)}; the parameters have {total} "
                f"elements. Pass a flat tensor ({total},), a mapping from names to tensors, or a "
                "sequence of tensors shaped as the parameters."
            )
        if v.device not in devices.values():
            raise UsageError(
                f"The direction `{what}` is on device {v.device}, the parameters are not: move it "
                f"with `.to({str(next(iter(devices.values())))!r})`."
            )
        parts = torch.split(v, [prod(shape) for shape in shapes.values()])
        found = {n: p.reshape(s) for p, (n, s) in zip(parts, shapes.items(), strict=True)}
    elif isinstance(v, Mapping):
        unknown = [n for n in v if n not in shapes]
        absent = [n for n in shapes if n not in v]
        if unknown or absent:
            raise UsageError(
                f"The direction `{what}` does not match the parameters."
                + (f" Not parameters: {names_list(unknown)}." if unknown else "")
                + (f" Missing: {names_list(absent)}." if absent else "")
                + " Pass one tensor for each parameter (zeros where it does not move)."
            )
        found = {n: v[n] for n in shapes}
    else:
        if isinstance(v, (nn.Module, str)) or not isinstance(v, Iterable):
            module = isinstance(v, nn.Module)
            raise UsageError(
                f"The direction `{what}` is a {type(v).__name__}. Pass a mapping from the "
                "parameters' names to tensors, a sequence of tensors shaped as they are, or a flat "
                f"tensor ({total},)."
                + (" For its weights: dict(model.named_parameters())." if module else "")
            )
        items = list(v)
        if len(items) != len(shapes):
            raise UsageError(
                f"The direction `{what}` has {len(items)} tensors, but there are {len(shapes)} "
                "parameters. Pass one tensor for each parameter, in the same order."
            )
        found = dict(zip(shapes, items, strict=True))
    for name, part in found.items():
        if not isinstance(part, Tensor) or tuple(part.shape) != tuple(shapes[name]):
            got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise UsageError(
                f"The direction `{what}` has shape {got} for `{name}`, whose shape is "
                f"{tuple(shapes[name])}. Pass a tensor of the parameter's shape."
            )
        if hasattr(part, "__tensor_flatten__"):
            raise UsageError(
                f"The direction `{what}` is a {type(part).__name__} for `{name}`, a shell around "
                "other tensors. Pass an ordinary tensor of the whole parameter's shape; a DTensor "
                "gives one by `.full_tensor()`."
            )
        if not part.is_floating_point():
            raise UsageError(
                f"The direction `{what}` has dtype {part.dtype} for `{name}`; pass floating point."
            )
        if part.device != devices[name] and not isinstance(v, Tensor):
            raise UsageError(
                f"The direction `{what}` is on device {part.device} for `{name}`, which is on "
                f"{devices[name]}: move it with `.to({str(devices[name])!r})`."
            )
    return found


def _without_arrays(v: Any, devices: Mapping[str, torch.device]) -> Any:
    """A direction or several, with a tensor wherever there are arrays or numbers."""
    homes = list(devices.values()) or [torch.device("cpu")]
    if isinstance(v, Mapping):
        return {n: as_tensor(part, device=devices.get(n)) for n, part in v.items()}
    if isinstance(v, (list, tuple)) and not all(isinstance(x, (int, float)) for x in v):
        each = homes if len(homes) == len(v) else homes[:1] * len(v)
        return [as_tensor(part, device=home) for part, home in zip(v, each, strict=True)]
    return as_tensor(v, torch.get_default_dtype(), homes[0])


def check_device(device: object) -> torch.device:
    """A device that this machine has.

    Raises:
        UsageError: there is no such device.
    """
    try:
        wanted = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise UsageError(
            f"`device` is {device!r}, which names no device. Pass one such as cpu, cuda, cuda:1 or "
            "mps."
        ) from None
    count = torch.get_device_module(wanted.type).device_count() if wanted.type != "meta" else 0
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        count = 0
    if (wanted.index or 0) >= count:
        there = f"{count} of that kind" if count else f"no device of the kind {wanted.type}"
        raise UsageError(
            f"`device` is {str(wanted)!r}, and torch {torch.__version__} sees {there} here. Leave "
            'it out to score where the model is, or pass "cpu".'
        )
    return wanted


def names_list(names: Sequence[str], most: int = 5) -> str:
    """The first few names, in backticks."""
    shown = ", ".join(f"`{n}`" for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def directions(
    V: object, shapes: Mapping[str, tuple[int, ...]], devices: Mapping[str, torch.device]
) -> dict[str, Tensor] | None:
    """Q directions by name, each (Q, *shape), from (P, Q) or a mapping; None if V is one direction.

    Raises:
        UsageError: a name, a shape or the number of directions differs.
    """
    V = _without_arrays(V, devices)
    if isinstance(V, Tensor):
        if V.dim() != 2:
            return None
        total = sum(prod(shape) for shape in shapes.values())
        if V.shape[0] != total:
            raise UsageError(
                f"The directions `V` have shape {tuple(V.shape)}; the parameters have {total} "
                f"elements. Pass (P, Q), a column for each direction: ({total}, {V.shape[1]})."
            )
        columns = [direction(V[:, q], shapes, devices, f"V[:, {q}]") for q in range(V.shape[1])]
        if not columns:
            return {n: V.new_zeros((0, *shape)) for n, shape in shapes.items()}
        return {n: torch.stack([column[n] for column in columns]) for n in shapes}
    if not isinstance(V, Mapping):
        return None
    counts = {
        n: len(part)
        for n, part in V.items()
        if isinstance(part, Tensor) and n in shapes and part.dim() == len(shapes[n]) + 1
    }
    if not counts:
        return None
    if len(counts) < len(V) or len({*counts.values()}) > 1:
        told = ", ".join(f"`{n}` {tuple(p.shape)}" for n, p in list(V.items())[:5])
        raise UsageError(
            f"The directions `V` do not agree on how many they are: {told}. Pass for each "
            "parameter a tensor (Q, *shape of the parameter), with the same Q."
        )
    first = {n: part.new_zeros(shapes[n]) for n, part in V.items()}
    direction(first, shapes, devices, "V")  # names, devices and dtypes
    for n, part in V.items():
        if tuple(part.shape[1:]) != tuple(shapes[n]):
            raise UsageError(
                f"The directions `V` have shape {tuple(part.shape)} for `{n}`, whose shape is "
                f"{tuple(shapes[n])}. Pass (Q, *{tuple(shapes[n])})."
            )
    return {n: V[n] for n in shapes}


def meant(wrong: Iterable[str], known: Iterable[str]) -> str:
    """A question for a message: which names of arguments may have been meant; or nothing."""
    near = [name for word in wrong for name in get_close_matches(word, list(known), 1)]
    return f" Did you mean {', '.join(f'`{name}`' for name in near)}?" if near else ""
