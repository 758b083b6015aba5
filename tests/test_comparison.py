"""The comparison with other libraries: its page is that of its results, pergrad right in all rows.

The others are installed and run by `python benchmarks/correctness.py` alone.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from comparison.cases import CASES  # noqa: E402
from comparison.child import outcome  # noqa: E402


def test_the_page_is_that_of_the_results() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "correctness.py", "--check"]
    subprocess.run(command, check=True, timeout=60)


def test_results_have_every_case_and_pergrad_is_right() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "correctness.json").read_text())
    kinds = {c["case"]: c["kind"] for c in results["cells"] if c["library"] == "pergrad"}
    assert kinds == dict.fromkeys(CASES, "right")


@pytest.mark.parametrize("name", [name for name in CASES if name != "GPT-2's Conv1D"])
def test_right(name: str) -> None:
    """Without the one for which transformers has to be there."""
    found = outcome("pergrad", name)
    assert found["kind"] == "right", found


def test_another_number_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from comparison import child

    monkeypatch.setitem(child.LIBRARIES, "half", _half)
    assert outcome("half", "linear")["kind"] == "wrong"


def _half(*arguments: object) -> tuple:
    from comparison.libraries import pergrad

    norms, covered = pergrad(*arguments)
    return norms / 2, covered
