"""Parameters sharded by FSDP2 (`fully_shard`), whole for the length of a call.

Owns: every private name of `torch.distributed.fsdp`; which models the losses go through; the map
from a sharded parameter to the whole one in the graph; gathering, and putting everything back.
Does not know: examples, layouts, rules, numbers.

FSDP frees a gathered weight when its module's forward is over, and gathers it again by a hook of
the backward pass. pergrad also runs nodes on its own, where no such hook fires, and a freed weight
read there ends the process. So everything is gathered first, in the modules' order. That is all the
communication there is, and it does not depend on what the losses of one rank look like: ranks may
have different batches, even empty ones, and one may raise while another does not. For as long, the
hooks find their work done and do nothing.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pergrad.errors import UnsupportedError
from pergrad.graph import nodes
from pergrad.graph.walk import topological

State = Any  # torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState
Group = Any  # torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup

_MODULE = "torch.distributed.fsdp._fully_shard._fsdp_state"


def _nobody() -> bool:
    """Whether nobody can have called fully_shard in this process."""
    return _MODULE not in sys.modules


def _states() -> list[State]:
    """The states of all modules of this process that FSDP2 manages, each once."""
    if _nobody():
        return []
    module = sys.modules[_MODULE]
    from torch.distributed._composable_state import _module_state_mapping

    found = {id(state): state for ref in list(_module_state_mapping.values())
             if isinstance(state := ref(), module.FSDPState)}  # fmt: skip
    return list(found.values())


@contextmanager
def _known() -> Iterator[None]:
    """An attribute of FSDP's that is not there is another release's."""
    try:
        yield
    except (AttributeError, ImportError) as error:
        raise UnsupportedError(
            f"fully_shard of torch {torch.__version__} keeps its books in a way that pergrad does "
            f"not know ({error}). Use a version of torch that pergrad is tested with (see the "
            "README)."
        ) from error


def _groups(state: State) -> list[Group]:
    """The groups of parameters that are gathered together (older releases have one at most)."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def whole(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters as they occur in the graph: whole ones in the place of sharded ones.

    A whole one has no memory until it is gathered.
    """
    if _nobody():
        return dict(params)
    known: dict[int, Tensor] = {}
    with _known():
        for p in _managed():
            known[id(p.sharded_param)] = p._unsharded_param
            between = getattr(p, "_sharded_post_forward_param", None)
            if between is not None:
                known[id(between)] = p._unsharded_param
    return {name: known.get(id(p), p) for name, p in params.items()}


def is_sharded(*params: Tensor) -> bool:
    """Whether one of the parameters is a whole one that FSDP2 gathers and frees."""
    if _nobody():
        return False
    known = {id(p._unsharded_param) for p in _managed()}
    return any(id(p) in known for p in params)


def storages() -> set[int]:
    """Addresses of the memory in which gathered parameters are now."""
    return {p._unsharded_param.untyped_storage().data_ptr() for p in _managed()}


def _managed(states: list[State] | None = None) -> list[Any]:
    """FSDP's records of the parameters that have been gathered at least once."""
    return [
        p
        for state in (_states() if states is None else states)
        for group in _groups(state)
        for p in group.fsdp_params
        if hasattr(p, "_unsharded_param")
    ]


def _touched(losses: Tensor, params: Iterable[Tensor]) -> list[State]:
    """The states of every model that the losses go through, in an order equal on all ranks."""
    states = _states()
    by_group = {id(group): state for state in states for group in _groups(state)}
    by_tensor = {id(p._unsharded_param): state for state in states for p in _managed([state])}
    if not by_tensor:
        return []
    reached = [state for p in params if (state := by_tensor.get(id(p))) is not None]
    for node in topological(nodes.get_gradient_edge(losses).node)[0]:
        # What FSDP2 puts before a module whose inputs need a gradient knows the module's group.
        for key, known in ((nodes.leaf_variable(node), by_tensor),
                           (getattr(node, "param_group", None), by_group)):  # fmt: skip
            if key is not None and id(key) in known:
                reached.append(known[id(key)])
    # All modules of a root: a frozen one may show in the graph by what other nodes saved alone.
    found = {id(one) for state in reached for one in state._state_ctx.all_states}
    return [state for state in states if id(state) in found]


def gathered(
    losses: Tensor, params: Iterable[Tensor], *, retain_graph: bool, create_graph: bool = False
) -> AbstractContextManager[None]:
    """All weights of the models that the losses go through are in memory inside this block.

    Afterwards all is as before, except that without `retain_graph` everything is sharded, as
    after a backward pass.

    Raises:
        UnsupportedError: create_graph, whose results would need the weights when they are freed.
    """
    if _nobody():
        return nullcontext()
    return _gathered(losses, params, retain_graph=retain_graph, create_graph=create_graph)


@contextmanager
def _gathered(
    losses: Tensor, params: Iterable[Tensor], *, retain_graph: bool, create_graph: bool
) -> Iterator[None]:
    with _known():
        states = _touched(losses, params)
    if not states:
        yield
        return
    if create_graph:
        raise UnsupportedError(
            "The model is sharded by fully_shard, and create_graph=True would give results whose "
            "gradients need weights that are freed by then. Leave create_graph out, or use the "
            "model before fully_shard."
        )
    groups = [group for state in states for group in _groups(state)]
    free = [group for group in groups if not (retain_graph and group.is_unsharded)]
    with _Kept() as kept:
        try:
            with _known():
                _gather(states, groups, kept)
            yield
        finally:
            for group in free:
                group.reshard()


def _gather(states: list[State], groups: list[Group], kept: "_Kept") -> None:
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    for group in groups:
        group.unshard()
        group.wait_for_unshard()
    for state in states:
        # As within a backward pass whose end is looked after: a checkpoint that runs a module
        # again gathers nothing, the hooks that gather do nothing.
        kept.set(state, "_training_state", TrainingState.PRE_BACKWARD)
        kept.set(state._state_ctx, "post_backward_final_callback_queued", True)
    for group in groups:
        kept.set(group, "_training_state", TrainingState.PRE_BACKWARD)
        kept.set(group, "reduce_grads", False)
        kept.set(group, "reshard_after_backward", False)
        kept.set(group, "_post_forward_indices", list(group._post_forward_indices))


class _Kept:
    """Attributes that are put back at the end of the block."""

    def __init__(self) -> None:
        self.before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> "_Kept":
        return self

    def set(self, owner: Any, name: str, value: Any) -> None:
        self.before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def __exit__(self, *_: object) -> None:
        for owner, name, value in reversed(self.before):
            setattr(owner, name, value)
