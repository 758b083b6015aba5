"""Training with differential privacy: batches drawn at random, gradients clipped, noise added.

Owns: `Private`: which examples a step is made of, the bound on each one's part, the noise, what may
not happen between the passes of a step, and what a run goes on from.
Does not know: how norms and clipped sums come about (`api`), how epsilon is computed (Opacus), how
ranks talk (`private_ranks`).
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf, isfinite
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pergrad import api
from pergrad.engine.reading_pass import set_aside
from pergrad.errors import UsageError
from pergrad.extras import need
from pergrad.training.private_ranks import (
    add_over_ranks,
    begin_alike,
    check_model,
    rank_and_ranks,
)

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

    An example whose gradient is not finite (a NaN in its row, an overflow) cannot be clipped. It is
    left out, as if its gradient were 0, and the first one is said with a warning. What an example
    adds is then still a function of that example and the weights alone, and its norm is 0 <= clip:
    one example more or less moves the sum by at most `clip`, and the guarantee is the same.

    On several ranks (torch.distributed) each rank has all the data and the same weights. All draw
    the same step and take every n-th of its examples; sums are added over the ranks once a step,
    then the noise, once, and every rank's optimizer takes the same step. A rank may have more
    batches of a step than another, or none: the loop's body may wait for no other rank. The model
    is not wrapped in DistributedDataParallel.

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
            knows the seed knows the noise. On several ranks that of rank 0 counts.

    Attributes:
        steps: how many have been taken. Set it, to go on from another Private's.
        left_out: how many times an example of this rank was left out, as not finite.

    Raises:
        UsageError: an argument makes no sense, the optimizer has other parameters, or ranks do not
            begin alike.
        UnsupportedError: the model is sharded, or wrapped for several ranks.

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
        self.model, self.optimizer = model, optimizer
        self.clip, self.noise, self.rate, self.most = float(clip), float(noise), rate, most
        self.data, self.accountant = data, accountant
        self.expected = rate * len(data)  # examples of a step, fixed: the true number is private
        self.steps = self.left_out = 0
        self._collate = torch.utils.data.default_collate if collate is None else collate
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        self._generator = generator
        self._params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        _check_optimizer(self._params, optimizer)
        check_model(model, self._params)
        self._rank, self._ranks = rank_and_ranks()
        if self._ranks > 1:
            begin_alike(self._params, self._settings(), generator)
        self._at = 0  # steps of the epoch at hand that have been taken
        self._resumed = False  # whether the next loop goes on from there
        self._before: Tensor | None = None  # the generator's state as the step at hand began
        self._loop: object = None  # the `for` that runs
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
        """The batches of one epoch, or of what is left of one that was saved."""
        self._check_ranks()
        self._loop = loop = object()
        self._at, self._resumed = self._at if self._resumed else 0, False
        while self._at < len(self):
            self._before = self._generator.get_state()
            drawn = torch.rand(len(self.data), generator=self._generator) < self.rate
            rows = drawn.nonzero().flatten()[self._rank :: self._ranks].tolist()
            self._sums, self._waiting = {}, None  # of a step that was left before its end
            if not rows:
                self._check_gradients()
                self._step()
            for begin in range(0, len(rows), self.most):
                chosen = rows[begin : begin + self.most]
                batch = self._collate([self.data[i] for i in chosen])
                self._waiting, self._last = len(chosen), begin + self.most >= len(rows)
                yield batch
                if self._loop is not loop:
                    raise UsageError(
                        "Another loop over this Private began, or its state was loaded, while "
                        "this one was under way. Leave this one first, with `break`."
                    )
                if self._waiting is not None:
                    raise UsageError(
                        "A batch has not gone backward. Call `private.backward(losses)` once for "
                        "every batch; one that is left out would change what the noise covers."
                    )
        self._at = 0

    def backward(self, losses: Tensor) -> Tensor:
        """Clip and add up the batch's gradients; after a step's last batch, the optimizer steps.

        Args:
            losses: (B,), one for each example of the batch at hand, in any order.

        Returns:
            (B,), the norms before clipping; not finite for what was left out. They are not
            private.

        Raises:
            UsageError: another number of losses than of examples, a second pass for a batch,
                gradients of another pass, or parameters that were frozen or thawed meanwhile.
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
        set_aside(
            losses,
            UsageError(
                "A step of `Private` cannot be watched or read: it adds noise, and steps by "
                "itself, and what is written of single examples is not private. Train without the "
                "watch; `private.backward` returns the norms."
            ),
        )
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
        finite = norms.isfinite()
        if not bool(finite.all()):
            self._say_left_out(norms)
        # rounded down: the bound has to hold, not only nearly
        weights = (self.clip / norms).clamp(max=1.0) * (1 - 4 * torch.finfo(norms.dtype).eps)
        weights = torch.where(norms <= self.clip, torch.ones_like(norms), weights)
        return torch.where(finite, weights, torch.zeros_like(norms))  # 0 leaves a row out

    def _say_left_out(self, norms: Tensor) -> None:
        bad = (~norms.isfinite()).nonzero().flatten()
        if not self.left_out:
            warnings.warn(
                f"The gradient of example {int(bad[0])} of this batch is not finite, so it was left"
                f" out of step {self.steps} (`left_out` counts such examples; this is said once). "
                "The guarantee holds. To train on it, make its loss finite: smaller inputs, a "
                "clamp, float32.",
                RuntimeWarning,
                stacklevel=2,
            )
        self.left_out += len(bad)

    def _step(self) -> None:
        """Noise, the optimizer's step, and nothing left of it."""
        sums = self._sums
        if self._ranks > 1:  # every rank, also one without examples
            sums = {n: torch.zeros_like(p) + sums.get(n, 0) for n, p in self._params.items()}
            add_over_ranks(sums.values())
        std = self.noise * self.clip
        for name, p in self._params.items():
            drawn = torch.normal(0.0, std, p.shape, generator=self._generator, dtype=p.dtype)
            total = drawn.to(p.device) if std else torch.zeros_like(p)
            if name in sums:
                total.add_(sums[name])
            p.grad = total.div_(self.expected)
        self._sums = {}
        self._ours = True
        try:
            self.optimizer.step()
        finally:
            self._ours = False
            for p in self._params.values():
                p.grad = None
        self.steps += 1
        self._at += 1
        self._before = None

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

    def _check_ranks(self) -> None:
        if rank_and_ranks() != (self._rank, self._ranks):
            raise UsageError(
                "torch.distributed was set up or taken down after this Private was made, which "
                f"knows of {self._ranks} rank(s). Make it when the ranks have met."
            )

    def _settings(self) -> dict[str, float]:
        """What noise and accounting rest on."""
        return {"clip": self.clip, "noise": self.noise, "rate": self.rate, "data": len(self.data)}

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on from, beside the model's and the optimizer's own state.

            torch.save([model.state_dict(), optimizer.state_dict(), private.state_dict()], path)

        Between two steps the resumed run is the same to the bit. In the middle of a step (one that
        comes in several batches) the state is that of the step's beginning, which is drawn and
        taken once more, and no sum without noise is stored.

        Returns:
            steps, the steps of the epoch at hand, left_out, the settings, and the generator's
            state. Whoever has that knows the noise to come: keep it as secret as a seed.
        """
        state = self._generator.get_state() if self._before is None else self._before
        return {
            "steps": self.steps,
            "epoch_steps": self._at,
            "left_out": self.left_out,
            "settings": self._settings(),
            "generator": state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: the next loop is the rest of that epoch.

        On several ranks, on each, with the state of any.

        Raises:
            UsageError: it is no such state, or of other settings.
        """
        names = ("steps", "epoch_steps", "left_out", "settings", "generator")
        if not isinstance(state, Mapping) or any(name not in state for name in names):
            raise UsageError("This is no state of a Private. Pass what `state_dict()` returned.")
        now, was = self._settings(), state["settings"]
        for name in now:
            if now[name] != was.get(name):
                raise UsageError(
                    f"The state is of a Private with {name} {was.get(name)}, this one has "
                    f"{now[name]}: the noise to come would be that of the other. Make it with the "
                    "same settings, or a new one that draws its own noise, and set its `steps`."
                )
        self._generator.set_state(state["generator"].cpu())
        self.steps, self.left_out = int(state["steps"]), int(state["left_out"])
        self._at, self._resumed = int(state["epoch_steps"]), True
        self._before = self._loop = None
        self._sums, self._waiting = {}, None

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
