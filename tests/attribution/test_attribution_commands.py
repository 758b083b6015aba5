"""`pergrad curvature`, `influence`, `evaluate` and `top` of influences, against the library."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import pergrad
from pergrad.command import main

ROOT = Path(__file__).parents[2]

JOB = """
import os, sys, time, torch, pergrad
from pathlib import Path
from pergrad.attribution import curvature, ranking, shards

class Data:
    def __init__(self, waits=False):
        self.waits = waits
    def __len__(self):
        return 24
    def __getitem__(self, i):
        if i == 17 and self.waits:
            Path(os.environ["WAIT"]).touch()    # says that it waits
            time.sleep(600)                     # until the signal comes
        generator = torch.Generator().manual_seed(i)
        return torch.randn(3, generator=generator), i % 2

def losses(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

def job():
    waits = bool(os.environ.get("WAIT")) and "evaluate" not in sys.argv
    if waits:                                   # keep what is done after every batch
        curvature.SECONDS_BETWEEN_STATES = ranking.SECONDS_BETWEEN_FILES = 0
        shards.SECONDS_BETWEEN_FILES = 0
    torch.manual_seed(0)
    return pergrad.Job(torch.nn.Linear(3, 2), Data(waits), losses, outputs=lambda m, b: m(b[0]))

def test(job):
    return [job.data[i] for i in range(3)]

def margin(job):
    def margins(model, batch):
        out = model(batch[0])
        return out[:, 0] - out[:, 1]
    return pergrad.Job(job.model, test(job), margins)

def nothing(job):
    pass

CALLED = []

def train(indices, seed):
    CALLED.append(indices)
    if len(CALLED) == 9 and os.environ.get("WAIT"):
        Path(os.environ["WAIT"]).touch()
        time.sleep(600)
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    x, y = torch.utils.data.default_collate([Data()[i] for i in indices])
    with torch.no_grad():
        model.weight.copy_(torch.stack([(x * (y == k)[:, None]).mean(0) for k in range(2)]))
    return model
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def search_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in (getattr(module, "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "attributed_job.py"
    path.write_text(JOB)
    return path


@pytest.fixture
def pergrad_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pergrad", *map(str, arguments)])
        code = main()
        return code, *capsys.readouterr()

    return run


def test_from_a_curvature_to_the_strongest(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    job, test, fit = f"{file}:job", f"{file}:test", tmp_path / "a fit"
    code, said, _ = pergrad_("curvature", job, "-o", fit, "--kind", "kfac", "--labels", 2, "--json")
    about = json.loads(said)
    assert (code, about["kind"], about["labels"], about["examples"]) == (0, "kfac", 2, 24)
    assert about["blocks"][0]["parameters"] == ["weight", "bias"]
    code, said, told = pergrad_("curvature", job, "-o", fit, "--kind", "kfac", "--labels", 2)
    assert code == 0
    assert f"pergrad influence {job} --curvature '{fit}'" in said

    out = tmp_path / "found"
    words = ["influence", job, "--queries", test, "-o", out, "--curvature", fit]
    code, said, told = pergrad_(*words, "--refine", 2, "--damping", 0.3, "--json")
    assert code == 0, told
    assert "queries 0 to 2" in told
    assert "refining steps" in told
    about = json.loads(said)
    assert (about["queries"], about["examples"], about["refine"]) == (3, 24, 2)
    assert about["damping"] == 0.3
    assert len(about["residuals"]) == 3
    assert about["sign"] == "the example helps: it lowers the query's loss"

    import attributed_job

    task = attributed_job.job()
    own = pergrad.curvature(task, tmp_path / "own", kind="kfac", labels=2)
    want = pergrad.influence(
        task, attributed_job.test(task), tmp_path / "want", curvature=own, refine=2, damping=0.3
    )
    found = pergrad.Influence(out)
    torch.testing.assert_close(found.scores, want.scores, rtol=1e-5, atol=1e-7)

    code, said, _ = pergrad_("top", out, "--query", 1, "-n", 2, "--json")
    assert code == 0
    assert json.loads(said) == want.top(1, 2).to_pylist() == found.top(1, 2).to_pylist()
    code, said, _ = pergrad_("top", out, "--smallest", "-n", 2, "--json")
    assert json.loads(said) == found.bottom(0, 2).to_pylist()
    code, said, _ = pergrad_("top", out)
    assert re.match(r"rank +index +score", said)


def test_a_measurement_over_checkpoints(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "1.pt")
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "2.pt")
    out = tmp_path / "found"
    points = ["--checkpoint", tmp_path / "1.pt", "--checkpoint", tmp_path / "2.pt"]
    words = ["influence", f"{file}:job", "--queries", f"{file}:margin", *points, "--top", 5]
    code, said, _ = pergrad_(*words, "-o", out, "--rate", 1, "--rate", 0.5, "--cosine", "-q")
    assert code == 0
    assert f"To look at them:\n  pergrad top {out} --query 0" in said
    found = pergrad.Influence(out)
    assert found.sign == "the example raises the measurement"
    assert found.manifest["settings"]["rates"] == [1.0, 0.5]
    assert found.manifest["settings"]["method"] == "cosines"
    code, said, _ = pergrad_("top", out, "--json")  # as many as there are
    assert len(json.loads(said)) == 5


def test_scores_by_layer_and_their_page(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    words = ["influence", f"{file}:job", "--queries", f"{file}:test", "-o", out, "-q"]
    assert pergrad_(*words)[0] == 0
    code, _, told = pergrad_("report", out, "--by", "layer")
    assert code == 1
    assert 'with groups="layer": it adds them' in " ".join(told.split())
    code, said, told = pergrad_(*words, "--groups", "layer")  # the remedy
    assert code == 0, told
    assert f"pergrad report {out} --by layer" in said
    code, said, _ = pergrad_("report", out, "--by", "layer", "--json")
    assert code == 0
    text = Path(json.loads(said)["report"]).read_text()
    drawn = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    parts = pergrad.Influence(out).by_layer(0).to_pylist()
    index = drawn["queries"][0]["high"][0][0]
    assert {*drawn["layers"]} == {row["layer"] for row in parts}
    shown = drawn["queries"][0]["layers"][str(index)]
    want = {row["layer"]: row["score"] for row in parts if row["index"] == index}
    assert {drawn["layers"][k]: x for k, x in shown} == pytest.approx(want, rel=1e-3)
    assert pergrad_("scan", f"{file}:job", "-o", tmp_path / "scores", "-q")[0] == 0
    code, _, told = pergrad_("report", tmp_path / "scores", "--by", "layer")
    assert code == 1
    assert "Leave out --by" in told
    assert pergrad_("report", tmp_path / "scores")[0] == 0


def test_less_reads_adams_state(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "adam.pt")
    words = ["influence", f"{file}:job", "--queries", f"{file}:test", "-o", tmp_path / "found"]
    code, said, _ = pergrad_(*words, "--adam", tmp_path / "adam.pt", "--json")
    assert (code, json.loads(said)["method"]) == (0, "less")
    (tmp_path / "bad.pt").write_bytes(b"no")
    code, _, told = pergrad_(*words, "--adam", tmp_path / "bad.pt")
    assert code == 1
    assert re.search(r"--adam .*bad.pt cannot be read.*torch.save\(optimizer.state_dict\(\)", told)


def test_a_sketch_is_asked(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    fit, out = tmp_path / "fit", tmp_path / "index"
    assert pergrad_("curvature", f"{file}:job", "-o", fit, "-q")[0] == 0
    words = ["sketch", f"{file}:job", "-o", out, "--curvature", fit, "--size", 6, "--damping", 0.2]
    code, said, told = pergrad_(*words)
    assert code == 0, told
    assert "sketched examples" in told
    assert "Sketch of 24 examples, 6 numbers each" in said
    words += ["--queries", f"{file}:test", "--candidates", 7, "-q"]
    code, said, told = pergrad_(*words, "-n", 9, "--json")
    assert code == 0, told
    found = json.loads(said)
    assert (found["examples"], found["size"], len(found["recall"])) == (24, 6, 3)

    import attributed_job

    task = attributed_job.job()
    own = pergrad.curvature(task, fit).damped(0.2)
    exact = pergrad.influence(
        task, attributed_job.test(task), tmp_path / "f", curvature=own, refine=0, damping=0.2
    )
    for q, rows in enumerate(found["queries"]):
        assert len(rows) == 7
        want = exact.scores[q]
        assert [row["score"] for row in rows] == pytest.approx(
            [float(want[row["index"]]) for row in rows], rel=1e-5
        )
    code, said, _ = pergrad_(*words, "-n", 2, "--smallest")
    assert re.search(r"query 2, expected recall [01]\.\d+\nrank +index +score", said)


def test_evaluate_compares_folders(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    words = ["influence", f"{file}:job", "--queries", f"{file}:test", "-q"]
    assert pergrad_(*words, "-o", tmp_path / "dots")[0] == 0
    assert pergrad_(*words, "-o", tmp_path / "k", "--method", "kernel")[0] == 0
    words = ["evaluate", f"{file}:job", "--queries", f"{file}:test", "--train", f"{file}:train",
             "--out", tmp_path / "retrained", "--subsets", 20, "--seeds", 1]  # fmt: skip
    both = ["--found", tmp_path / "dots", "--found", f"exact={tmp_path / 'k'}"]
    code, said, told = pergrad_(*words, *both, "--json")
    assert code == 0, told
    assert "retrained models" in told
    found = json.loads(said)
    assert set(found["scores"]) == {"dots", "exact", "random", "last layer's neighbours"}
    assert (found["subsets"], found["queries"], found["ceiling"]) == (20, 3, None)
    assert found["scores"]["exact"].keys() == {"lds", "low", "high"}
    assert found["best"] in found["scores"]
    code, said, _ = pergrad_(*words, *both)
    assert code == 0
    assert "20 subsets with a share of 0.5" in said
    code, _, told = pergrad_(*words, "--found", tmp_path / "k", "--found", f"k={tmp_path / 'k'}")
    assert code == 1
    assert re.search(r"Two folders of --found have the name k. Say --found NAME=DIR", told)


ON_RAY = ["--engine", "ray", "--workers", 1]


def test_influences_on_workers_of_ray(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    """The job and the queries are of a file that a worker cannot import."""
    words = ["influence", f"{file}:job", "--queries", f"{file}:margin", "-q", "-o"]
    for out, more in (("ray", ON_RAY), ("one", [])):
        code, _, told = pergrad_(*words, tmp_path / out, *more)
        assert code == 0, told
    one, other = (pergrad.Influence(tmp_path / out).scores for out in ("one", "ray"))
    torch.testing.assert_close(other, one)
    code, _, told = pergrad_("curvature", words[1], "-o", tmp_path / "s", "--address", "10.0.0.1:1")
    assert code == 1
    assert 'address is for engine="ray"' in told


@pytest.mark.slow
def test_what_else_workers_of_ray_do(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    """So is the training."""
    job = f"{file}:job"
    code, _, told = pergrad_("curvature", job, "-o", tmp_path / "fit", "-q", *ON_RAY)
    assert code == 0, told
    words = ["influence", job, "--queries", f"{file}:margin", "--curvature", tmp_path / "fit",
             "--refine", 1, "-q", "-o"]  # fmt: skip
    for out, more in (("ray", ON_RAY), ("one", [])):
        code, _, told = pergrad_(*words, tmp_path / out, *more)
        assert code == 0, told
    one, other = (pergrad.Influence(tmp_path / out).scores for out in ("one", "ray"))
    torch.testing.assert_close(other, one)
    words = ["evaluate", job, "--queries", f"{file}:margin", "--train", f"{file}:train",
             "--found", tmp_path / "one", "--subsets", 20, "--seeds", 1, "--json", "-q",
             "-o"]  # fmt: skip
    said = [pergrad_(*words, tmp_path / f"e{len(more)}", *more)[1] for more in (ON_RAY, [])]
    assert json.loads(said[0])["scores"] == json.loads(said[1])["scores"]


def test_on_the_ranks_of_torchrun(file: Path, tmp_path: Path) -> None:
    """The first one says it for all."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    words = [["curvature", f"{file}:job", "-o", tmp_path / "fit"],
             ["sketch", f"{file}:job", "-o", tmp_path / "s", "--curvature", tmp_path / "fit",
              "--size", 6, "--queries", f"{file}:test"]]  # fmt: skip
    for each in words:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
             "-m", "pergrad", *map(str, each), "--engine", "torchrun", "--json", "-q"],
            env={**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["examples"] == 24


def test_bad_input_is_one_clear_line(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    job, test, out = f"{file}:job", f"{file}:test", tmp_path / "found"
    words = ["influence", job, "-o", out, "--queries"]

    def refused(*arguments: object) -> str:
        code, said, told = pergrad_(*arguments)
        assert (code, said) == (1, "")
        assert told.startswith("error: ")
        first, *more = told.splitlines()
        assert all(line.startswith("More: pergrad help ") for line in more)
        assert len(more) <= 1
        return first

    told = refused(*words, test, "--curvature", tmp_path / "fit")
    assert re.search(r"There is no curvature in .*fit.*pergrad curvature JOB --out .*fit", told)
    assert "lack a `return`" in refused(*words, f"{file}:nothing")
    told = refused(*words, test, "--method", "kernel", "--cosine")
    assert "Leave out one of them" in told
    assert not (out / "manifest.json").exists()
    code, _, told = pergrad_("curvature", job, "-o", tmp_path / "fit", "--labels", "some")
    assert code == 2
    assert "neither all, given nor a whole number" in told
    assert pergrad_(*words, test, "-q")[0] == 0
    assert "Leave out --by" in refused("top", out, "--by", "loss")
    assert pergrad_("scan", job, "-o", tmp_path / "scores", "-q")[0] == 0
    assert "Leave out --query" in refused("top", tmp_path / "scores", "--query", 1)
    told = refused("top", out, "--query", 3)
    assert "pass a number from 0 to 2" in told


# Ctrl-C


def interrupted(mark: Path, *arguments: object) -> tuple[str, list[str]]:
    """Run until the job waits, press Ctrl-C: what was said, and the command that goes on."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(
        [sys.executable, "-m", "pergrad", *map(str, arguments)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**environment, "WAIT": str(mark)},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, told
    assert said == ""
    assert "Traceback" not in told
    match = re.search(r"Interrupted. (.*) To resume, say:\n  python -m pergrad (.*)\n", told)
    assert match is not None, told
    return match[1], shlex.split(match[2])


def test_ctrl_c_of_a_curvature(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "fit"
    words = ["curvature", f"{file}:job", "--batch-size", 4, "--out"]
    kept, again = interrupted(tmp_path / "waits", *words, out)
    assert kept == "16 of 24 examples of the covariances are kept."
    assert pergrad_(*again)[0] == 0
    assert pergrad_(*words, tmp_path / "whole")[0] == 0
    one, other = (next(p.glob("fit-*")).read_bytes() for p in (out, tmp_path / "whole"))
    assert one == other


def test_ctrl_c_of_influences(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    words = ["influence", f"{file}:job", "--queries", f"{file}:test", "--batch-size", 4, "--out"]
    kept, again = interrupted(tmp_path / "waits", *words, out)
    assert kept == f"16 of 24 scores of examples are kept in {out}."
    assert pergrad_(*again)[0] == 0
    assert pergrad_(*words, tmp_path / "whole")[0] == 0
    assert pergrad.Influence(out).scores.equal(pergrad.Influence(tmp_path / "whole").scores)


def test_ctrl_c_of_a_sketch(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    words = ["sketch", f"{file}:job", "--size", 5, "--batch-size", 4, "--out"]
    kept, again = interrupted(tmp_path / "waits", *words, out)
    assert kept == f"16 of 24 examples are sketched and kept in {out}."
    assert pergrad_(*again)[0] == 0
    assert len(list(out.glob("rows-*"))) == 5


def test_ctrl_c_of_an_evaluation(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    asked = [f"{file}:job", "--queries", f"{file}:test"]
    assert pergrad_("influence", *asked, "-o", tmp_path / "found", "-q")[0] == 0
    words = ["evaluate", *asked, "--train", f"{file}:train", "--found", tmp_path / "found",
             "--subsets", 20, "--seeds", 1, "--out"]  # fmt: skip
    kept, again = interrupted(tmp_path / "waits", *words, tmp_path / "one")
    assert kept == "8 of 20 retrained models are measured and kept."
    results = [pergrad_(*each, "--json")[1] for each in (again, [*words, tmp_path / "two"])]
    assert json.loads(results[0])["scores"] == json.loads(results[1])["scores"]


@pytest.mark.parametrize("kind", ["evaluation", "curvature", "sketch"])
def test_folders_without_a_report(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": f"pergrad {kind}"}))
    monkeypatch.setattr("sys.argv", ["pergrad", "report", str(tmp_path)])
    assert main() == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"has a {kind}, of which there is no report: " in said
