"""The command line: finding jobs, each command, what is printed where, exit codes, Ctrl-C."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import pergrad
from pergrad import extras
from pergrad.command import jobs, main
from pergrad.errors import UsageError
from pergrad.kernels import why_not

ROOT = Path(__file__).parents[2]

JOB = """
import torch, pergrad

class Data:
    def __init__(self, bad=()):
        self.bad = bad
    def __len__(self):
        return 40
    def __getitem__(self, i):
        if i in self.bad:
            raise ValueError(f"cannot read file {i}.png")
        generator = torch.Generator().manual_seed(i)
        return torch.randn(3, generator=generator), i % 2

def losses(model, batch):
    x, y = batch
    return torch.nn.functional.cross_entropy(model(x), y, reduction="none")

def job():
    torch.manual_seed(0)
    return pergrad.Job(torch.nn.Linear(3, 2), Data(), losses)

def bad():
    torch.manual_seed(0)
    return pergrad.Job(torch.nn.Linear(3, 2), Data(bad=(7, 31)), losses)

def valid(job):
    return pergrad.MeanGradient(torch.utils.data.Subset(job.data, range(4)))

def several(job):
    return {"a": valid(job), "b": valid(job)}

def nothing():
    pass

def number():
    return 3

def raising():
    return helper(None)

def helper(x):
    return x.shape

def torch_raising():
    return torch.zeros(2) @ torch.zeros(3)

def asking(size):
    return size

async_value = 3
"""


@pytest.fixture(autouse=True)
def search_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Loading a job adds to the search path and the modules of this process; not for others."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in (getattr(module, "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_job.py"
    path.write_text(JOB)
    return path


# Finding what JOB names


def test_a_file_is_run_and_its_function_called(file: Path) -> None:
    assert len(jobs.job(f"{file}:job").data) == 40


def test_a_file_is_run_as_it_is_now(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Python would take bytecode for it, of a file of equal size and the same second."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for n, count in enumerate((40, 41)):
        file.write_text(JOB.replace("return 40", f"return {count}"))
        os.utime(file, ns=(n, n))
        assert len(jobs.job(f"{file}:job").data) == count


def test_a_module_is_looked_for_in_the_current_folder(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = file.parent / "my_package"
    package.mkdir()
    file.rename(package / "jobs.py")
    monkeypatch.chdir(package.parent)
    assert len(jobs.job("my_package.jobs:job").data) == 40


def test_a_file_may_import_its_neighbours(file: Path) -> None:
    (file.parent / "other.py").write_text("from my_job import job\n")
    assert len(jobs.job(f"{file.parent / 'other.py'}:job").data) == 40


def test_a_file_named_as_a_module_of_python_does_not_replace_it(file: Path) -> None:
    path = file.rename(file.with_name("random.py"))
    jobs.job(f"{path}:job")
    import random

    assert hasattr(random, "randint")


def test_a_file_is_run_once(file: Path) -> None:
    file.write_text(f"{JOB}\nprint('ran')")
    out = io.StringIO()
    with redirect_stdout(out):
        jobs.job(f"{file}:job")
        jobs.function(f"{file}:valid")
    assert out.getvalue() == "ran\n"


def test_a_main_block_does_not_run(file: Path) -> None:
    file.write_text(f"{JOB}\nif __name__ == '__main__':\n    raise SystemExit('ran')\n")
    jobs.job(f"{file}:job")


@pytest.mark.parametrize("name", ["job.py", "job", ":job", "job.py:", "job.py:a-b", ""])
def test_a_name_of_the_wrong_form_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"does not name a function. Write path/to/file.py:"):
        jobs.job(name)


def test_a_missing_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"There is no file gone.py .*gone.py.*a path is taken"):
        jobs.job("gone.py:job")
    with pytest.raises(UsageError, match=r"There is no file gone/train"):
        jobs.job("gone/train:job")


def test_a_file_that_is_not_python_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(UsageError, match=r"is not a Python file. JOB is path/to/file.py:"):
        jobs.job(f"{path}:job")


def test_a_missing_module_is_refused() -> None:
    with pytest.raises(UsageError, match=r"There is no module nowhere. .*ends in .py"):
        jobs.job("nowhere.at_all:job")
    with pytest.raises(UsageError, match=r"There is no module json.nothing"):
        jobs.job("json.nothing:job")


def test_a_module_that_a_module_lacks_is_told_apart(tmp_path: Path) -> None:
    sys.path.insert(0, str(tmp_path))
    (tmp_path / "needs.py").write_text("import torch\nimport not_installed\n")
    with pytest.raises(
        UsageError, match=r"Importing needs raised ModuleNotFoundError(.|\n)*line 2"
    ):
        jobs.job("needs:job")
    (tmp_path / "breaks.py").write_text("1 / 0\n")
    with pytest.raises(UsageError, match=r"Importing breaks raised ZeroDivisionError"):
        jobs.job("breaks:job")


def test_a_file_that_cannot_be_loaded_is_told_with_the_line(file: Path) -> None:
    file.write_text("x = 1\ny = x +\n")
    with pytest.raises(UsageError, match=r"Loading .* raised (.|\n)*line 2(.|\n)*SyntaxError"):
        jobs.job(f"{file}:job")
    file.write_text("x = 1\nassert x == 2, 'no'\n")
    with pytest.raises(UsageError, match=r"AssertionError: no\n .*my_job.py, line 2, in <module>"):
        jobs.job(f"{file}:job")
    assert "my_job" not in sys.modules


def test_a_missing_function_is_refused_with_those_there_are(file: Path) -> None:
    with pytest.raises(UsageError, match=r"has no function `jop`. Did you mean .*my_job.py:job\?"):
        jobs.job(f"{file}:jop")
    with pytest.raises(UsageError, match=r"Its functions are: losses, job, bad, valid"):
        jobs.job(f"{file}:xyzzyx")
    file.write_text("")
    with pytest.raises(UsageError, match=r"It has no functions at all"):
        jobs.job(f"{file}:job")


def test_what_is_no_function_is_refused(file: Path) -> None:
    with pytest.raises(UsageError, match=r"`async_value` in .* is of type int, not a function."):
        jobs.job(f"{file}:async_value")


def test_a_function_that_returns_no_job_is_refused(file: Path) -> None:
    with pytest.raises(UsageError, match=r"returned int, not a pergrad.Job. Return pergrad.Job\("):
        jobs.job(f"{file}:number")
    with pytest.raises(UsageError, match=r"returned NoneType, not .* lack a `return`\?"):
        jobs.job(f"{file}:nothing")


def test_a_function_that_raises_is_told_with_the_place(file: Path) -> None:
    with pytest.raises(UsageError) as caught:
        jobs.job(f"{file}:raising")
    first, *rest = str(caught.value).splitlines()
    assert re.search(r"my_job.py:raising raised AttributeError: 'NoneType' object has no", first)
    line = JOB.splitlines().index("    return x.shape") + 1
    assert rest == [f"  {file}, line {line}, in helper: return x.shape"]


def test_a_function_that_asks_for_arguments_is_told_so(file: Path) -> None:
    with pytest.raises(UsageError, match=r"TypeError: asking\(\) missing 1 required positional"):
        jobs.job(f"{file}:asking")


# The commands


@pytest.fixture
def pergrad_(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pergrad", *map(str, arguments)])
        code = main()
        return code, *capsys.readouterr()

    return run


Run = Callable[..., tuple[int, str, str]]


def test_scan_scores_and_says_where_to_look(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    code, said, _ = pergrad_("scan", f"{file}:job", "--out", out)
    assert code == 0
    assert "40" in said
    assert f"pergrad top {out}" in said
    assert len(pergrad.open_scores(out).table()) == 40


def test_scan_in_json(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    code, said, _ = pergrad_("scan", f"{file}:job", "-o", out, "--json")
    assert code == 0
    found = json.loads(said)
    assert found["store"] == str(out)
    assert (found["examples"], found["scored"], found["failed"]) == (40, 40, 0)
    assert {"index", "loss", "norm"} <= set(found["columns"])


def test_scan_passes_its_options_on(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "early.pt")
    code, _, _ = pergrad_(
        "scan", f"{file}:job", "-o", out, "--batch-size", 7, "--groups", "parameter", "--device",
        "cpu", "--mode", "as-is", "--against", f"few={file}:valid", "--against", f"{file}:several",
        "--quiet", "--checkpoints", tmp_path / "early.pt", "--checkpoints",
        f"x={tmp_path}/early.pt",
    )  # fmt: skip
    assert code == 0
    columns = set(pergrad.open_scores(out).table().column_names)
    assert {"norm:weight", "norm:bias", "dot:few", "cosine:few", "dot:a", "dot:b"} <= columns
    assert {"loss@early", "norm@x", "loss@mean"} <= columns
    code, _, said = pergrad_(
        "scan", f"{file}:job", "-o", out, "--checkpoints", "a/1.pt", "--checkpoints", "b/1.pt"
    )
    assert code == 1
    assert "Two files of --checkpoints have the name 1. Write --checkpoints NAME=b/1.pt" in said


def test_examples_that_mix_are_refused_unless_paid_for(
    pergrad_: Run, file: Path, tmp_path: Path
) -> None:
    normed = "torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))"
    file.write_text(JOB.replace("torch.nn.Linear(3, 2)", normed))
    train = ["scan", f"{file}:job", "--mode", "train", "-o"]
    code, _, complained = pergrad_(*train, tmp_path / "scores")
    assert code == 1
    assert "on_mixing" in complained
    code, _, _ = pergrad_(*train, tmp_path / "others", "--on-mixing", "exact")
    assert code == 0


def test_failed_examples_have_an_exit_code_of_their_own(
    pergrad_: Run, file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores"
    code, said, _ = pergrad_("scan", f"{file}:bad", "-o", out, "--json")
    assert code == 3
    assert (json.loads(said)["scored"], json.loads(said)["failed"]) == (38, 2)
    code, said, _ = pergrad_("scan", f"{file}:bad", "-o", out)
    assert code == 3
    assert f"pergrad top --failed {out}" in said
    code, said, _ = pergrad_("top", out, "--failed")
    assert code == 0
    assert re.search(r"^ +7 +ValueError: cannot read file 7.png", said, re.MULTILINE)
    code, _, _ = pergrad_("scan", f"{file}:job", "-o", out, "--rescore", "failed")
    assert code == 0
    code, said, _ = pergrad_("top", out, "--failed", "--json")
    assert (code, json.loads(said)) == (0, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan", "{file}:job"], r"--out"),
        (["scan"], r"Missing argument 'JOB'"),
        (["scan", "{file}:job", "-o", "{out}", "--batch-size", "0"], r"0 is neither auto nor"),
        (["scan", "{file}:job", "-o", "{out}", "--batch-size", "few"], r"few is neither auto nor"),
        (["scan", "{file}:job", "-o", "{out}", "--engine", "spark"], r"'spark' is not one of"),
        (["top", "{out}", "-n", "0"], r"Invalid value for '--count'"),
        (["look"], r"No such command 'look'"),
    ],
)
def test_a_wrong_command_line_is_2(
    pergrad_: Run, file: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    filled = [a.format(file=file, out=tmp_path / "scores") for a in arguments]
    code, said, complained = pergrad_(*filled)
    assert code == 2
    assert said == ""
    assert re.search(message, complained)


def test_errors_are_messages_without_a_traceback(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    code, said, complained = pergrad_("scan", f"{file}:raising", "-o", tmp_path / "scores")
    assert code == 1
    assert said == ""
    assert complained.startswith("error: ")
    assert "raised AttributeError" in complained
    assert "Traceback" not in complained
    code, _, complained = pergrad_("--traceback", "scan", f"{file}:raising", "-o", tmp_path)
    assert code == 1
    assert "Traceback" in complained


def test_an_example_that_stops_with_a_message_is_1(
    pergrad_: Run, file: Path, tmp_path: Path
) -> None:
    file.write_text("import sys\ndef job():\n    sys.exit('Say: apt-get install the-data')\n")
    code, _, complained = pergrad_("scan", f"{file}:job", "-o", tmp_path / "scores")
    assert code == 1
    assert complained == "Say: apt-get install the-data\n"


def test_a_reference_without_a_name_is_refused(pergrad_: Run, file: Path, tmp_path: Path) -> None:
    code, _, complained = pergrad_(
        "scan", f"{file}:job", "-o", tmp_path / "scores", "--against", f"{file}:valid"
    )
    assert code == 1
    assert re.search(r"returned MeanGradient. Give it a name, --against NAME=", complained)


def test_a_scan_of_other_data_in_the_same_folder_is_refused(
    pergrad_: Run, file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores"
    assert pergrad_("scan", f"{file}:job", "-o", out)[0] == 0
    file.write_text(JOB.replace("return 40", "return 41"))
    code, _, complained = pergrad_("scan", f"{file}:job", "-o", out)
    assert code == 1
    assert "41" in complained
    code, _, complained = pergrad_("scan", f"{file}:job", "-o", out, "--no-resume")
    assert code == 1
    assert "already has scores" in complained


@pytest.fixture
def scored(pergrad_: Run, file: Path, tmp_path: Path) -> Path:
    out = tmp_path / "scores"
    assert pergrad_("scan", f"{file}:job", "-o", out)[0] == 0
    return out


def test_top_ranks(pergrad_: Run, scored: Path) -> None:
    table = pergrad.open_scores(scored).table().to_pydict()
    for by in ("norm", "loss"):
        code, said, _ = pergrad_("top", scored, "-n", 3, "--by", by, "--json")
        assert code == 0
        order = sorted(range(40), key=lambda i: -table[by][i])
        assert [row["index"] for row in json.loads(said)] == order[:3]
    code, said, _ = pergrad_("top", scored, "-n", 3)
    assert code == 0
    lines = said.splitlines()
    assert lines[0].split()[:1] == ["index"]
    assert len(lines) == 4


def test_top_of_an_unknown_column_names_those_there_are(pergrad_: Run, scored: Path) -> None:
    code, _, complained = pergrad_("top", scored, "--by", "size")
    assert code == 1
    assert re.search("size(.|\n)*norm", complained)


@pytest.mark.parametrize("command", ["top", "report"])
def test_what_is_no_store_is_refused(pergrad_: Run, tmp_path: Path, command: str) -> None:
    for folder in (tmp_path / "gone", tmp_path):
        code, said, complained = pergrad_(command, folder)
        assert code == 1
        assert said == ""
        assert complained.startswith("error: ")
        assert str(folder) in complained


def test_report_writes_a_page(pergrad_: Run, scored: Path, tmp_path: Path) -> None:
    code, said, _ = pergrad_("report", scored)
    assert code == 0
    assert said == f"{scored / 'report.html'}\n"
    assert (scored / "report.html").stat().st_size > 1000
    page = tmp_path / "page.html"
    code, said, _ = pergrad_("report", scored, "--out", page, "--json")
    assert (code, json.loads(said)) == (0, {"report": str(page)})
    assert page.is_file()


def test_explain_shows_each_parameter(pergrad_: Run, file: Path) -> None:
    code, said, _ = pergrad_("explain", f"{file}:job")
    assert code == 0
    assert re.search(r"^weight .*rule", said, re.MULTILINE)
    code, said, _ = pergrad_("explain", f"{file}:job", "--json", "-n", 3)
    found = json.loads(said)
    assert (code, found["examples"], found["exact_share"]) == (0, 3, 1.0)
    assert [row["parameter"] for row in found["rows"]] == ["weight", "bias"]


def test_explain_tells_where_the_users_code_raises(pergrad_: Run, file: Path) -> None:
    file.write_text(JOB.replace("model(x), y", "model(x.flatten()), y"))
    code, _, complained = pergrad_("explain", f"{file}:job")
    assert code == 1
    assert re.search(r"Computing the losses .* raised RuntimeError(.|\n)*in losses", complained)
    file.write_text(JOB.replace("return 40", "return 0"))
    code, _, complained = pergrad_("explain", f"{file}:job")
    assert code == 1
    assert "is empty. Pass at least one example." in complained


def test_the_demo_without_its_packages_names_the_pip_line(
    pergrad_: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda n: None if n == "sklearn" else there(n))
    code, said, complained = pergrad_("demo", "--out", tmp_path)
    assert (code, said) == (1, "")
    assert re.search(r"needs sklearn.*pip install 'pergrad\[demo\]'", complained)


# The process


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pergrad", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **more}


def test_python_dash_m_and_the_version() -> None:
    done = subprocess.run(
        command("--version"), capture_output=True, text=True, check=True, timeout=120,
        env=environment(),
    )  # fmt: skip
    assert done.stdout == f"pergrad {pergrad.__version__}\n"


def test_without_its_packages_the_command_names_the_pip_line() -> None:
    program = (
        "import sys; sys.modules['typer'] = None\n"
        "from pergrad.command import main\nsys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "top", "scores"], capture_output=True, text=True,
        timeout=120, env=environment(),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.search(r"needs typer.*\n?.*pip install 'pergrad\[scan\]'", done.stderr)


SLOW = """
import os, time
from pathlib import Path

class Waiting(Data):
    def __getitem__(self, i):
        if i == 25 and os.environ.get("WAIT"):
            Path(os.environ["WAIT"]).touch()    # says that it waits
            time.sleep(600)                     # until the signal comes
        return super().__getitem__(i)

def waiting():
    torch.manual_seed(0)
    return pergrad.Job(torch.nn.Linear(3, 2), Waiting(), losses)
"""


def test_ctrl_c_leaves_what_was_scored_and_says_how_to_resume(file: Path, tmp_path: Path) -> None:
    file.write_text(JOB + SLOW)
    out, mark = tmp_path / "the scores", tmp_path / "waits"
    process = subprocess.Popen(
        command("scan", f"{file}:waiting", "--out", out, "--batch-size", 4),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(WAIT=str(mark)),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, complained = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, complained
    assert said == ""
    assert "Traceback" not in complained
    match = re.search(r"Interrupted. (\d+) of 40 .*To resume, say:\n  (.*)\n", complained)
    assert match is not None, complained
    assert int(match.group(1)) == 24  # whole batches before the one that waited
    resume = shlex.split(match.group(2))
    assert resume[:3] == ["python", "-m", "pergrad"]

    done = subprocess.run(
        [sys.executable, *resume[1:], "--json"], capture_output=True, text=True, check=True,
        timeout=120, env=environment(),
    )  # fmt: skip
    assert json.loads(done.stdout)["scored"] == 40
    whole = tmp_path / "whole"
    subprocess.run(
        command("scan", f"{file}:waiting", "--out", whole, "--batch-size", 4), check=True,
        capture_output=True, timeout=120, env=environment(),
    )  # fmt: skip
    assert pergrad.open_scores(out).table().equals(pergrad.open_scores(whole).table())


def test_ctrl_c_before_anything_is_scored_says_so(file: Path, tmp_path: Path) -> None:
    file.write_text(f"{JOB}\nimport os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        command("scan", f"{file}:job", "--out", tmp_path / "scores"), capture_output=True,
        text=True, timeout=120, env=environment(),
    )  # fmt: skip
    assert done.returncode == 130
    assert "Interrupted. Nothing is stored yet." in done.stderr
    assert "Traceback" not in done.stderr


# calibrate


def test_calibrate_says_what_it_found_and_where_it_is(
    pergrad_: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "costs"
    monkeypatch.setenv("PERGRAD_COSTS", str(folder))
    code, said, _ = pergrad_("calibrate")
    assert code == 0
    compiled = why_not(torch.device("cpu"), torch.float32) is None
    times = 3 if compiled else 2
    assert re.search(rf"norms, B=8 T=128, 768 to 768( +[\d.]+){{{times}}}\n", said)
    assert f"Compiled kernels: {'yes.' if compiled else 'no, the environment'}" in said
    assert f"Kept in {folder}/" in said
    code, said, _ = pergrad_("calibrate", "--dtype", "float64", "--json")
    assert code == 0
    found = json.loads(said)
    assert Path(found["file"]).parent == folder
    assert len(list(folder.iterdir())) == 2
    assert pergrad_("calibrate", "--dtype", "int8")[0] == 2
    assert pergrad_("calibrate", "--device", "warp")[0] == 1


# The documentation


@pytest.mark.parametrize(
    "name",
    [
        "",
        "scan",
        "top",
        "report",
        "watch",
        "curvature",
        "influence",
        "sketch",
        "evaluate",
        "explain",
        "demo",
        "calibrate",
    ],
)
def test_help_is_in_the_documentation(pergrad_: Run, name: str) -> None:
    words = [*name.split(), "--help"]
    code, said, _ = pergrad_(*words)
    assert code == 0
    page = (ROOT / "docs" / "command.md").read_text()
    assert f"    $ {' '.join(['pergrad', *words])}\n{textwrap.indent(said, '    ')}" in page
