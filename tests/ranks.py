"""Ranks of a test: processes forked from one in which torch is imported already.

Importing it takes longer than most of what two ranks are asked for. That process runs nothing
else, so nothing of a test is in a rank that it did not send there.
"""

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

_IMPORTED = ["pytest", "torch", "torch.distributed.fsdp", "pergrad", "pergrad.api"]


def on_ranks(work: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """Call work(rank, *arguments) in a process of its own for each rank; what one raises is raised.

    Environment variables are those at the first call: send what a rank has to know.
    """
    multiprocessing.set_forkserver_preload(_IMPORTED)
    mp.start_processes(work, arguments, nprocs=count, start_method="forkserver")


def free_port() -> int:
    """A port at which ranks can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port
