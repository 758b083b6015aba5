"""`nn.LSTM` in float32, one op of oneDNN's for each layer and direction, against the loop."""

import warnings

import naive
import pytest
import torch
from helpers import assert_agrees, assert_rows_agree
from torch import Tensor, nn

import pergrad

B, T, WIDTH, HIDDEN = 5, 4, 3, 6
READS = ("all", "last", "states", "cells", "everything", "apart")


def _losses(y: Tensor, h: Tensor, c: Tensor, read: str) -> Tensor:
    """y: (B, T, ·); h, c: (layers, B, ·)."""
    parts = {
        "all": y.square().sum((1, 2)),
        "last": y[:, -1].square().sum(1),
        "states": h.sin().sum((0, 2)),
        "cells": c.cos().sum((0, 2)),
    }
    if read == "everything":
        return torch.stack(list(parts.values())).sum(0)
    if read == "apart":  # some examples read one output, the rest another
        return torch.cat([parts["all"][:2], parts["cells"][2:]])
    return parts[read]


def _model(read: str, dtype: torch.dtype = torch.float32, *, state: bool = True, **how: object):
    """Losses, and all parameters: an LSTM's behind a linear layer, and its first state's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, read)))
        below = nn.Linear(WIDTH, WIDTH).to(dtype)
        layers = nn.LSTM(WIDTH, HIDDEN, **how).to(dtype)  # type: ignore[arg-type]
        many = layers.num_layers * (2 if layers.bidirectional else 1)
        first = nn.Parameter(torch.randn(2, many, 1, HIDDEN, dtype=dtype))
        x = torch.randn(B, T, WIDTH, dtype=dtype)
        x = below(x if layers.batch_first else x.transpose(0, 1).contiguous())
        given = tuple(first.expand(2, many, B, HIDDEN).contiguous().unbind(0)) if state else None
        y, (h, c) = layers(x, given)
    y = y if layers.batch_first else y.transpose(0, 1)
    params = dict(layers.named_parameters(prefix="layers"))
    params |= dict(below.named_parameters(prefix="below"))
    params |= {"first": first} if state else {}
    return _losses(y, h, c, read), params


FORMS: tuple[dict, ...] = (
    {},
    {"batch_first": True},
    {"bias": False, "batch_first": True},
    {"bidirectional": True},
    {"num_layers": 2, "dropout": 0.4},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("how", FORMS, ids=str)
def test_every_form_of_layer(how: dict, read: str, dtype: torch.dtype) -> None:
    """No one-by-one calls of the op: a warning would fail the test."""
    losses, params = _model(read, dtype, state=read != "last", **how)
    G = naive.loop_grads(losses, params)
    norms = naive.norms(G)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pergrad.FallbackWarning)
        J = pergrad.gradients(losses, params, retain_graph=True)
        got = pergrad.norms(losses, params)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    assert_agrees(got, norms, norms, tolerance)
    assert_rows_agree(J.dense(), G, norms=norms, tolerance=tolerance)


def test_layers_that_share_their_weights() -> None:
    """One layer over two sequences: cross terms between the uses."""
    torch.manual_seed(0)
    layers = nn.LSTM(WIDTH, HIDDEN, batch_first=True)
    one, two = torch.randn(B, T, WIDTH), torch.randn(B, T + 3, WIDTH)
    _, state = layers(one)
    losses = layers(two, state)[0].square().sum((1, 2))
    norms = naive.norms(naive.loop_grads(losses, layers))
    assert_agrees(pergrad.norms(losses, layers), norms, norms, 1e-5)


def test_several_sequences_of_each_example() -> None:
    """An example owns several rows of the layer's batch, here as many as it has; one has none."""
    torch.manual_seed(0)
    layers = nn.LSTM(WIDTH, HIDDEN)
    counts = [3, 1, 0, 2]
    y = layers(torch.randn(T, sum(counts), WIDTH))[0].square().sum((0, 2))
    losses = torch.stack([part.sum() for part in y.split(counts)])
    norms = naive.norms(naive.loop_grads(losses, layers))
    with warnings.catch_warnings():
        warnings.simplefilter("error", pergrad.FallbackWarning)
        assert_agrees(pergrad.norms(losses, layers), norms, norms, 1e-5)


def test_a_penalty_on_the_norms_can_be_differentiated() -> None:
    losses, params = _model("everything", num_layers=2)
    penalty = pergrad.norms(losses, params, create_graph=True).square().sum()
    got = torch.autograd.grad(penalty, list(params.values()), retain_graph=True)
    want_losses, want_params = losses, list(params.values())
    rows = [torch.autograd.grad(loss, want_params, create_graph=True) for loss in want_losses]
    want = torch.autograd.grad(
        torch.stack([sum(g.square().sum() for g in row) for row in rows]).sum(), want_params
    )
    for mine, theirs in zip(got, want, strict=True):
        assert_agrees(mine, theirs, float(theirs.norm()), 1e-4)


def test_a_weight_that_is_a_function_of_a_parameter() -> None:
    torch.manual_seed(0)
    layers = nn.utils.parametrizations.weight_norm(nn.LSTM(WIDTH, HIDDEN), "weight_hh_l0")
    losses = layers(torch.randn(T, B, WIDTH))[0].square().sum((0, 2))
    norms = naive.norms(naive.loop_grads(losses, layers))
    assert_agrees(pergrad.norms(losses, layers), norms, norms, 1e-5)


def test_bfloat16_is_as_near_as_its_rounding() -> None:
    torch.manual_seed(0)
    layers = nn.LSTM(WIDTH, HIDDEN, batch_first=True)
    x = torch.randn(B, T, WIDTH)
    losses = layers(x)[0].square().sum((1, 2))
    norms = naive.norms(naive.loop_grads(losses, layers))
    half = nn.LSTM(WIDTH, HIDDEN, batch_first=True)
    half.load_state_dict(layers.state_dict())
    half = half.bfloat16()
    got = pergrad.norms(half(x.bfloat16())[0].float().square().sum((1, 2)), half)
    assert_agrees(got, norms, norms, 0.05)
