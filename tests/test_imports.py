"""Importing pergrad changes nothing; what only reads needs no torch; every name is there."""

import ast
import json
import pickle
import pydoc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pergrad

PROBE = """
import gc, json, logging, random, sys, threading, warnings
import torch
import torch.utils.data  # what torch itself imports on demand is not ours to count

def state():
    return {
        "handlers": len(logging.root.handlers),
        "level": logging.root.level,
        "filters": len(warnings.filters),
        "threads": threading.active_count(),
        "torch threads": torch.get_num_threads(),
        "rng": hash(bytes(torch.get_rng_state().tolist())),
        "random": hash(random.getstate()),
        "grad": torch.is_grad_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "showwarning": warnings.showwarning is shown,
        "excepthook": sys.excepthook is sys.__excepthook__,
        "collections": gc.isenabled(),
    }

shown = warnings.showwarning
before, modules = state(), set(sys.modules)
import pergrad
from pergrad import (  # all but what needs an extra
    Check, CompiledStep, Coverage, GradientMatrix, NoiseScale, backward, calibrate, check, clip,
    compiled, concatenate, dots, explain, gradients, gram, load_gradients, norms,
    norms_by_parameter, parts, per_example, precondition, reading, second_moments,
)
new = sorted({name.partition(".")[0] for name in set(sys.modules) - modules})
print(json.dumps({"before": before, "after": state(), "new": new}))
"""


def probe() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_the_verbs_need_torch_and_the_standard_library_alone() -> None:
    allowed = {"pergrad", "torch", *sys.stdlib_module_names}
    assert set(probe()["new"]) <= allowed


def test_import_has_no_side_effect() -> None:
    found = probe()
    assert found["after"] == found["before"]


@pytest.mark.parametrize("on", [True, False])
def test_no_collection_runs_while_modules_are_loaded(on: bool) -> None:
    """It would look at all that torch has made, and find nothing. Afterwards it is as it was."""
    code = f"""
import gc, torch, pergrad
gc.set_threshold(1)
{"gc.enable()" if on else "gc.disable()"}
runs = []
gc.callbacks.append(lambda phase, info: runs.append(phase))
pergrad.norms
assert gc.isenabled() is {on}
gc.callbacks.clear()
assert len(runs) < 50, len(runs)
try:
    pergrad.no_such_name
except AttributeError:
    pass
assert gc.isenabled() is {on}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


SOURCE = Path(pergrad.__file__)


def public() -> Iterator[tuple[str, str]]:
    """What a type checker takes each public name to be: (name, module)."""
    tree = ast.parse(SOURCE.read_text())
    checked = next(n for n in tree.body if isinstance(n, ast.If))
    for node in [*tree.body, *checked.body]:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("pergrad"):
            yield from ((alias.name, str(node.module)) for alias in node.names)


def test_a_name_is_what_type_checkers_take_it_for() -> None:
    seen = dict(public())
    assert set(seen) == {*pergrad.__all__, "__version__"}
    for name, module in seen.items():
        value = getattr(pergrad, name)
        if name == "precondition":
            assert value is sys.modules["pergrad.precondition"]
        else:
            assert value is getattr(sys.modules[module], name)


def test_names_are_listed_helped_and_refused() -> None:
    assert set(pergrad.__all__) <= set(dir(pergrad))
    assert "L2 norm" in pydoc.render_doc(pergrad.norms)
    text = pydoc.plain(pydoc.render_doc(pergrad))
    assert not [name for name in pergrad.__all__ if name not in text]
    with pytest.raises(AttributeError, match="'pergrad' has no attribute 'norm'"):
        _ = pergrad.norm


@pytest.mark.parametrize(
    "first",
    [
        "Check",
        "precondition",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("Coverage", "check", "explain")),
    ],
)
def test_no_order_of_first_uses_puts_a_module_in_place_of_a_function(first: str) -> None:
    code = f"""
import pergrad
pergrad.{first}
assert [type(getattr(pergrad, n)).__name__ for n in ("check", "explain", "precondition")] == [
    "function", "function", "module"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", sorted(set(pergrad.__all__) - {"precondition"}))
def test_a_name_is_pickled_by_where_it_is(name: str) -> None:
    value = getattr(pergrad, name)
    assert pickle.loads(pickle.dumps(value)) is value


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Scores and a run."""
    scores, run = tmp_path_factory.mktemp("scores"), tmp_path_factory.mktemp("run")
    model = torch.nn.Linear(3, 1)
    data = list(torch.randn(8, 3))
    job = pergrad.Job(model, data, lambda m, x: m(x).squeeze(1), show=lambda i: f"text {i}")
    pergrad.scan(job, scores, progress=False)
    watch = pergrad.Watch(run, every=1)
    for _ in range(3):
        loss = model(torch.stack(data)).square().mean()
        with watch(loss, model, examples=8):
            loss.backward()
    watch.close()
    return scores, run


READING = """
import sys
from pergrad.command import app
sys.argv[0] = "pergrad"
code = app.run(sys.argv[1:])
assert code == 0, code
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    "words",
    ["--help", "--version", "top --help", "scan --help", "report --help", "watch --help",
     "explain --help", "calibrate --help", "demo --help",
     "top SCORES", "top SCORES --by loss --json", "top SCORES --failed", "report SCORES",
     "top RUN", "report RUN"],
)  # fmt: skip
def test_commands_that_read_need_no_torch(words: str, folders: tuple[Path, Path]) -> None:
    there = {"SCORES": str(folders[0]), "RUN": str(folders[1])}
    arguments = [there.get(word, word) for word in words.split()]
    done = subprocess.run(
        [sys.executable, "-c", READING, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_scores_are_read_without_torch(folders: tuple[Path, Path]) -> None:
    code = """
import sys, pergrad
scores = pergrad.open_scores(sys.argv[1])
assert len(scores.top(3)) == 3 and scores["norm"].shape == (8,) and not scores.damaged()
assert len(pergrad.open_watch(sys.argv[2]).top(3)) == 3
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, *map(str, folders)], check=True, timeout=120)
