"""The ranks of torchrun score one data set together, and finish what another run began."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from killing import Examples, job
from tests.ranks import free_port

import pergrad
from pergrad.scans.runners import torchrun as under_torchrun

TESTS = Path(__file__).parent

SCRIPT = """
import json, os, sys, warnings
from pathlib import Path
import torch
import torch.distributed as dist
import pergrad
from killing import Examples, job

torch.set_num_threads(1)
out, how = sys.argv[1], json.loads(sys.argv[2])
rank = int(os.environ["RANK"])
if how.get("group"):
    dist.init_process_group("gloo")
data = Examples(30, **{k: Path(v) if k == "deaths" else v for k, v in how.get("data", {}).items()})
class Failing(Examples):
    def __getitem__(self, i):
        if i == 21:
            raise pergrad.UsageError("The disk of example 21 is gone.")
        return self.x[i]
if how.get("failing"):
    data = Failing(30)
elif how.get("apart"):
    out += f"-{rank}"
seed = rank if how.get("differ") else 0
points = [job(data, seed=7).model] if how.get("checkpoints") else None
try:
    scores = pergrad.scan(job(data, seed=seed), out, engine="torchrun", batch_size=4,
                          progress=False, checkpoints=points)
    said = f"{len(scores)} scores, {dist.is_initialized()}"
except pergrad.PergradError as error:
    said = f"{type(error).__name__}: {error}"
if how.get("group"):
    dist.destroy_process_group()
Path(f"{sys.argv[1]}.said.{rank}").write_text(said)
# gloo's threads sometimes abort a process that takes them down in order, with or without us
os._exit(0)
"""


def environment(**more: object) -> dict[str, str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parents[1] / "src")])
    inherited = {k: v for k, v in os.environ.items() if k not in under_torchrun.NEEDED}
    return {
        **inherited,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        **{k: str(v) for k, v in more.items()},
    }


def said(out: Path) -> list[str]:
    return [Path(f"{out}.said.{rank}").read_text() for rank in range(2)]


def torchrun(tmp_path: Path, out: Path, **how: object) -> int:
    """Two ranks under torchrun; its exit code."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*start, str(script), str(out), json.dumps(how)],
        env=environment(),
        capture_output=True,
        timeout=300,
    )
    return done.returncode


def by_hand(out: Path, **how: object) -> list[int]:
    """Two ranks that nobody watches over; their exit codes."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(out), json.dumps(how)],
            env=environment(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        )
        for rank in range(2)
    ]
    return [rank.wait(timeout=300) for rank in ranks]


def expected(tmp_path: Path, **more: object) -> object:
    task = job(Examples(30))
    return pergrad.scan(task, tmp_path / "local", batch_size=4, progress=False, **more).table()


def test_ranks_share_a_data_set_and_all_see_the_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert torchrun(tmp_path, out, checkpoints=True) == 0
    assert said(out) == ["30 scores, False"] * 2
    scores = pergrad.open_scores(out)
    points = [job(Examples(30), seed=7).model]
    assert scores.table().equals(expected(tmp_path, checkpoints=points))
    assert scores.manifest["finished"]
    assert len(list((out / "parts").iterdir())) == 2  # one from each
    before = scores.table()
    assert torchrun(tmp_path, out, checkpoints=True) == 0  # again, into one that is complete
    assert said(out) == ["30 scores, False"] * 2
    assert pergrad.open_scores(out).table().equals(before)


def test_what_a_killed_rank_leaves_is_finished_by_the_next_run(tmp_path: Path) -> None:
    out, deaths = tmp_path / "out", tmp_path / "deaths"
    deaths.mkdir()
    data = {"at": 21, "deaths": str(deaths)}  # in a block of rank 1
    assert torchrun(tmp_path, out, data=data) != 0
    assert len(list(deaths.iterdir())) == 1
    assert torchrun(tmp_path, out, group=True, data=data) == 0
    assert said(out) == ["30 scores, True"] * 2
    assert pergrad.open_scores(out).table().equals(expected(tmp_path))


def test_the_rank_that_is_left_finishes_its_share(tmp_path: Path) -> None:
    out, deaths = tmp_path / "out", tmp_path / "deaths"
    deaths.mkdir()
    codes = by_hand(out, data={"at": 21, "deaths": str(deaths)})
    assert codes == [0, -signal.SIGKILL]
    heard = Path(f"{out}.said.0").read_text()
    assert heard.startswith("WorkerError: Rank 0 of 2 has lost another rank")
    assert "Start the same command again" in heard
    there = set(pergrad.open_scores(out).table(["index"])["index"].to_pylist())
    assert there >= {i for i in range(30) if i // 4 % 2 == 0}
    assert not there & {20, 21, 22, 23}


def test_ranks_with_other_weights_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert by_hand(out, differ=True) == [0, 0]
    first, second = said(out)
    assert second.startswith(
        "UsageError: Rank 1 would score something else than rank 0: the model'"
    )
    assert "Load the same weights" in second
    assert first.startswith("WorkerError: Rank 1 has failed")
    assert "Start the same command again" in first
    assert len(pergrad.open_scores(out)) == 0


def test_an_error_on_one_rank_is_one_on_all_once_the_others_are_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    by_hand(out, failing=True)
    first, second = said(out)
    assert second == "UsageError: The disk of example 21 is gone."
    assert first.startswith("WorkerError: Rank 1 has failed")
    assert "The disk of example 21 is gone. What all ranks have scored is stored" in first
    there = set(pergrad.open_scores(out).table(["index"])["index"].to_pylist())
    assert there >= {i for i in range(30) if i // 4 % 2 == 0}


def test_ranks_that_do_not_share_the_folder_are_refused(tmp_path: Path) -> None:
    by_hand(tmp_path / "out", apart=True)
    second = said(tmp_path / "out")[1]
    assert second.startswith("UsageError: Rank 1 does not see in")
    assert "on a disk that all ranks share" in second


def test_a_process_that_nobody_started_so_is_told_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in under_torchrun.NEEDED:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(pergrad.UsageError, match=r"RANK is not(.|\n)*torchrun --nproc-per-node=2"):
        pergrad.scan(job(Examples(5)), tmp_path / "out", engine="torchrun")
    monkeypatch.setattr("torch.distributed.is_available", lambda: False)
    with pytest.raises(pergrad.UsageError, match=r"torch lacks(.|\n)*Leave engine out"):
        pergrad.scan(job(Examples(5)), tmp_path / "out", engine="torchrun")


MEETING = """
import os
from datetime import timedelta
import torch.distributed as dist
from pergrad.scans.runners import torchrun

def enters():
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                          is_master=False, timeout=timedelta(seconds=10))
    store.set("a rank that is ahead", "is here")

def call():
    with torchrun.ranks() as own:
        assert (own.rank, own.size) == (0, 1)
        assert own.gather("here") == ["here"]

call()
enters()
call()
enters()
print("met", flush=True)
os._exit(0)
"""


def test_a_rank_that_is_ahead_finds_the_others_between_two_calls() -> None:
    ranks = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    done = subprocess.run(
        [sys.executable, "-c", MEETING],
        env=environment(**ranks),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "met\n", done.stderr
