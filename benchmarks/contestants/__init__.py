"""Who competes, and in what: the only list of them.

Owns: the names, titles and tasks of the contestants. Each lives in a module of its own here, with
one function per task: it takes a `Step`, sets up once, and returns what is timed, a function of a
batch. Results are in `RESULT` of each task's form.

Does not know: workloads, timing. A contestant's module imports its library, so it is imported only
in the process that runs it.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Contestant:
    name: str
    title: str
    tasks: tuple[str, ...]
    module: str
    prefixes: tuple[str, ...] = ("",)  # of the workloads that it is written for
    linear: bool = False  # its time is proportional to the examples: a part may be timed and scaled
    extra: str | None = None  # what must be installed for it
    computes: bool = True  # whether it gives what is asked for
    peer: bool = True  # whether pergrad competes with it

    def function(self, task: str) -> Any:
        return getattr(import_module(f"contestants.{self.module}"), task)

    def runs(self, workload: Any) -> bool:
        return workload.task in self.tasks and workload.name.startswith(self.prefixes)


EVERY = ("norms", "gram", "cross", "direction", "clip", "lengths")

CONTESTANTS = {
    c.name: c
    for c in (
        Contestant("plain", "plain forward and backward", EVERY, "plain", computes=False),
        Contestant("pergrad", "pergrad", EVERY, "ours"),
        Contestant(
            "by_torch",
            "(pergrad without compiled kernels)",
            ("norms", "clip"),
            "ours_by_torch",
            prefixes=("W0", "W2", "W3", "W4", "W5", "W6", "W8-clip-resnet"),
            peer=False,
        ),
        Contestant("floor", "(the floor: no products)", ("norms",), "floor", computes=False),
        Contestant(
            "loop",
            "a backward pass for each example",
            ("norms", "gram", "direction", "clip"),
            "loop",
            linear=True,
        ),
        Contestant("vmap", "`torch.func`: `vmap(grad)`", EVERY, "functorch"),
        Contestant("jvp", "`torch.func.jvp`, forward mode", ("direction",), "forward_mode"),
        Contestant(
            "opacus",
            "Opacus, ghost clipping",
            ("norms", "clip", "lengths"),
            "ghost",
            extra="opacus",
        ),
        Contestant("backpack", "BackPACK, `BatchL2Grad`", ("norms",), "batch_l2", extra="backpack"),
        Contestant("hooks", "by hand: module hooks", ("norms",), "by_hand_hooks", prefixes=("W1",)),
        Contestant(
            "function",
            "by hand: `autograd.Function` without weight gradients",
            ("norms",),
            "by_hand_function",
            prefixes=("W1",),
        ),
        Contestant("torchjd", "TorchJD, autogram", ("gram",), "autogram", extra="torchjd"),
        Contestant(
            "dattri",
            "dattri, TracIn without projection",
            ("gram", "cross"),
            "tracin",
            extra="dattri",
        ),
    )
}
