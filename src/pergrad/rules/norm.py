"""Normalisation layers: scale and shift of layer, RMS, group and batch norm.

Owns: the factor of the scale (the sum of g times the normalised input) and of the shift (of g).
Does not know: how the gradient gets to the layer's input.
"""

import torch
from torch import Tensor

from pergrad.factors import Dense
from pergrad.factors.numeric import result_dtype
from pergrad.rules.positions import reduced, regular
from pergrad.rules.registry import Served, Situation, rule


def _wide(x: Tensor) -> Tensor:
    return x.to(result_dtype(x))


def _scale_and_shift(use: Situation, normalised: Tensor | None, shape: tuple[int, ...],
                     slots: tuple[int, int]) -> Served:  # fmt: skip
    """`shape` aligns the parameter with the input's dimensions."""
    g, layout = _wide(use.g), use.layout
    served: Served = {}
    for slot, values in ((slots[0], normalised), (slots[1], 1.0)):
        if slot in use.operands:
            assert values is not None
            factor = reduced(g * values if slot == slots[0] else g, layout, shape, use.batch)
            served[slot] = Dense(factor.values.reshape(use.batch, *use.operands[slot].shape))
    return served


@rule("native_layer_norm")
def layer_norm(use: Situation) -> Served:
    """y = weight * (x - mean) * rstd + bias over the last dimensions."""
    shape = tuple(use.attr("normalized_shape"))
    normalised = None
    if 1 in use.operands:
        x = _wide(use.saved("input"))
        mean, rstd = use.saved("result1"), use.saved("result2")
        dims = list(range(x.dim() - len(shape), x.dim()))
        if use.tracing():
            mean, rstd = _live_statistics(x, dims, rstd)
        else:
            fused = _by_example(use, x, mean, rstd, shape)
            if fused is not None:
                return fused
        normalised = (x - mean) * rstd
    return _scale_and_shift(use, normalised, shape, (1, 2))


# torch's own kernel for one example makes no temporaries; below this many numbers for an example
# the calls cost more than that saves.
_WORTH_A_CALL = 4096


def _by_example(
    use: Situation, x: Tensor, mean: Tensor, rstd: Tensor, shape: tuple[int, ...]
) -> Served | None:
    """Scale and shift by the layer's own backward, one example at a time; None where slower."""
    g, layout = use.g, use.layout
    in_order = layout.shape[0] == use.batch and regular(layout, use.batch) == (1, 1)
    if g.device.type != "cpu" or g.dtype != x.dtype or not in_order:
        return None
    if layout.varying != (0,) or x[0].numel() < _WORTH_A_CALL:
        return None
    weight, bias = x.new_empty(shape), x.new_empty(shape)
    wanted = (False, 1 in use.operands, 2 in use.operands)
    rows = [
        torch.ops.aten.native_layer_norm_backward(
            g[b], x[b], shape, mean[b], rstd[b], weight, bias, wanted
        )
        for b in range(use.batch)
    ]
    return {slot: Dense(torch.stack([row[slot] for row in rows])) for slot in use.operands}


def _live_statistics(x: Tensor, dims: list[int], rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1/std as functions of x: torch saves them as constants."""
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square().mean(dims, keepdim=True)
    epsilon = (rstd.detach().to(x.dtype) ** -2 - variance).detach()
    return mean, (variance + epsilon).rsqrt()


@rule("fused_rms_norm")
def rms_norm(use: Situation) -> Served:
    """y = weight * x * rrms over the last dimensions."""
    shape = tuple(use.attr("normalized_shape"))
    x = _wide(use.saved("input"))
    rrms = use.saved("result1")
    if use.tracing():
        dims = list(range(x.dim() - len(shape), x.dim()))
        square = x.square().mean(dims, keepdim=True)
        rrms = (square + (rrms.detach().to(x.dtype) ** -2 - square).detach()).rsqrt()
    return _scale_and_shift(use, x * rrms, shape, (1, -1))


def _per_channel(x: Tensor) -> tuple[int, ...]:
    return (x.shape[1], *[1] * (x.dim() - 2))


@rule("native_group_norm")
def group_norm(use: Situation) -> Served:
    """Statistics per example and group of channels; scale and shift per channel."""
    g = use.g
    normalised = None
    if 1 in use.operands:
        x = _wide(use.saved("input"))
        groups = use.attr("group")
        folded = x.reshape(x.shape[0], groups, -1)
        mean, rstd = use.saved("result1")[..., None], use.saved("result2")[..., None]
        if use.tracing():
            mean, rstd = _live_statistics(folded, [2], rstd)
        normalised = ((folded - mean) * rstd).reshape(x.shape)
    return _scale_and_shift(use, normalised, _per_channel(g), (1, 2))


@rule("native_batch_norm", "cudnn_batch_norm", "native_batch_norm_legit_no_training",
      "native_batch_norm_legit", "miopen_batch_norm", "batch_norm_with_update",
      "batch_norm_no_update")  # fmt: skip
def batch_norm(use: Situation) -> Served:
    """Running statistics in eval mode, the batch's in training mode: constants at this node."""
    g = use.g
    normalised = None
    if 1 in use.operands:
        x = _wide(use.saved("input"))
        shape = _per_channel(g)
        training = use.attr("training")
        if training is None:
            training = use.name == "batch_norm_with_update"
        eps = use.attr("eps") if use.attr("eps") is not None else use.attr("epsilon")
        if training:
            mean, rstd = use.saved("result1"), use.saved("result2")
            if use.tracing():
                dims = [d for d in range(x.dim()) if d != 1]
                live_mean, live = _live_statistics(x, dims, rstd.reshape(shape))
                normalised = (x - live_mean) * live
        else:
            mean = use.saved("running_mean")
            rstd = (_wide(use.saved("running_var")) + eps).rsqrt()
        if normalised is None:
            normalised = (x - _wide(mean).reshape(shape)) * _wide(rstd).reshape(shape)
    return _scale_and_shift(use, normalised, _per_channel(g), (1, 2))
