"""The ops and modules that torch keeps sample inputs for: exact, or refused with a reason."""

import pytest
import torch
from databases.judge import judge
from databases.samples import models, names

EXPECTTEST = "torch's own sample inputs need the package expecttest: pip install expecttest"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_all_samples(dtype: torch.dtype) -> None:
    """As `python -m tests.whole.databases`, which is faster and survives a crash."""
    failed = []
    for name in names():
        for model in models(name, dtype, 2):
            verdict = judge(model)
            if verdict is not None and verdict.kind in ("wrong", "raw"):
                failed.append(verdict)
    assert not failed
