"""The ranks of torchrun estimate a curvature together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attributing import job

import pergrad
from pergrad.scans.runners import torchrun as under_torchrun

SCRIPT = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import torch
import pergrad
from attributing import job
from pergrad.attribution import together

torch.set_num_threads(1)
together.ROUND = 1
rank, how = int(os.environ["RANK"]), json.loads(sys.argv[2])
task = job(how["name"])
if how.get("differ") and rank:
    with torch.no_grad():
        task.model[0].weight.add_(1)
if how.get("nan"):
    task.data[7] = (task.data[7][0] * float("nan"), 0)
try:
    fit = pergrad.curvature(task, sys.argv[1], kind=how["kind"], batch_size=2, engine="torchrun")
    said = f"{fit.examples} examples"
except pergrad.PergradError as error:
    said = f"{type(error).__name__}: {error}"
Path(f"{sys.argv[1]}.said.{rank}").write_text(said)
os._exit(0)
"""


def torchrun(folder: Path, out: Path, **how: object) -> list[str]:
    """What two ranks say."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(pergrad.__file__).parents[1])])
    inherited = {k: v for k, v in os.environ.items() if k not in under_torchrun.NEEDED}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         script, out, json.dumps(how)],
        env={**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [Path(f"{out}.said.{rank}").read_text() for rank in range(2)]


@pytest.mark.parametrize(("name", "kind"), [("tied", "ekfac"), ("images", "shampoo")])
def test_ranks_get_what_one_process_gets(name: str, kind: str, tmp_path: Path) -> None:
    out = tmp_path / "fit"
    assert torchrun(tmp_path, out, name=name, kind=kind) == ["11 examples"] * 2
    task = job(name)
    found = pergrad.curvature(task, out, kind=kind)  # type: ignore[arg-type]  # opens it
    alone = pergrad.curvature(task, tmp_path / "alone", kind=kind)  # type: ignore[arg-type]
    for weight, block in alone.blocks.items():
        own = found.blocks[weight]
        torch.testing.assert_close(own.Lambda.sum(), block.Lambda.sum())
        if block.A is not None:
            torch.testing.assert_close(own.A, block.A)
            torch.testing.assert_close(own.S, block.S)
    G = {n: torch.randn(3, *p.shape).double() for n, p in task.model.named_parameters()}
    for n, part in alone.solve(G).items():
        torch.testing.assert_close(found.solve(G)[n], part, rtol=1e-5, atol=1e-6)
    assert not list(out.glob("state-*"))


def test_ranks_that_differ(tmp_path: Path) -> None:
    for told in torchrun(tmp_path, tmp_path / "fit", name="perceptron", kind="ekfac", differ=True):
        assert told.startswith("UsageError: Rank 1 would estimate something else than rank 0:")
        assert "weights_hash was" in told
        assert "Load the same weights" in told


def test_an_error_on_one_rank_is_one_on_all(tmp_path: Path) -> None:
    said = torchrun(tmp_path, tmp_path / "fit", name="perceptron", kind="ekfac", nan=True)
    assert sorted(each.split(":")[0] for each in said) == ["UsageError", "WorkerError"]
    assert all("Example 7 has a model output that is not finite" in each for each in said)


def test_engines_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(pergrad.UsageError, match=r"engine is 'ray'; pass \"local\" or"):
        pergrad.curvature(job("perceptron"), tmp_path, engine="ray")  # type: ignore[arg-type]
    with pytest.raises(pergrad.UsageError, match=r"Start the script with `torchrun"):
        pergrad.curvature(job("perceptron"), tmp_path / "fit", engine="torchrun")
