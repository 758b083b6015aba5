"""The benchmarks run, and the tables are those of the committed results."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_harness_measures_a_workload(tmp_path: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "norms.py", "mlp", "--only", "norms"),
            *("--rounds", "2", "--memory", "1", "--out", tmp_path),
        ],
        check=True,
        timeout=300,
    )
    record = json.loads((tmp_path / "mlp.json").read_text())
    plain, norms = (record["contestants"][name] for name in ("plain", "norms"))
    assert plain["ratio"]["median"] == 1
    assert norms["ratio"]["median"] > 0
    assert norms["peak_bytes"][0] > 0
    assert norms["error"] < 1e-4
    assert record["environment"]["torch"]


def test_tables_are_those_of_the_results() -> None:
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], check=True, timeout=120
    )


def test_scan_is_measured(tmp_path: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "scan.py", "--out", tmp_path),
            *("--examples", "12000", "--share", "1100", "--rounds", "1"),
        ],
        check=True,
        timeout=300,
    )
    record = json.loads((tmp_path / "scan.json").read_text())
    assert record["compared"]["processor_ratio"]["median"] > 0
    assert 0 < record["whole"]["bytes_per_example"] < record["claims"]["bytes_per_example"]
    assert set(record["whole"]["memory_bytes"]) == {"10 %", "100 %"}


def test_report_is_measured(tmp_path: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "report.py", "--out", tmp_path),
            *("--large", "30000", "--repeats", "1"),
        ],
        check=True,
        timeout=300,
    )
    pages = json.loads((tmp_path / "report.json").read_text())["pages"]
    assert [page["examples"] for page in pages] == [1_797, 30_000]
    for page in pages:
        assert 0 < page["bytes"] < page["claim_bytes"]
        assert page["opening_seconds"]["median"] > 0
