"""Training with differential privacy: batches drawn at random, gradients clipped, noise added.

Owns: `Private`: which examples a step is made of, the bound on each one's part, the noise, what may
not happen between the passes of a step.
Does not know: how norms and clipped sums come about (`api`), how epsilon is computed (Opacus).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf, isfinite
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pergrad import api
from pergrad.errors import UnsupportedError, UsageError
from pergrad.extras import need

_GUARDS: "WeakKeyDictionary[torch.optim.Optimizer, Any]" = WeakKeyDictionary()


class Private:
    """Train with differential privacy (DP-SGD), on any model whose examples do not mix.

        private = pergrad.Private(model, optimizer, clip=1.0, noise=1.1, data=train, rate=0.01)
        for batch in private:                               # one epoch: 1 / rate steps
            private.backward(losses(model, batch))          # (B,), one loss for each example
        private.epsilon(1e-5)

    Each step takes every example with probability `rate` (Poisson sampling) and trains on

        (sum over b of min(1, clip / |g[b]|) g[b]  +  noise * clip * N(0, I)) / (rate * len(data))

    A step of many examples comes in several batches of at most `most`; the optimizer steps when the
    last of them has gone backward. `Private` zeroes gradients and calls the optimizer itself. A
    step without any example is taken too, of noise alone, and is not seen in the loop.

    What is claimed: the (epsilon, delta) of Opacus's accountant for these steps, where examples are
    added or removed. It rests on what pergrad cannot see: that each loss depends on its own example
    alone (no mean over the batch's tokens, no weight by what else is in the batch), that the data
    enter nowhere else, and that the noise of `torch.normal` is good enough: its generator is not a
    cryptographic one, and what floating point leaks is not guarded against.

    Args:
        model: what is trained.
        optimizer: of all of the model's trainable parameters and of no others.
        clip: the largest norm of one example's gradient.
        noise: standard deviation of the noise, in units of `clip`.
        data: a data set with len() and indices.
        rate: the probability by which an example is in a step.
        most: examples of one batch; memory alone depends on it.
        accountant: "prv" (tight) or "rdp".
        collate: a list of examples -> batch; by default that of torch's DataLoader.
        generator: of batches and noise, on the CPU. With a seed a run can be repeated, and whoever
            knows the seed knows the noise.

    Attributes:
        steps: how many have been taken. Set it, to go on with a run that was stopped.

    Raises:
        UsageError: an argument makes no sense, or the optimizer has other parameters.
        UnsupportedError: several ranks.

    Cost: a step as `pergrad.backward` with `clip`, and one random number for each parameter.
    Source: Abadi et al. 2016, arXiv:1607.00133.

        >>> import torch, pergrad
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> private = pergrad.Private(model, optimizer, data=torch.randn(40, 2), rate=0.25)
        >>> for x in private:
        ...     _ = private.backward(model(x).square().squeeze(1))
        >>> private.steps
        4
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: float = 1.0,
        noise: float = 1.1,
        data: Any = None,
        rate: float = 0.01,
        most: int = 32,
        *,
        accountant: str = "prv",
        collate: Callable[[Sequence[Any]], Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_arguments(clip, noise, data, rate, most, accountant)
        distributed = torch.distributed
        running = distributed.is_available() and distributed.is_initialized()
        if running and distributed.get_world_size() > 1:
            raise UnsupportedError(
                "Private trains on one rank, and this is a distributed run. Train on one device "
                "with a small `most`: it bounds the memory, not the step."
            )
        self.model, self.optimizer = model, optimizer
        self.clip, self.noise, self.rate, self.most = float(clip), float(noise), rate, most
        self.data, self.accountant = data, accountant
        self.expected = rate * len(data)  # examples of a step, fixed: the true number is private
        self.steps = 0
        self._collate = torch.utils.data.default_collate if collate is None else collate
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        self._generator = generator
        self._params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        _check_optimizer(self._params, optimizer)
        self._sums: dict[str, Tensor] = {}
        self._waiting: int | None = None  # examples of the batch that has to go backward
        self._last = False
        self._ours = False
        if (before := _GUARDS.pop(optimizer, None)) is not None:
            before.remove()  # of an earlier Private, which steps no more
        _GUARDS[optimizer] = optimizer.register_step_pre_hook(self._guard)

    def __len__(self) -> int:
        """Steps of an epoch."""
        return max(1, round(1 / self.rate))

    def __iter__(self) -> Iterator[Any]:
        """The batches of one epoch."""
        for _ in range(len(self)):
            drawn = torch.rand(len(self.data), generator=self._generator) < self.rate
            rows = drawn.nonzero().flatten().tolist()
            self._sums, self._waiting = {}, None  # of a step that was left before its end
            if not rows:
                self._check_gradients()
                self._step()
            for start in range(0, len(rows), self.most):
                chosen = rows[start : start + self.most]
                batch = self._collate([self.data[i] for i in chosen])
                self._waiting, self._last = len(chosen), start + self.most >= len(rows)
                yield batch
                if self._waiting is not None:
                    raise UsageError(
                        "A batch has not gone backward. Call `private.backward(losses)` once for "
                        "every batch; one that is left out would change what the noise covers."
                    )

    def backward(self, losses: Tensor) -> Tensor:
        """Clip and add up the batch's gradients; after a step's last batch, the optimizer steps.

        Args:
            losses: (B,), one for each example of the batch at hand, in any order.

        Returns:
            (B,), the norms before clipping. They are not private.

        Raises:
            UsageError: another number of losses than of examples, a second pass for a batch,
                gradients of another pass, parameters that were frozen or thawed meanwhile, or a
                gradient that is not finite.
            MixedExamplesError, UnsupportedError: as in `norms`.
        """
        if self._waiting is None:
            raise UsageError(
                "There is no batch to go backward: each one has one pass, and none before the "
                "loop. Call `private.backward(losses)` once in `for batch in private:`."
            )
        if not isinstance(losses, Tensor) or losses.shape != (self._waiting,):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise UsageError(
                f"`losses` is {shape}, and the batch has {self._waiting} examples. Pass one loss "
                'for each, such as F.cross_entropy(..., reduction="none").'
            )
        self._check_gradients()
        norms = api.backward(losses, self._params, weights=self._weights)
        for name, p in self._params.items():
            grad, p.grad = p.grad, None
            if grad is not None:
                self._sums[name] = self._sums[name] + grad if name in self._sums else grad
        self._waiting = None
        if self._last:
            self._step()
        return norms

    def _weights(self, norms: Tensor) -> Tensor:
        if not bool(norms.isfinite().all()):
            bad = int((~norms.isfinite()).nonzero()[0])
            raise UsageError(
                f"The gradient of example {bad} of this batch is not finite, so its part cannot be "
                "bounded. Nothing was trained on the step. Look at that example, or make its loss "
                "finite (smaller inputs, a clamp, float32)."
            )
        # rounded down: the bound has to hold, not only nearly
        weights = (self.clip / norms).clamp(max=1.0) * (1 - 4 * torch.finfo(norms.dtype).eps)
        return torch.where(norms <= self.clip, torch.ones_like(norms), weights)

    def _step(self) -> None:
        """Noise, the optimizer's step, and nothing left of it."""
        std = self.noise * self.clip
        for name, p in self._params.items():
            drawn = torch.normal(0.0, std, p.shape, generator=self._generator, dtype=p.dtype)
            total = drawn.to(p.device) if std else torch.zeros_like(p)
            if name in self._sums:
                total = self._sums[name] + total
            p.grad = total / self.expected
        self._sums = {}
        self._ours = True
        try:
            self.optimizer.step()
        finally:
            self._ours = False
            for p in self._params.values():
                p.grad = None
        self.steps += 1

    def _guard(self, *_: Any) -> None:
        if not self._ours:
            raise UsageError(
                "The optimizer of a Private was told to step, without clipping and noise. Leave "
                "`optimizer.step()` out: `private.backward` does it (and no GradScaler)."
            )

    def _check_gradients(self) -> None:
        now = {n for n, p in self.model.named_parameters() if p.requires_grad}
        if now != self._params.keys():
            name = min(now ^ self._params.keys())
            raise UsageError(
                f"The parameter `{name}` was frozen or thawed since the Private was made. Freeze "
                "before, and make a new Private afterwards (its `steps` go on from the old one's)."
            )
        for name, p in self._params.items():
            if p.grad is not None:
                raise UsageError(
                    f"`{name}` has a .grad that no Private made: it is neither clipped nor "
                    "covered by noise. Leave other backward passes out, or set .grad to None."
                )

    def epsilon(self, delta: float) -> float:
        """The epsilon of the steps so far, for a delta, by Opacus's accountant.

        Raises:
            UsageError: delta is no number between 0 and 1.
            MissingExtraError: `pip install 'pergrad[private]'` brings Opacus.
        """
        if not isinstance(delta, float) or not 0 < delta < 1:
            raise UsageError(f"`delta` is {delta!r}; pass a number between 0 and 1, as 1e-5.")
        if not self.steps:
            return 0.0
        if not self.noise:
            return inf
        need("private", "opacus")
        from opacus.accountants import create_accountant

        accountant = create_accountant(self.accountant)
        accountant.history = [(self.noise, self.rate, self.steps)]
        return float(accountant.get_epsilon(delta=delta))


def _check_arguments(
    clip: Any, noise: Any, data: Any, rate: Any, most: Any, accountant: Any
) -> None:
    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)

    if not number(clip) or clip <= 0:
        raise UsageError(
            f"`clip` is {clip!r}; pass a positive number. A threshold that follows the norms looks "
            "at the data and gives no privacy."
        )
    if not number(noise) or noise < 0:
        raise UsageError(f"`noise` is {noise!r}; pass a number of at least 0, as 1.1.")
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or not len(data):
        raise UsageError(
            "`data` has no length and indices, or is empty. Pass the data set itself, not a "
            "DataLoader: batches are drawn here."
        )
    if not number(rate) or not 0 < rate <= 1:
        raise UsageError(f"`rate` is {rate!r}; pass a probability, such as 64 / len(data).")
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise UsageError(f"`most` is {most!r}; pass a whole number of at least 1.")
    if accountant not in ("prv", "rdp"):
        raise UsageError(f'`accountant` is {accountant!r}; pass "prv" or "rdp".')


def _check_optimizer(params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in params.items() if id(p) not in held]
    if missing or not params:
        raise UsageError(
            f"The optimizer lacks the parameter `{missing[0]}`. Make it of all trainable "
            "parameters, or freeze those that are not trained."
            if missing
            else "The model has no trainable parameter."
        )
    own = {id(p) for p in params.values()}
    others = [
        p for group in optimizer.param_groups for p in group["params"]
        if p.requires_grad and id(p) not in own
    ]  # fmt: skip
    if others:
        raise UsageError(
            f"The optimizer has a parameter {tuple(others[0].shape)} that is not the model's: what "
            "it learns is not private. Make it of this model's parameters alone."
        )
