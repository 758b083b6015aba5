"""All cases through one library, a line of JSON for each. Run by `benchmarks/correctness.py`."""

import contextlib
import copy
import io
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comparison.cases import CASES, build
from comparison.libraries import LIBRARIES

RIGHT = 1e-3  # of the norm; all is computed in float32


def looped(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Squared norms (B,) of each parameter's gradients, one backward pass for each example."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    squares: dict[str, list[Tensor]] = {name: [] for name in named}
    for b in range(len(x)):
        loss = F.cross_entropy(model(x[b : b + 1]), y[b : b + 1])
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, g in zip(named, found, strict=True):
            g = torch.zeros(1) if g is None else g
            squares[name].append((g.to_dense() if g.is_sparse else g).square().sum())
    return {name: torch.stack(rows) for name, rows in squares.items()}


def outcome(library: str, name: str) -> dict[str, object]:
    """What a library makes of a case: right, part, wrong or refused."""
    model, x, y = build(name)
    reference = looped(copy.deepcopy(model), x, y)
    said = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stdout(said),
    ):
        warnings.simplefilter("always")
        try:
            norms, covered = LIBRARIES[library](model, x, y, Path(folder))
        except Exception as error:
            return {"kind": "refused", "error": type(error).__name__, "message": str(error)[:300]}
    notes = sorted({str(w.message)[:200] for w in warned})
    kept = {n: s for n, s in reference.items() if covered is None or n in covered}
    if norms.shape != (len(x),) or not kept:
        return {"kind": "refused", "error": "Nothing", "message": f"norms of shape {norms.shape}"}

    def ratios(parts: dict[str, Tensor]) -> Tensor:
        return norms.detach().double() / torch.stack(list(parts.values())).sum(0).sqrt().double()

    whole, part = ratios(reference), ratios(kept)
    result = {
        "least": float(whole.min()), "most": float(whole.max()), "of": len(reference),
        "covered": len(kept), "warnings": notes,
    }  # fmt: skip
    if bool(((whole - 1).abs() <= RIGHT).all()):
        return {"kind": "right", **result}
    if len(kept) < len(reference) and bool(((part - 1).abs() <= RIGHT).all()):
        return {"kind": "part", **result}
    return {"kind": "wrong", **result}


def main() -> None:
    library = sys.argv[1]
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    for name in CASES:
        print(json.dumps({"library": library, "case": name, **outcome(library, name)}), flush=True)


if __name__ == "__main__":
    main()
