"""Real architectures against the loop: the small ones always, all that are installed if slow."""

from collections.abc import Mapping

import pytest
import torch
from architectures import compare as module
from architectures.compare import Result, compare
from architectures.models import ARCHITECTURES
from architectures.processes import in_a_process
from architectures.registry import Architecture, Problem
from architectures.table import page
from torch import Tensor

QUICK = [case for case in ARCHITECTURES.values() if case.quick]
SLOW = [case for case in ARCHITECTURES.values() if not case.quick]


def agrees(case: Architecture, result: Result) -> None:
    assert not result.error
    assert not result.missing
    assert result.worst <= result.tolerance, result
    assert bool(result.refused) == case.mixes
    if not case.recurrent and not case.mixes:
        assert result.by_rule >= 0.95, result.fallback_ops


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_small_architecture(case: Architecture) -> None:
    agrees(case, compare(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda case: case.name)
def test_architecture(case: Architecture) -> None:
    assert case.available(), f"needs {', '.join(case.needs)}: `make zoo` installs them"
    agrees(case, in_a_process(case.name, timeout=600))


# torch's own while it compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_under_torch_compile() -> None:
    """By rule; by the fallback, which says why; and what torch itself does not compile."""
    try:
        exact = compare(ARCHITECTURES["two-towers"], "aot_eager")
        agrees(ARCHITECTURES["two-towers"], exact)
        assert exact.regions == 1
        part = compare(ARCHITECTURES["graph-network"], "aot_eager")
        assert part.ok
        assert "index_select" in part.left[0]
        own = compare(ARCHITECTURES["energy-and-forces"], "aot_eager")
        assert "double backward" in own.not_compiled
    finally:
        torch.compiler.reset()
    text = page([exact, part, own], "# Architectures\n\nas it was\n")
    assert text.startswith("# Architectures\n\nas it was\n\n## Compiled\n")
    assert "2 of 3 architectures are compiled" in text
    assert "0 wrong, 0 parameters missing, 1 of 2 lines with at least 95 %" in text
    assert page([compare(ARCHITECTURES["lora-by-hand"])], text).count("## Compiled") == 1


def test_every_refusal_names_a_module() -> None:
    """The message leads the user to the layer at fault."""
    result = compare(ARCHITECTURES["resnet-batch-norm-training"])
    assert "batch_norm" in result.refused
    assert "module `0.1`" in result.refused or "module `1.1`" in result.refused


def test_the_comparison_sees_a_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of one small parameter that is off, and one that is missing."""
    case = ARCHITECTURES["lora-by-hand"]
    honest = module.loop

    def wrong(losses: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = honest(losses, params)
        rows["1.up"] = rows["1.up"] * (1 + 1e-4)
        return rows

    monkeypatch.setattr(module, "loop", wrong)
    result = compare(case)
    assert not result.ok
    assert min(result.norms, result.gram, result.gradients, result.by_parameter) > 1e-6

    def more(losses: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = honest(losses, {n: p for n, p in params.items() if n != "unused"})
        return rows | {"unused": torch.full((len(losses), 1), 1e-9)}

    problem = case.problem()
    params = dict(module.named(problem.params)) | {"unused": torch.zeros(1, requires_grad=True)}
    monkeypatch.setattr(module, "loop", more)
    monkeypatch.setattr(Architecture, "problem", lambda self: Problem(params, problem.losses))
    result = compare(case)
    assert result.missing == ["unused"]
    assert not result.ok
