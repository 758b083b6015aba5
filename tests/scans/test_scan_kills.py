"""A scan that is killed with SIGKILL at any moment goes on to the same numbers, each once."""

import subprocess
import sys
from pathlib import Path

from scanning import environment

import pergrad

KILLS = 25


def test_killed_at_random_moments(tmp_path: Path) -> None:
    script = Path(__file__).with_name("scan_kills.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(KILLS)],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{KILLS} kills")
    whole = pergrad.open_scores(tmp_path / "whole")
    assert whole.failures()["index"].to_pylist() == [29]
    for k in range(KILLS):
        scores = pergrad.open_scores(tmp_path / f"killed-{k}")
        table = scores.table()
        assert table["index"].to_pylist() == list(range(40))  # every example once
        assert table.equals(whole.table())  # and the same to the last bit
        assert scores.manifest["finished"]
        assert scores.manifest["counts"] == whole.manifest["counts"]
        assert not list(scores.folder.rglob("*.tmp"))
