"""One model of torch's databases: pergrad's norms against one backward pass per example.

A verdict is "exact", "refused" (examples do interact), "needless" (refused though none does),
"torch" (torch itself has no gradient there, or no finite one), "wrong", or "raw" (an error that is
not pergrad's).
"""

import warnings
from dataclasses import dataclass

import naive
import torch
from tests.whole.databases.samples import Model, NoModel
from torch import Tensor

import pergrad

# Relative to the loop in the same dtype, by the dtype of the losses: sums in another order.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass
class Verdict:
    """What became of one model."""

    name: str
    way: str
    kind: str
    detail: str = ""


def judge(model: Model) -> Verdict | None:
    """Compare, whatever happens; None where there is no such model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            losses = model.forward()
            if not losses.requires_grad or not losses.numel():
                return Verdict(model.name, model.way, "torch", "no graph")
            params = {str(i): p for i, p in enumerate(model.params)}
            want = naive.norms(naive.loop_grads(losses, params))
            sums = torch.autograd.grad(losses.sum(), model.params, retain_graph=True,
                                       allow_unused=True)  # fmt: skip
        except NoModel:
            return None
        except Exception as error:
            return Verdict(model.name, model.way, "torch", f"{type(error).__name__}: {error}"[:200])
        if not bool(torch.isfinite(want).all()) or all(g is None for g in sums):
            return Verdict(model.name, model.way, "torch", "no finite gradient")
        try:
            got = pergrad.norms(model.forward(), params)
        except pergrad.MixedExamplesError as error:
            return _refused(model, params, want, error)
        except pergrad.UnsupportedError as error:
            return Verdict(model.name, model.way, "needless", str(error)[:300])
        except Exception as error:
            return Verdict(model.name, model.way, "raw", f"{type(error).__name__}: {error}"[:300])
    return _compared(model, got, want, losses.dtype)


def _compared(model: Model, got: Tensor, want: Tensor, dtype: torch.dtype) -> Verdict:
    dtypes = [dtype, *(p.dtype for p in model.params)]  # a cast loses what the narrower one lacks
    tolerance = max(TOLERANCE[d] for d in dtypes)
    got, want = got.detach().double(), want.double()
    bound = tolerance * want.clamp_min(want.max() * 1e-6) + 1e-12
    if got.shape != want.shape:
        return Verdict(model.name, model.way, "wrong", f"{tuple(got.shape)}")
    if bool(((got - want).abs() <= bound).all()):
        return Verdict(model.name, model.way, "exact")
    if bool(((got - want).abs() <= 10 * _rounding(model, want)).all()):
        return Verdict(model.name, model.way, "exact", "as far as rounding of the inputs allows")
    return Verdict(model.name, model.way, "wrong", f"{got.tolist()[:6]}, not {want.tolist()[:6]}")


def _rounding(model: Model, want: Tensor) -> Tensor:
    """(B,): how far the loop's norms move when the last bits of the parameters change."""
    before = [p.detach().clone() for p in model.params]
    moved = torch.zeros_like(want)
    try:
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.no_grad():
                for p, value in zip(model.params, before, strict=True):
                    bits = torch.randint(-1, 2, p.shape).to(p.dtype) * torch.finfo(p.dtype).eps
                    p.copy_(value * (1 + bits))
            params = {str(i): p for i, p in enumerate(model.params)}
            other = naive.norms(naive.loop_grads(model.forward(), params))
            moved = torch.maximum(moved, (other - want).abs())
    finally:
        with torch.no_grad():
            for p, value in zip(model.params, before, strict=True):
                p.copy_(value)
    return moved


def _refused(model: Model, params: dict[str, Tensor], want: Tensor, error: Exception) -> Verdict:
    """Exact on request; and needless if no number between data and op reaches two losses."""
    try:
        losses = model.forward()
        meet = any(_reaches_two(losses, a) for a in model.activations) or _may_meet(model)
        got = pergrad.norms(losses, params, on_mixing="exact")
    except Exception as other:
        return Verdict(model.name, model.way, "raw", f"{type(other).__name__}: {other}"[:300])
    verdict = _compared(model, got, want, losses.dtype)
    if verdict.kind != "exact":
        return verdict
    return Verdict(model.name, model.way, "refused" if meet else "needless", str(error)[:120])


def _may_meet(model: Model) -> bool:
    """Whether other numbers in the same graph reach two losses: units that are dead are no proof
    that a recurrent layer's hidden units, say, do not depend on each other.
    """
    before = [p.detach().clone() for p in model.params]
    try:
        for seed in range(5):
            torch.manual_seed(seed)
            with torch.no_grad():
                for p in model.params:
                    p.copy_(torch.randn_like(p))
            losses = model.forward()
            if any(_reaches_two(losses, a) for a in model.activations):
                return True
    finally:
        with torch.no_grad():
            for p, value in zip(model.params, before, strict=True):
                p.copy_(value)
    return False


def _reaches_two(losses: Tensor, activation: Tensor) -> bool:
    """Whether the gradients of two losses are not zero at one element of the activation."""
    count = torch.zeros(activation.shape)
    for loss in losses:
        (g,) = torch.autograd.grad(loss, activation, retain_graph=True, allow_unused=True)
        if g is not None:
            count += (g != 0).float()
    return bool((count > 1).any())
