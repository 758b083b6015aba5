"""The list of architectures, and what each has to provide.

Owns: `Architecture`, `Problem`, and the decorator that enters a builder into the list.
Does not know: any particular model, nor how results are compared.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# torchvision and timm may live in a folder of their own: where the installed torch is a CPU build
# and torchvision a CUDA build, transformers fails to import as long as it sees torchvision.
VISION = "PERGRAD_ZOO_VISION"


@dataclass(frozen=True)
class Problem:
    """A model with data, ready to compute losses."""

    params: nn.Module | Mapping[str, Tensor]
    losses: Callable[[int], Tensor]  # number of the batch (0, 1, ...) -> (B,), with its graph


@dataclass(frozen=True)
class Architecture:
    """One entry of the list."""

    name: str
    family: str
    build: Callable[[], Problem]
    needs: tuple[str, ...] = ()  # modules that have to be installed
    quick: bool = False  # small enough for every run of the tests
    dtype: torch.dtype = torch.float64
    batches: int = 2
    mixes: bool = False  # examples interact: refused by default, exact on request
    recurrent: bool = False  # a fused recurrent layer may take the fallback

    @property
    def tolerance(self) -> float:
        """Largest error accepted, relative to the norm of the example's gradient."""
        return 1e-6 if self.dtype == torch.float64 else 1e-3

    def available(self) -> bool:
        """Whether what it needs is installed."""
        with vision_on_path(self.needs):
            return all(importlib.util.find_spec(name) is not None for name in self.needs)

    def problem(self) -> Problem:
        """Build it, with the same random numbers every time."""
        torch.manual_seed(0)
        with vision_on_path(self.needs):
            return self.build()


ARCHITECTURES: dict[str, Architecture] = {}


def architecture(
    name: str, family: str, **how: object
) -> Callable[[Callable[[], Problem]], Callable[[], Problem]]:
    """Enter a builder into the list under a name."""

    def add(build: Callable[[], Problem]) -> Callable[[], Problem]:
        assert name not in ARCHITECTURES, name
        ARCHITECTURES[name] = Architecture(name, family, build, **how)  # type: ignore[arg-type]
        return build

    return add


@contextmanager
def vision_on_path(needs: tuple[str, ...]) -> Iterator[None]:
    """Make the folder named by the environment variable importable, if torchvision is needed."""
    folder = os.environ.get(VISION)
    if folder is None or not {"timm", "torchvision"} & set(needs):
        yield
        return
    sys.path.insert(0, folder)
    try:
        _declare_operators()
        yield
    finally:
        sys.path.remove(folder)


_LIBRARIES: list[torch.library.Library] = []


def _declare_operators() -> None:
    """torchvision expects two compiled operators on import, which its CUDA build cannot load."""
    if _LIBRARIES:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
    _LIBRARIES.append(library)


def alive(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """Move every parameter and running statistic off its initial value.

    Layer scales of 1e-6, gates and last layers of zeros leave most gradients zero at first, and a
    comparison of zeros proves nothing.
    """
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=scale)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(torch.randn_like(buffer), alpha=scale)
            elif name.endswith("running_var"):
                buffer.mul_(1 + scale * torch.rand_like(buffer))
    return model
