"""Whether a run that begins at the first step again is the one that its folder has.

Owns: what counts as another run: other examples, or other losses or norms of the same ones.
Does not know: the folder, where a step comes from.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pergrad.scans.text import printable
from pergrad.training.step_numbers import Piece

SAME = 0.05  # of a number: half precision, other kernels, another machine
NOISE = 0.01  # of the mean: what is nearly 0 is so by rounding


def difference(rows: Mapping[str, Sequence[Any]], now: Piece) -> str | None:
    """In words, in what a step is another than the stored rows of it; None if it is the same."""
    keys: Sequence[str | None] = [None] * len(now.norm) if now.keys is None else now.keys
    if len(rows["key"]) != len(keys):
        return f"it had {len(rows['key'])} examples and has {len(keys)}"
    for i, (was, key) in enumerate(zip(rows["key"], keys, strict=True)):
        if None not in (was, key) and was != key:
            return f"its row {i} was the example {_short(was)} and is {_short(key)}"
    for name, found in (("loss", now.loss), ("norm", now.norm)):
        before = torch.tensor(rows[name], dtype=torch.float64)
        if (at := _first_other(before, found)) is not None:
            of = "" if keys[at] is None else f", the example {_short(keys[at])},"
            return f"the {name} of its row {at}{of} was {before[at]:.4g} and is {found[at]:.4g}"
    return None


def _short(key: object) -> str:
    return printable(key)[:40]


def _first_other(before: Tensor, now: Tensor) -> int | None:
    """The first number that is another; what is not a number says nothing."""
    size = torch.maximum(before.abs(), now.abs())
    known = size.isfinite()
    if not known.any():
        return None
    far = known & ((before - now).abs() > SAME * size + NOISE * size[known].mean())
    return int(far.nonzero()[0]) if far.any() else None
