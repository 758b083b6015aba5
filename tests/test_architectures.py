"""Real architectures against the loop: the small ones always, all that are installed if slow."""

import pytest
from architectures.compare import Result, compare
from architectures.models import ARCHITECTURES
from architectures.processes import in_a_process
from architectures.registry import Architecture

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
    if not case.available():
        pytest.skip(f"needs {', '.join(case.needs)}")
    agrees(case, in_a_process(case.name, timeout=600))


def test_every_refusal_names_a_module() -> None:
    """The message leads the user to the layer at fault."""
    result = compare(ARCHITECTURES["resnet-batch-norm-training"])
    assert "batch_norm" in result.refused
    assert "module `0.1`" in result.refused or "module `1.1`" in result.refused
