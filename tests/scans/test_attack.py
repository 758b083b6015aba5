"""The attacks on scans: a few of each kind, and the page that says what came of all of them."""

import json
import subprocess
import sys
from pathlib import Path

import attack
import pyarrow as pa
import pytest
from scanning import environment


@pytest.mark.slow  # as `make attack`, in small
def test_a_few_of_each_kind() -> None:
    script = Path(__file__).with_name("attack.py")
    done = subprocess.run(
        [sys.executable, str(script), "--every", "70"],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(attack.ATTACKS)
    for line in lines:
        assert attack.Tally(**json.loads(line.partition(":")[2])).attacks >= 2


def test_what_goes_wrong_is_counted() -> None:
    """The judges see other numbers, and a row that is there twice or not at all."""
    whole = pa.table({"index": [0, 1], "loss": [1.0, None], "norm": [2.0, 3.0]})
    near = whole.set_column(2, "norm", pa.array([2.0 + 4e-16, 3.0]))
    assert attack.differing(near, whole) == []
    far = whole.set_column(2, "norm", pa.array([2.0 + 1e-9, 3.0]))
    other = far.set_column(1, "loss", pa.array([1.0, 1.0]))
    assert attack.differing(other, whole) == ["loss", "norm"]
    for bad in ("lost", "doubled", "wrong", "raw", "hung"):
        assert not attack.Tally(**{bad: 1}).good
    assert attack.Tally(attacks=3, refused=2).good


def test_the_page_has_the_result() -> None:
    found = json.loads(attack.RESULT.read_text())["attacks"]
    assert list(found) == list(attack.ATTACKS)
    assert all(attack.Tally(**tally).good for tally in found.values())
    assert attack.table(found) in attack.PAGE.read_text()
