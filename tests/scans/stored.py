"""The job behind the folders in tests/data/stores, and how those were made. No test.

Written by pergrad 0.1.0 before its files were moved, with `python stored.py FOLDER`. Numbers
come from integers, not from a generator or a function, so that they are the same to the last bit
everywhere.
"""

import pickle
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pergrad

COUNT, BROKEN, STOP = 12, 5, 8
SETTINGS: dict[str, Any] = {"batch_size": 4, "groups": "layer", "progress": False}


def numbers(*shape: int, start: int = 0) -> Tensor:
    steps = torch.arange(start, start + torch.Size(shape).numel())
    return ((steps * 37 % 23 - 11).double() / 8).reshape(shape)


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for n, p in enumerate(net.parameters()):
            p.copy_(numbers(*p.shape, start=5 * n))
    return net


class Data:
    """Examples by number; one is broken, and from another one on whoever asks is interrupted."""

    def __init__(self, stop: int = COUNT) -> None:
        self.stop = stop

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i >= self.stop:
            raise KeyboardInterrupt
        if i == BROKEN:
            raise ValueError("cannot read 5.png")
        return numbers(3, start=3 * i), i % 2


def losses(net: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(net(x), y, reduction="none")


def key(i: int) -> str:
    return f"example {i}"


def show(i: int) -> Any:
    return f"text {i}" if i % 2 else {"text": f"text {i}", "label": str(i % 2), "size": i}


def job(stop: int = COUNT) -> pergrad.Job:
    return pergrad.Job(model(), Data(stop), losses, key=key, show=show)


def validation() -> list[tuple[Tensor, int]]:
    return [(numbers(3, start=100 + 5 * i), i % 2) for i in range(3)]


def matrix() -> pergrad.GradientMatrix:
    net, items = model(), validation()
    x, y = torch.stack([x for x, _ in items[:2]]), torch.tensor([y for _, y in items[:2]])
    return pergrad.gradients(losses(net, (x, y)), net)


def against() -> dict[str, Any]:
    return {
        "valid": pergrad.MeanGradient(validation()),
        "few": matrix(),
        "flat": numbers(26, start=7),
    }


def main(folder: Path) -> None:
    made = {"source": "stored.py:job", "command": "python stored.py", **SETTINGS}
    pergrad.scan(job(), folder / "finished", against=against(), **made)
    with suppress(KeyboardInterrupt):
        pergrad.scan(job(STOP), folder / "half", against=against(), **made)
    (folder / "matrix.pickle").write_bytes(pickle.dumps(matrix().detach()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
