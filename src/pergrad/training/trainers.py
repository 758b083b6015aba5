"""Watching inside trainers: their callbacks, and blocks that end with a pass of the trainer's own.

Owns: callbacks for transformers and lightning, `attach`; what a batch says of its examples: how
many, names, and what a person sees of them.
Does not know: how a step is read, what is made of it.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pergrad.errors import UsageError
from pergrad.extras import need
from pergrad.graph import nodes
from pergrad.training.reader import check_options

if TYPE_CHECKING:
    from pergrad.training.watch import Block, Watch


LABELS = ("labels", "label", "targets", "target", "y")  # of a batch with names


class Batch:
    """What a batch of a trainer's says of its examples, which lie along first dimensions."""

    def __init__(self, inputs: Any, decode: Callable[[Any], Any] | None = None) -> None:
        self._named = dict(_tensors(inputs))
        ids = self._named.get("input_ids")
        first = ids if ids is not None else next(iter(self._named.values()), None)
        self.examples = None if first is None else len(first)
        self._decode = decode

    def keys(self) -> list[str] | None:
        """A hash of each row: the same example has the same name in every epoch."""
        if self.examples is None:
            return None
        columns = [t.detach().cpu() for t in self._named.values() if len(t) == self.examples]
        mask = self._named.get("attention_mask")
        padded = mask is not None and mask.dim() == 2 and len(mask) == self.examples
        keep = mask.detach().cpu().bool() if padded and mask is not None else None
        found = []
        for i in range(self.examples):
            digest = blake2b(digest_size=8)
            for column in columns:
                row = column[i]
                if keep is not None and column.shape == keep.shape:  # not the batch's padding
                    row = row[keep[i]]
                digest.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            found.append(digest.hexdigest())
        return found

    def preview(self, row: int) -> Any:
        """The picture or text of a row, with its label if the batch has classes."""
        seen, label = self._seen(row), self._label(row)
        if label is None:
            return seen
        return {"text" if isinstance(seen, str) else "image": seen, "label": label}

    def _label(self, row: int) -> str | None:
        """The class of a row: a whole number each, under a name for it or beside the inputs."""
        names = [name for name in LABELS if name in self._named]
        if self._named.keys() == {"0", "1"}:  # a batch (inputs, labels)
            names = ["1"]
        for classes in (self._named[name] for name in names):
            whole = not (classes.is_floating_point() or classes.is_complex())
            if whole and classes.shape == (self.examples,):
                return f"label {int(classes[row])}"
        return None

    def _seen(self, row: int) -> Any:
        pixels = self._named.get("pixel_values")
        if pixels is not None:
            return pixels[row].detach().float().cpu()
        ids = self._named.get("input_ids")
        if ids is not None and self._decode is not None:
            mask = self._named.get("attention_mask")
            same = mask is not None and mask.shape == ids.shape
            kept = ids[row][mask[row].bool()] if same and mask is not None else ids[row]
            return str(self._decode(kept.tolist()))
        first = next(t for t in self._named.values() if len(t) == self.examples)
        if first.dim() in (3, 4):
            return first[row].detach().float().cpu()
        return str(first[row].tolist())


def _tensors(inputs: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch that have rows, by name."""
    if isinstance(inputs, Tensor):
        if inputs.dim():
            yield name, inputs
    elif isinstance(inputs, Mapping):
        for key, value in inputs.items():
            yield from _tensors(value, str(key))
    elif isinstance(inputs, (list, tuple)):
        for k, value in enumerate(inputs):
            yield from _tensors(value, f"{name}{k}")


def not_a_callback(name: str, what: str, instead: str) -> AttributeError:
    """For what a trainer was given in the place of a callback, and asks for one's methods."""
    asked = name.startswith("on_") or name in ("setup", "teardown", "state_key")
    told = f" {what} is not a callback for this trainer: pass {instead}." if asked else ""
    return AttributeError(f"{what} has no attribute {name!r}.{told}")


class Maker:
    """A method that makes a callback, and says so where it is passed in the place of one."""

    def __init__(self, name: str, make: Callable[..., Any], words: str | None) -> None:
        self._name, self._make, self.__doc__ = name, make, words

    def __call__(self, **options: Any) -> Any:
        """The callback."""
        return self._make(**options)

    def __getattr__(self, name: str) -> Any:
        raise not_a_callback(name, f"`{self._name}`", f"what it returns, `{self._name}()`")


class Deferred:
    """A block of a watch that ends with the backward pass that comes by its loss.

    For trainers that clip gradients before anybody is told that the pass is over.
    """

    def __init__(self, block: "Block", loss: Tensor) -> None:
        self._block: Block | None = block
        self._handle = None
        if block.__enter__() is not None and loss.grad_fn is not None:
            self._handle = nodes.before(loss.grad_fn, self._arm)

    def _arm(self, _: Any) -> None:
        with suppress(RuntimeError):
            nodes.after_pass(self._again)

    def _again(self) -> None:
        # Behind what was queued meanwhile: DDP and FSDP finish their gradients there.
        with suppress(RuntimeError):
            nodes.after_pass(self.finish)

    def finish(self) -> None:
        """The pass is over, or will not come."""
        block, self._block = self._block, None
        if self._handle is not None:
            self._handle.remove()
        if block is not None:
            block.__exit__(None, None, None)


class _Steps:
    """What trainers of both kinds have in common: open blocks, and numbers for their logs."""

    def __init__(self, watch: "Watch", options: Mapping[str, Any]) -> None:
        check_options(options)
        self.watch, self._options = watch, options
        self.deferred: list[Deferred] = []
        self.numbers: dict[str, float] = {}
        watch.also_log(self._note)

    def _note(self, numbers: dict[str, float], _: int) -> None:
        self.numbers = numbers

    def take(self) -> dict[str, float]:
        """The numbers of the latest watched step, once."""
        found, self.numbers = self.numbers, {}
        return found

    def block(
        self, loss: Any, model: Any, batch: Batch, step: int, examples: int | None = None
    ) -> "Block | None":
        """A block, if the loss can be one's of a training step."""
        trains = isinstance(loss, Tensor) and loss.requires_grad and torch.is_grad_enabled()
        if not trains or self.watch.skips(step):
            return None
        count = batch.examples if examples is None else examples
        told = None if loss.dim() else count
        block = self.watch(loss, model, told, step=step, **self._options)
        if count == batch.examples:
            block.describe(batch.keys, batch.preview)
        return block

    def close(self) -> None:
        """Whatever is open ends here."""
        open_now, self.deferred = self.deferred, []
        for each in open_now:
            each.finish()


def loss_of(output: Any) -> Any:
    """The loss in what a model of transformers returns; None if there is none."""
    if isinstance(output, Mapping):
        return output.get("loss")
    if isinstance(output, (tuple, list)) and output:
        first = output[0]
        return first if isinstance(first, Tensor) and first.dim() == 0 else None
    return getattr(output, "loss", None)


def transformers_callback(watch: "Watch", **options: Any) -> Any:
    """See `Watch.hf`."""
    need("integrations", "transformers")
    from transformers import TrainerCallback

    class WatchCallback(TrainerCallback):
        """Watches a Trainer; made by `pergrad.Watch.hf`."""

        def __init__(self) -> None:
            self._steps = _Steps(watch, options)
            self._hook: Any = None
            self._step = 0
            self._decode: Any = None
            self._heard = False  # whether a model has returned a loss

        def __getattr__(self, name: str) -> Any:
            raise not_a_callback(name, "`watch.hf()`", "`watch.lightning()` to a lightning.Trainer")

        def on_train_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
            self._remove()
            self._decode = getattr(about.get("processing_class"), "decode", None)
            # Loggers take what stands in `logs` when they are called, so this one goes first. The
            # handler tells its callbacks nothing of itself.
            handler = sys._getframe(1).f_locals.get("self")
            callbacks = getattr(handler, "callbacks", None)
            if isinstance(callbacks, list) and self in callbacks:
                callbacks.remove(self)
                callbacks.insert(0, self)

        def on_step_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
            self._remove()
            self._step = state.global_step
            model = about.get("model")
            if isinstance(model, nn.Module) and not watch.skips(self._step):
                self._hook = model.register_forward_hook(self._after_forward, with_kwargs=True)

        def _after_forward(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not model.training or not torch.is_grad_enabled():
                return
            try:
                loss = loss_of(output)
                if loss is None:
                    if not self._heard:
                        watch.say(
                            "The model returns no loss, so the callback alone has nothing to read: "
                            "the trainer computes a loss of its own. Call `watch.attach(trainer)`."
                        )
                    return
                self._heard = True
                batch = Batch({**{f"{k}": a for k, a in enumerate(args)}, **kwargs}, self._decode)
                block = self._steps.block(loss, model, batch, self._step)
                if block is not None:
                    self._steps.deferred.append(Deferred(block, loss))
            except Exception as error:
                watch.fail(error)

        def _remove(self) -> None:
            if self._hook is not None:
                self._hook.remove()
                self._hook = None
            self._steps.close()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._remove()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._remove()
            watch.finish_step()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
        ) -> None:  # fmt: skip
            numbers = self._steps.take()
            if isinstance(logs, dict):
                logs.update(numbers)
            if state.log_history and isinstance(state.log_history[-1], dict):
                state.log_history[-1].update(numbers)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._remove()
            watch.flush()

    return WatchCallback()


def attach(
    watch: "Watch",
    trainer: Any,
    examples: Callable[[Any], int] | None = None,
    **options: Any,
) -> None:
    """See `Watch.attach`."""
    compute, add = getattr(trainer, "compute_loss", None), getattr(trainer, "add_callback", None)
    if not callable(compute) or not callable(add):
        raise UsageError(
            f"A {type(trainer).__name__} has no compute_loss and add_callback, as trainers of "
            "transformers and trl have. Put the backward pass into `with watch(loss, model):`."
        )
    callback = transformers_callback(watch, **options)
    steps = callback._steps

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batch, trains = None, False
        try:
            trains = model.training and torch.is_grad_enabled()
            trains = trains and not watch.skips(trainer.state.global_step)
            processing = getattr(trainer, "processing_class", None)
            if trains:  # before: a trainer may take entries out
                batch = Batch(inputs, getattr(processing, "decode", None))
        except Exception as error:
            watch.fail(error)
        count = None
        if batch is not None and examples is not None:
            try:
                count = examples(inputs)
            except Exception as error:
                watch.fail(error)
        result = compute(model, inputs, *args, **kwargs)
        if batch is not None:
            try:
                loss = result[0] if isinstance(result, tuple) else result
                step = trainer.state.global_step
                block = steps.block(loss, model, batch, step, count)
                if block is not None:
                    steps.deferred.append(Deferred(block, loss))
            except Exception as error:
                watch.fail(error)
        return result

    trainer.compute_loss = compute_loss
    callback.on_step_begin = _only_closes(callback)
    add(callback)


def _only_closes(callback: Any) -> Callable[..., None]:
    """With a loss from the trainer, the model's own is not asked for."""

    def on_step_begin(*_: Any, **__: Any) -> None:
        callback._remove()

    return on_step_begin


def lightning_callback(watch: "Watch", **options: Any) -> Any:
    """See `Watch.lightning`."""
    base = _base_of_lightning()

    class WatchCallback(base):  # type: ignore[misc,valid-type]
        """Watches a lightning.Trainer; made by `pergrad.Watch.lightning`."""

        def __init__(self) -> None:
            self._steps = _Steps(watch, options)
            self._batch = Batch(())
            self._block: Block | None = None
            self._heard = False  # whether Lightning has begun a backward pass

        def __getattr__(self, name: str) -> Any:
            raise not_a_callback(name, "`watch.lightning()`", "`watch.hf()` to transformers'")

        def on_train_batch_start(
            self, trainer: Any, module: Any, batch: Any, batch_idx: int
        ) -> None:  # fmt: skip
            if not watch.skips(trainer.global_step):
                self._batch = Batch(batch)

        def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
            self._close()
            self._heard = True
            try:
                block = self._steps.block(loss, module, self._batch, trainer.global_step)
                if block is not None:
                    block.__enter__()
                    self._block = block
            except Exception as error:
                watch.fail(error)

        def on_after_backward(self, trainer: Any, module: Any) -> None:
            self._close()

        def _close(self) -> None:
            block, self._block = self._block, None
            if block is not None:
                block.__exit__(None, None, None)

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:  # fmt: skip
            self._close()
            if watch.is_over(trainer.global_step):
                watch.finish_step()
            numbers = self._steps.take()
            if numbers and trainer.logger is not None:
                try:
                    for logger in trainer.loggers:
                        logger.log_metrics(numbers, step=trainer.global_step)
                except Exception as error:
                    watch.fail(error)

        def on_train_end(self, trainer: Any, module: Any) -> None:
            self._close()
            if not self._heard:
                watch.say(
                    "No backward pass of Lightning's came by, so the callback has read nothing. A "
                    "module that calls pergrad.backward, or loss.backward, itself does it inside "
                    "`with watch(losses, self, step=self.global_step):`, and needs no callback."
                )
            watch.flush()

    return WatchCallback()


def _base_of_lightning() -> Any:
    """The class of Lightning's callbacks, of whichever of its two packages is installed."""
    try:
        from lightning.pytorch import Callback

        return Callback
    except ImportError:
        need("integrations", "pytorch_lightning")
    from pytorch_lightning import Callback as Older

    return Older
