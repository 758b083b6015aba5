"""The benchmarks: everyone agrees with the loop at tiny sizes, and the tables are of the results.

Nothing here depends on how long anything takes.
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pergrad

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import against as against_checkouts  # noqa: E402
import child  # noqa: E402
import everything  # noqa: E402
import harness  # noqa: E402
import one_process  # noqa: E402
import plots  # noqa: E402
import printed  # noqa: E402
import private  # noqa: E402
import processes  # noqa: E402
import scaling  # noqa: E402
import slow  # noqa: E402
import tables  # noqa: E402
import targets  # noqa: E402
import training  # noqa: E402
import workloads  # noqa: E402
import worst  # noqa: E402
from contestants import CONTESTANTS, reference  # noqa: E402

# Of every model and task one size is enough; the peers that need a library of their own are
# compared in `make bench`, where they are installed.
LARGER = {"W2-gpt-T512", "W2-gpt-T1024", "W3-tied-T512"}
PAIRS = [
    (w, c)
    for w in workloads.REGISTRY.values()
    for c in CONTESTANTS.values()
    if w.name not in LARGER and c.extra is None and c.runs(w)
]


# torch's own forward mode compiles its formulas by what torch itself deprecates
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("workload", "contestant"), PAIRS, ids=lambda x: x.name)
def test_contestants_agree_with_the_loop(workload: Any, contestant: Any) -> None:
    step = workload.build(True)
    result = contestant.function(workload.task)(step)(step.batch)
    if not contestant.computes:
        assert result is None
        plain = contestant.name == "plain"
        assert all((p.grad is not None) == plain for p in step.params().values())
        return
    want = getattr(reference, workload.task)(step)
    got = child.record_of(workload.task, result)
    assert got is not None
    assert harness.error(got, want) < harness.TOLERANCE


def test_every_contestant_has_a_function_for_each_task() -> None:
    for contestant in CONTESTANTS.values():
        assert set(contestant.tasks) <= set(workloads.TASKS)
        if contestant.extra is None:
            assert all(callable(contestant.function(task)) for task in contestant.tasks)
        assert (ROOT / "benchmarks" / "contestants" / f"{contestant.module}.py").exists()


@pytest.mark.parametrize("task", ["norms", "gram", "cross", "direction", "clip"])
def test_an_error_is_noticed(task: str) -> None:
    """Every form of result is compared: one that is off by a thousandth is found."""
    step = next(w for w in workloads.REGISTRY.values() if w.task == task).build(True)
    want = getattr(reference, task)(step)
    got = child.record_of(task, CONTESTANTS["pergrad"].function(task)(step)(step.batch))
    assert got is not None
    for name in got:
        off = {**got, name: got[name] * 1.001}
        assert harness.error(off, want) > harness.TOLERANCE
        lost = {**got, name: got[name] * float("nan")}
        assert not harness.error(lost, want) <= harness.TOLERANCE


def test_a_part_of_the_examples_is_compared() -> None:
    want = {"rows": torch.tensor([0, 1, 9]), "norms": torch.tensor([1.0, 2.0, 3.0]).double()}
    assert harness.error({"norms": torch.tensor([1.0, 2.0, 5.0, 5.0])}, want) == 0


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "run.py", "--tiny", "--out", folder),
            *("--only", "W1,W9", "--contestants", "pergrad,floor,loop"),
            *("--rounds", "2", "--seconds", "1", "--memory", "1", "--batches", "2"),
        ],
        check=True,
        timeout=600,
    )
    return folder


def test_harness_measures_each_in_its_own_process(measured: Path) -> None:
    record = json.loads((measured / "W1-mlp.json").read_text())
    plain, ours, loop = (record["contestants"][name] for name in ("plain", "pergrad", "loop"))
    assert plain["ratio"]["median"] == 1
    assert plain["memory_ratio"] == 1
    assert min(ours["ratio"]["median"], ours["peak_bytes"][0]) > 0
    assert ours["error"] < harness.TOLERANCE
    assert loop["ratio"]["runs"] >= 1
    assert record["environment"]["torch"]
    assert 0 < record["multiply_adds"]["pergrad"] < record["multiply_adds"]["plain"]
    lengths = json.loads((measured / "W9-lengths.json").read_text())
    assert lengths["contestants"]["pergrad"]["ratio"]["runs"] == 2
    assert lengths["contestants"]["pergrad"]["first_over_again"] > 0


def test_tables_and_plots_of_what_was_measured(measured: Path) -> None:
    records = tables.read(measured)
    assert list(records) == ["W1-mlp", "W9-lengths"]
    records["W1-mlp"]["contestants"]["opacus"] = {
        "title": "Opacus, ghost clipping",
        "failure": "NotImplementedError: a | b < c",
    }
    assert "| **" in tables.summary(records)
    assert "fails" in tables.summary(records)
    page = tables.full(records, None, None)
    assert "NotImplementedError: a \\| b &lt; c" in page
    assert "W9-lengths" in page
    assert re.search(r"### Above the floor(.|\n)*\n\| W1-mlp \| [\d.]+ \| ", page)
    plots.costs(list(records.values()), measured / "costs.svg")
    assert (measured / "costs.svg").stat().st_size > 1000


@pytest.mark.slow
def test_scaling_is_measured_and_drawn(tmp_path: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "scaling.py", "--seconds", "0"),
            *("--largest", "64", "--out", tmp_path),
        ],
        check=True,
        timeout=600,
    )
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert [one["values"][-1] for one in record["series"]] == [64] * 4
    plots.scaling(record, tmp_path / "scaling.svg")
    assert (tmp_path / "scaling.svg").stat().st_size > 1000


def against(*words: Any) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "against.py", *words],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.slow
def test_two_checkouts_are_compared(tmp_path: Path) -> None:
    """Each process imports the checkout that it stands for: one of them is off by a tenth."""
    other = tmp_path / "other"
    shutil.copytree(ROOT / "src", other / "src", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "src" / "pergrad" / "__init__.py").open("a") as file:
        file.write("\nfrom pergrad.api import norms as _exact\n")
        file.write("\ndef norms(*args): return 1.1 * _exact(*args)\n")
    done = against(
        other, ROOT, "--workloads", "W1", "W9", "--tiny", "--minutes", "0", "--pairs", "1",
        "--out", tmp_path / "found.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["workloads"]
    assert [record["workload"] for record in found] == ["W1-mlp", "W9-lengths"]
    for record in found:
        assert record["difference"] == pytest.approx(1 / 11, rel=1e-3)
        assert record["workload"] in done.stdout
        for name in ("ratio", "processor_ratio"):
            assert record[name]["runs"] == 1
            assert record[name]["median"] > 0
        assert record["memory_ratio"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([".", "."], r"there is no .*: name a checkout of pergrad"),
        ([ROOT, ROOT, "--workloads", "W77"], "unknown: W77"),
    ],
)
def test_against_what_is_no_checkout(
    words: list[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = against(*words)
    assert done.returncode == 2
    assert re.search(message, done.stderr)


def test_a_checkout_that_was_not_imported() -> None:
    with pytest.raises(SystemExit, match=r"meant for .*nowhere imported pergrad from"):
        against_checkouts._check_package(pergrad.__file__, Path("/nowhere"))


def test_exponents() -> None:
    xs = [1, 2, 4, 8]
    assert scaling.exponent(xs, [3.0 * x for x in xs]) == pytest.approx(1)
    assert scaling.exponent(xs, [5.0 * x * x for x in xs]) == pytest.approx(2)


def row(ratio: float, peak: int, **more: Any) -> dict[str, Any]:
    spread = {"median": ratio, "quartiles": [ratio, ratio], "runs": 3}
    return {"title": "", "failure": None, "ratio": spread, "peak_bytes": [peak],
            "memory_ratio": peak / 100, **more}  # fmt: skip


def test_bounds_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "read_other", lambda name: None)  # other records have own bounds
    record = {
        "workload": "w",
        "targets": [
            ["time", 0.9, True],
            ["memory", 1.1, False],
            ["vmap slower", 3.0, False],
            ["memory of vmap", 0.25, False],
            ["opacus slower", 1.5, False],
        ],
        "contestants": {
            "plain": row(1.0, 100),
            "pergrad": row(1.0, 120),
            "vmap": row(4.0, 300),
            "loop": row(0.9, 100),
            "opacus": {"title": "", "failure": "NotImplementedError"},
        },
    }
    found = {o.measure: (o.value, o.holds) for o in targets.outcomes(record)}
    assert found == {
        "time": (1.0, False),
        "memory": (1.2, False),
        "vmap slower": (4.0, True),
        "memory of vmap": (pytest.approx(0.1), True),
        "opacus slower": (None, True),
    }
    assert targets.faster(record) == ["loop"]
    assert tables.missed({"w": record}, None, claim=True) == ["w: time 1.00 (0.90)"]
    assert tables.missed({"w": record}, None, claim=False) == ["w: memory 1.20 (1.10)"]


def test_who_fails_says_why() -> None:
    process = processes.Process("no such workload", "plain", tiny=True)
    with pytest.raises(processes.FailedError, match="KeyError: 'no such workload'"):
        process.answer(120)
    with pytest.raises(processes.FailedError, match="KeyError"):
        process.ask("first", seconds=120)


def test_who_takes_too_long_is_stopped() -> None:
    process = processes.Process("W1-mlp", "plain", tiny=True)
    with pytest.raises(processes.FailedError, match="stopped: not done within 0 s"):
        process.answer(0)


def test_the_examples_page_shows_what_was_printed() -> None:
    """README.md has its figures from the same file; see `test_tables_are_those_of_the_results`."""
    page = (ROOT / "docs" / "examples.md").read_text()
    record = json.loads((ROOT / "benchmarks" / "results" / "examples.json").read_text())
    assert record.keys() == printed.FIGURES.keys()
    for name, one in record.items():
        assert printed.printed(name, page) == one["figures"]


def test_no_figure_of_the_first_page_is_written_by_hand() -> None:
    """Numbers outside its generated parts are versions, shapes and settings of the examples."""
    text = (ROOT / "README.md").read_text()
    for start, end in (("<!-- uses", "<!-- end of uses"), ("<!-- costs", "<!-- end of costs")):
        before, rest = text.split(start)
        text = before + rest.split(end)[1]
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    measured = re.findall(r"\d[\d.,]* ?%|\d+\.\d+e[-+]\d+|\d+ times|\d+ of \d+", text)
    assert measured == [re.search(r"\d+ %", tables.front.faster(tables.read()))[0]]


def test_tables_are_those_of_the_results() -> None:
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], check=True, timeout=120
    )


@pytest.mark.slow
def test_training_is_measured(tmp_path: Path) -> None:
    """Equal weights and norms are part of it."""
    arguments = ["--tiny", "--rounds", "2", "--workloads", "W1", "--out", str(tmp_path)]
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "training.py", *arguments], check=True, timeout=300
    )
    (record,) = json.loads((tmp_path / "training.json").read_text())["workloads"]
    assert list(record["ways"]) == ["plain", "reading", "watch", "own pass"]
    assert record["ways"]["plain"]["ratio"]["median"] == 1
    assert all(way["ratio"]["median"] > 0 for way in record["ways"].values())
    assert record["error"] < 1e-5
    assert "W1-mlp" in tables._training({"workloads": [record]})


@pytest.mark.integrations
def test_private_steps_are_measured(tmp_path: Path) -> None:
    """What Opacus gives the optimizer is compared, too."""
    arguments = ["--tiny", "--rounds", "2", "--workloads", "W1", "--out", str(tmp_path)]
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "private.py", *arguments], check=True, timeout=300
    )
    (record,) = json.loads((tmp_path / "private.json").read_text())["workloads"]
    assert list(record["ways"]) == ["plain", "pergrad", "opacus"]
    assert record["of_opacus"]["median"] > 0
    assert record["error"] < 1e-3
    assert "Opacus" in tables._private({"workloads": [record]})


def test_private_steps_that_differ_end_the_measurement() -> None:
    class Worker:
        def __init__(self, value: float) -> None:
            self.value = value

        def ask(self, do: str, *, seconds: float, save: str) -> None:
            torch.save(torch.tensor([1.0, self.value]), save)

    workers = {"pergrad": Worker(1.0), "opacus": Worker(1.1)}
    with pytest.raises(SystemExit, match="clipped means differ"):
        private._check("W1", workers)


def test_other_weights_and_norms_end_the_measurement() -> None:
    answer = {"weights": "a", "norms": [1.0, 2.0], "failures": []}
    others = {
        "not those of the plain step": {"weights": "b"},
        "norms differ": {"norms": [1.0, 2.1]},
        "no room": {"failures": ["no room"]},
    }
    for match, other in others.items():
        first = {"plain": answer, "own pass": answer, "reading": answer | other}
        with pytest.raises(SystemExit, match=match):
            training._check("W1", first)


@pytest.mark.slow
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


def test_parts_are_measured(tmp_path: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "parts.py", "--out", tmp_path),
            *("--parts", "12", "--rounds", "2", "--folder", tmp_path),
        ],
        check=True,
        timeout=300,
    )
    record = json.loads((tmp_path / "parts.json").read_text())
    assert record["parts"] == 12
    assert record["examples"] == 12 * 16
    assert record["open_seconds"]["median"] > 0
    text = tables._parts({**record, "parts": 3000})
    assert "3,000 parts" in text
    assert "(claim: 5)" in text


@pytest.mark.slow
def test_what_is_for_a_gpu_runs_without_one(tmp_path: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, "-W", "ignore", ROOT / "benchmarks" / "gpu.py"),
            *("--device", "cpu", "--tiny", "--rounds", "2", "--out", tmp_path),
        ],
        check=True,
        stdout=subprocess.PIPE,
    )
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert len(found["workloads"]) == 8
    for name, rows in found["workloads"].items():
        # the loop rounds each gradient to half precision, pergrad does not
        assert rows["pergrad"]["error"] < (5e-3 if name.endswith("bf16") else 1e-5)
        assert rows["pergrad"]["ratio"] > 0


@pytest.mark.slow
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


def test_slow_kinds_agree_with_the_loop(tmp_path: Path) -> None:
    """Each in small; what is not the loop's is no record."""
    command = [sys.executable, ROOT / "benchmarks" / "worst.py", "--tiny", "--rounds", "2"]
    subprocess.run([*command, "--out", tmp_path], check=True, timeout=300)
    record = json.loads((tmp_path / "worst.json").read_text())
    assert list(record["kinds"]) == list(slow.KINDS)
    for name, found in record["kinds"].items():
        assert found["plain_steps"]["runs"] == 2, name
        assert min(found["plain_steps"]["median"], found["loops"]["median"]) > 0, name
        assert f"| {found['title']} | {found['losses']} |" in tables._worst(record)
    wrong = slow.Kind("wrong", lambda tiny: _never_the_same(), {"on_mixing": "exact"})
    with pytest.raises(SystemExit, match="wrong: error"):
        worst.measured(wrong, 1, tiny=True)


def test_everything_is_measured_or_named(tmp_path: Path) -> None:
    """A model of an architecture's list, one that mixes and one that takes few examples."""
    names = ["lora-by-hand", "zoo-clip_one_direction", "zoo-losses_by_segment"]
    command = [sys.executable, ROOT / "benchmarks" / "everything.py", "--rounds", "2", "--only"]
    subprocess.run([*command, *names, "--out", tmp_path], check=True, timeout=300)
    record = json.loads((tmp_path / "everything.json").read_text())
    assert list(record["models"]) == names
    assert not record["failures"]
    mixes = [found["mixes"] for found in record["models"].values()]
    assert mixes == [False, True, False]
    page = tables._everything(record)
    for name, found in record["models"].items():
        assert found["plain_steps"]["runs"] == 2
        assert found["price"] > 0
        assert f"| `{name}` | {found['losses']} |" in page
    with pytest.raises(ValueError, match="error"):
        everything.measured(lambda: _unlike_itself(), 1)


def _unlike_itself() -> tuple[Any, dict[str, torch.Tensor]]:
    """Losses that are others at each call."""
    w, calls = torch.ones(3, requires_grad=True), iter(range(1, 100))
    return (lambda: (w * next(calls)).view(3)), {"w": w}


def test_one_process_has_pergrad_and_the_plain_step(tmp_path: Path) -> None:
    """Each in small, with a backend that takes no minute; what is not the loop's is no record."""
    command = [sys.executable, ROOT / "benchmarks" / "one_process.py", "--tiny", "--rounds", "2"]
    some = ["small", "small-step", "direction-mlp-step", "clip-mlp-step", "compiled-gpt"]
    options = ["--backend", "aot_eager", "--out", tmp_path]
    subprocess.run([*command, *options, "--only", *some[:2]], check=True, timeout=300)
    subprocess.run([*command, *options, "--add", "--only", *some[2:]], check=True, timeout=300)
    record = json.loads((tmp_path / "one_process.json").read_text())
    assert list(record["cases"]) == some
    for found in record["cases"].values():
        assert found["share"]["runs"] == 2
        assert found["share"]["median"] > 0
        assert f"| {found['title']} | " in tables._one_process(record)
    wrong = one_process.CASES["small"]
    with pytest.raises(SystemExit, match=r"4-32-2, B=32: error"):
        one_process.measured(replace(wrong, build=_other_each_time), 1, tiny=True)


def _other_each_time(tiny: bool) -> Any:
    """A model whose loss is another one at each call."""
    step = one_process.CASES["small"].build(tiny)
    return replace(step, loss=lambda call, x, y: call(x + torch.randn_like(x)).sum(1))


def _never_the_same() -> Any:
    """Losses that are others at every call: no norms agree."""
    w, calls = torch.nn.Parameter(torch.ones(3)), iter(range(1, 100))
    return lambda: next(calls) * torch.ones(4, 3) @ w, [w]
