"""The command line: finding jobs, each command, what is printed where, exit codes, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pergrad.command import jobs
from pergrad.errors import UsageError

ROOT = Path(__file__).parents[1]

JOB = """
import torch, pergrad

class Data:
    def __len__(self):
        return 40
    def __getitem__(self, i):
        if i in BAD:
            raise ValueError(f"cannot read file {i}.png")
        generator = torch.Generator().manual_seed(i)
        return torch.randn(3, generator=generator), i % 2

BAD = ()

def losses(model, batch):
    x, y = batch
    return torch.nn.functional.cross_entropy(model(x), y, reduction="none")

def job():
    torch.manual_seed(0)
    return pergrad.Job(torch.nn.Linear(3, 2), Data(), losses)

def bad():
    global BAD
    BAD = (7, 31)
    return job()

def valid(job):
    return pergrad.MeanGradient(torch.utils.data.Subset(job.data, range(4)))

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
def search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a job adds to the search path and the modules of this process; not for others."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_job.py"
    path.write_text(JOB)
    return path


# Finding what JOB names


def test_a_file_is_run_and_its_function_called(file: Path) -> None:
    assert len(jobs.job(f"{file}:job").data) == 40


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
