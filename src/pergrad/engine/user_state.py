"""What a pass of ours must leave as it was, and what must stay as it was until a pass is done.

A backward pass of torch writes to `.grad` of tensors that nobody asked about, and a user's hook may
write over memory that pergrad still needs. This file undoes the first and notices the second.

Owns: `retained_untouched` (`.grad` of tensors with `retain_grad()`), `nothing_hidden` (`.grad` of
parameters), `Untouched` and `Held` (tensors and factors that are read later in a pass), and finding
the dictionaries in which torch keeps hooks.
Does not know: the graph, and why anything has to be read later.
"""

import atexit
import gc
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import compress
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Parameter

from pergrad.errors import UnsupportedError, UsageError
from pergrad.factors import Factor
from pergrad.graph import nodes

# After so many collections between which nobody asked, nobody is likely to ask.
_PATIENCE = 50


@contextmanager
def nothing_hidden(params: Mapping[str, Tensor]) -> Iterator[None]:
    """Whatever passes run inside, no op of theirs has written to a parameter's `.grad`.

    A Function may hold a whole block and run a backward pass of its own inside its backward, as
    reversible layers and other packages' checkpoints do. The block's parameters are then absent
    from the graph, and their gradients, summed over examples, go straight to `.grad`.

    Raises:
        UnsupportedError: one has. `.grad` is as before all the same.
    """
    before = {name: p.grad for name, p in params.items() if p.is_leaf}
    for name, grad in before.items():
        if grad is not None:
            params[name].grad = None
    hidden: list[str] = []
    try:
        yield
    finally:
        for name, grad in before.items():
            now = params[name].grad
            if now is not None:
                hidden.append(name)
            if now is not grad:
                params[name].grad = grad
    if hidden:
        raise UnsupportedError(
            f"An op of the graph runs a backward pass of its own, and so hides {len(hidden)} "
            f"parameters from it, the first being `{hidden[0]}`: their gradients would be missing "
            "without a word. Reversible layers do so, and some checkpoints. Compute the losses "
            "without them (they save memory, and change no result)."
        )


class Untouched:
    """Tensors that are read later: those that ops saved, the gradients that torch's pass went on
    with. What a user's hooks do with that memory after the pass has come by, torch allows, but a
    number made of it would be wrong.
    """

    __slots__ = ("_tensors", "_versions")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._versions = nodes.versions(tensors)

    @property
    def overwritten(self) -> bool:
        """Whether one was written to in the meantime."""
        return nodes.versions(self._tensors) != self._versions

    def check(self, name: str) -> None:
        """Nothing, if the gradients of the parameter of this name may be computed from them.

        Raises:
            UsageError: a tensor was written to in the meantime.
        """
        if self.overwritten:
            raise UsageError(
                f"What the gradients of `{name}` are computed from was overwritten during the "
                "backward pass: by an unpack hook of saved_tensors_hooks that returns the same "
                "memory again, or by a hook that changes a gradient in place. Return a new tensor "
                "from that hook, or change a clone."
            )


class Held(Untouched):
    """A factor of one parameter, to be used later."""

    __slots__ = ("_factor",)

    def __init__(self, factor: Factor) -> None:
        super().__init__(factor.tensors())
        self._factor = factor

    def factor(self, name: str) -> Factor:
        """The factor, of the parameter of this name.

        Raises:
            UsageError: as in `check`.
        """
        self.check(name)
        return self._factor


class Attached(NamedTuple):
    """What may belong to the graph at hand, or to any other."""

    tensors: list[Tensor]  # those alive that have a history and hooks
    hooks: list[OrderedDict]  # not empty; on the graph at hand are none but these


@contextmanager
def retained_untouched() -> Iterator[Attached]:
    """Whatever passes run inside, `.grad` of tensors with retain_grad() is as before.

    torch adds to it in every backward pass, and a node does not tell whose gradient it retains, so
    such tensors are looked for among Python's objects (docs/decisions/retain-grad.md).
    """
    with nodes.no_overrides():
        tensors = _old.with_history()
        before = [(tensor, tensor.grad) for tensor in tensors if tensor.retains_grad]
        hooks = _old.hooks(tensors)
        attached = Attached([t for t in tensors if nodes.tensor_hooks(t)] if hooks else [], hooks)
        del tensors  # activations, which the pass frees as it goes
    try:
        yield attached
    finally:
        with nodes.no_overrides():
            for tensor, grad in before:
                tensor.grad = grad


def elsewhere(hooks: Iterable[OrderedDict]) -> None:
    """These are not on the graph at hand; never look again at those of modules and leaves."""
    _old.dismiss(list(hooks))


class _Old:
    """Tensors with a history that have outlived a collection of Python's garbage collector.

    Those of the latest forward pass are mostly its newest objects, at most some hundred: these are
    looked through at every pass. Looking through all objects of the process takes tens of
    milliseconds, so that is done once; later ones are seen when a collection is about to make them
    older.
    """

    def __init__(self) -> None:
        self._known: list[weakref.ref[Tensor]] = []
        self._watching = False
        self._collections = 0  # since somebody asked
        self._hooks: list[weakref.ref[OrderedDict]] = []
        self._dismissed: dict[int, weakref.ref[OrderedDict]] = {}  # hooks of modules and leaves
        self._asked: dict[int, weakref.ref[OrderedDict]] = {}  # whether they are
        self._quiet = -1  # how many hooks had been registered when there were none to look at

    def with_history(self) -> list[Tensor]:
        """Tensors that an op has made, new ones too."""
        self._collections = 0
        if not self._watching:
            # first the watch, then the search, the younger first: what ages meanwhile is found
            # twice, and never missed
            gc.callbacks.append(self._before_collection)
            self._watching = True
            for generation in (1, 2):
                self._remember(generation)
        young = gc.get_objects(0)
        if _overdue(len(young)):
            gc.collect(0)  # which the watch sees
            young = gc.get_objects(0)
        found = {id(t): t for t in _with_history(young)}
        found.update((id(t), t) for ref in list(self._known) if (t := ref()) is not None)
        if nodes.hooks_registered() != self._quiet:
            self._hooks.extend([weakref.ref(d) for d in _hook_dicts(young)])
        return list(found.values())

    def hooks(self, tensors: Iterable[Tensor]) -> list[OrderedDict]:
        """Where hooks are kept: those of the tensors at hand, and whatever else looks like it.

        At no cost where none has been registered since there were none.
        """
        registered = nodes.hooks_registered()
        if registered == self._quiet:
            return []
        alive = [d for ref in list(self._hooks) if (d := ref())]
        alive += [d for t in tensors if (d := nodes.tensor_hooks(t))]
        found = {id(d): d for d in alive if not self._is_dismissed(d)}
        if not found:
            self._quiet = registered
        return list(found.values())

    def dismiss(self, hooks: list[OrderedDict]) -> None:
        """Forget those that something in Python holds, as modules and leaves hold theirs.

        What a graph alone holds, another graph, is looked at again.
        """
        for d in hooks:
            asked = self._asked.get(id(d))
            if asked is not None and asked() is d:
                continue
            self._asked[id(d)] = weakref.ref(d)
            # a list that holds them is none of the user's, nor is a function under way
            holders = [h for h in gc.get_referrers(d) if type(h) is not list and not _is_frame(h)]
            if holders:
                self._dismissed[id(d)] = weakref.ref(d)

    def _is_dismissed(self, d: OrderedDict) -> bool:
        ref = self._dismissed.get(id(d))
        return ref is not None and ref() is d

    @nodes.never_compiled
    def _before_collection(self, phase: str, info: dict[str, int]) -> None:
        if phase != "start":
            return
        if info["generation"] > 0:
            self._collections += 1
            if self._collections > _PATIENCE:
                self.stop()
                return
            # one list for good: a collection may come in the middle of whatever reads it
            self._known[:] = [ref for ref in self._known if ref() is not None]
            hooks = {id(d): ref for ref in self._hooks if (d := ref()) is not None}
            self._hooks[:] = hooks.values()
        self._remember(0)

    def _remember(self, generation: int) -> None:
        objects = gc.get_objects(generation)
        self._known.extend([weakref.ref(t) for t in _with_history(objects)])
        if nodes.hooks_registered() != self._quiet:
            self._hooks.extend([weakref.ref(d) for d in _hook_dicts(objects)])

    def stop(self) -> None:
        """Look at no collection any more; the next pass looks through all objects again."""
        self._watching = False
        self._known.clear()
        self._hooks.clear()
        self._dismissed.clear()
        self._asked.clear()
        self._quiet = -1
        with suppress(ValueError):
            gc.callbacks.remove(self._before_collection)


_old = _Old()
atexit.register(_old.stop)  # the last collections find modules in pieces


def _overdue(young: int) -> bool:
    """Whether so many new objects should have been made older long ago.

    Python counts the objects that are made less those that are freed, also old ones: a program that
    frees old ones for a while collects nothing, and each pass would look through all that pile up.
    """
    threshold = gc.get_threshold()[0]
    return gc.isenabled() and 0 < 2 * threshold < young


def _with_history(objects: Sequence[Any]) -> list[Tensor]:
    """The tensors among them that may have a history; of any class but parameters', leaves all."""
    classes = _tensor_classes()
    with nodes.no_overrides():
        try:  # a thousand objects in every pass, for which a line of Python each takes too long
            tensors = list(compress(objects, map(classes.__contains__, map(type, objects))))
        except TypeError:  # a class whose own class has no hash
            numbers = set(map(id, classes))
            tensors = [o for o in objects if id(type(o)) in numbers]
        found = [o for o in tensors if o.requires_grad]
        # torch does not move a parameter of another class to which somebody has a weak reference
        return [o for o in found if type(o) is Tensor or not getattr(o, "_is_param", False)]


def _tensor_classes() -> set[type]:
    """Tensor and all classes that derive from it now; without that of parameters itself."""
    found: set[type] = set()
    left: list[type] = [Tensor]
    while left:
        cls = left.pop()
        if cls not in found:
            found.add(cls)
            left += type.__subclasses__(cls)
    return found - {Parameter}


def _hook_dicts(objects: Iterable[Any]) -> list[OrderedDict]:
    """What may be hooks: torch keeps them by number, in the order in which they were registered."""
    found = [o for o in objects if type(o) is OrderedDict and o]
    return [d for d in found if all(type(k) is int and callable(v) for k, v in list(d.items()))]


def _is_frame(holder: object) -> bool:
    return type(holder).__name__ == "frame"
