"""The engine on Ray: the store and the numbers of the local one, whatever happens to workers."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from killing import Examples, job, losses
from torch import Tensor, nn

import pergrad
from pergrad.scans.runners import ray_workers


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Ray, initialised by the caller, who finds it running afterwards."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=40)
    yield ray.get_runtime_context().gcs_address
    assert ray.is_initialized()
    ray.shutdown()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy with other things is no reason for a warning here."""
    monkeypatch.setattr(ray_workers, "PATIENCE", 3600.0)


@pytest.fixture
def deaths(tmp_path: Path) -> Path:
    """Where those who die are counted."""
    folder = tmp_path / "deaths"
    folder.mkdir()
    return folder


def on_workers(job: pergrad.Job, out: Path, workers: int = 2, **more: object) -> pergrad.Scores:
    return pergrad.scan(
        job, out, engine="ray", workers=workers, batch_size=4, progress=False, **more
    )


def locally(job: pergrad.Job, out: Path, **more: object) -> pergrad.Scores:
    return pergrad.scan(job, out, batch_size=4, progress=False, **more)


# --- the same numbers ----------------------------------------------------------------------------


def test_the_table_is_that_of_the_local_engine(cluster: str, tmp_path: Path) -> None:
    data = Examples(50)
    scored = job(data, key=lambda i: f"example {i}", show=lambda i: threading.Lock())
    ones = [torch.ones_like(p) for p in scored.model.parameters()]
    three = pergrad.gradients(losses(scored.model, data.x[:3]), scored.model)
    zeros = {n: torch.zeros_like(t) for n, t in scored.model.state_dict().items()}
    more = {
        "groups": "layer",
        "against": {"ones": ones, "three": three},
        "checkpoints": {"zeros": zeros, "now": scored.model.state_dict()},
    }
    expected = locally(scored, tmp_path / "local", **more).table()
    scores = on_workers(scored, tmp_path / "ray", **more)
    assert scores.complete
    assert scores.table().equals(expected)


def test_a_job_from_a_file_under_the_settings_of_this_process(cluster: str, tmp_path: Path) -> None:
    """Its module cannot be imported anywhere else, and the default dtype is the one set here."""
    file = tmp_path / "jobs.py"
    file.write_text(
        "import killing, pergrad, torch\n"
        "class Fresh(killing.Examples):\n"
        "    def __getitem__(self, i): return torch.tensor(self.x[i].tolist())\n"
        "def losses(model, x): return model(x).cumprod(1).sum(1)\n"
        "def job():\n"
        "    model = torch.nn.Linear(4, 3)\n"
        "    return pergrad.Job(model, Fresh(6), lambda model, x: losses(model, x))\n"
    )
    spec = importlib.util.spec_from_file_location("only_loaded_here", file)
    module = sys.modules["only_loaded_here"] = importlib.util.module_from_spec(spec)
    torch.set_default_dtype(torch.float64)
    try:
        spec.loader.exec_module(module)
        scored = module.job()
        table = on_workers(scored, tmp_path / "ray", 1).table()
        assert table.equals(locally(scored, tmp_path / "local").table())
        assert table["norm"].type == "double"
    finally:
        torch.set_default_dtype(torch.float32)
        del sys.modules["only_loaded_here"]


class _Odd(torch.autograd.Function):
    """An op that no rule knows."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


def odd_losses(model: nn.Module, x: Tensor) -> Tensor:
    return _Odd.apply(x, model[0].weight.T).square().sum(1)


def test_what_a_worker_warns_of_and_raises_comes_here(cluster: str, tmp_path: Path) -> None:
    odd = job(Examples(6))
    odd = pergrad.Job(odd.model, odd.data, odd_losses, params={"w": odd.model[0].weight})
    with pytest.warns(pergrad.FallbackWarning, match="_Odd"):
        scores = on_workers(odd, tmp_path / "odd", 1)
    with pytest.warns(pergrad.FallbackWarning, match="_Odd"):
        assert scores.table().equals(locally(odd, tmp_path / "local").table())
    mixing = pergrad.Job(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), Examples(8), losses)
    with pytest.raises(pergrad.MixedExamplesError, match=r"mixes(.|\n)*eval\(\)") as caught:
        on_workers(mixing, tmp_path / "mixing", 1, mode="train")
    assert "Raised on a worker of Ray" in "".join(caught.value.__notes__)


# --- deaths --------------------------------------------------------------------------------------


def test_a_worker_killed_in_the_middle_costs_its_block(
    cluster: str, tmp_path: Path, deaths: Path
) -> None:
    expected = locally(job(Examples(50)), tmp_path / "local").table()
    with pytest.warns(pergrad.WorkerWarning, match=r"examples .*20 to 23.* handed out again"):
        scores = on_workers(job(Examples(50, at=21, deaths=deaths)), tmp_path / "ray")
    assert len(os.listdir(deaths)) == 1
    assert scores.table().equals(expected)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_block_that_kills_is_set_aside_and_the_others_are_scored(
    cluster: str, workers: int, tmp_path: Path, deaths: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "DEATHS", 2)
    expected = locally(job(Examples(30)), tmp_path / "local").table()
    killing = job(Examples(30, at=21, times=2, deaths=deaths))
    with (
        pytest.warns(pergrad.WorkerWarning) as said,
        pytest.raises(pergrad.WorkerError, match=r"on examples 20 to 23\.(.|\n)*engine='local'"),
    ):
        on_workers(killing, tmp_path / "ray", workers)
    assert "examples 20 to 23, which are set aside" in str(said[-1].message)
    there = pergrad.open_scores(tmp_path / "ray").table(["index"])["index"].to_pylist()
    assert there == [i for i in range(30) if not 20 <= i < 24]
    assert locally(killing, tmp_path / "ray").table().equals(expected)


class Deadly(Examples):
    """Kills who loads it."""

    def __setstate__(self, state: dict) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_die_while_they_load_end_the_scan(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "DEATHS", 2)
    with pytest.raises(pergrad.WorkerError, match=r"while they loaded the model(.|\n)*fewer"):
        on_workers(job(Deadly(5)), tmp_path, 1)


def test_a_job_that_kills_every_time_ends_early(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: Path
) -> None:
    monkeypatch.setattr(ray_workers, "DEATHS", 1)
    data = Examples(8, at=0, times=9, deaths=deaths)
    with (
        pytest.warns(pergrad.WorkerWarning, match="set aside"),
        pytest.raises(pergrad.WorkerError, match=r"The scan was stopped(.|\n)*engine='local'"),
    ):
        on_workers(job(data), tmp_path / "ray", 1)


def test_control_c_leaves_a_store_that_is_resumed(
    cluster: str, tmp_path: Path, deaths: Path
) -> None:
    expected = locally(job(Examples(50)), tmp_path / "local").table()
    data = Examples(50, at=29, deaths=deaths, signal=signal.SIGINT, whom=os.getpid())
    with pytest.raises(KeyboardInterrupt):
        on_workers(job(data), tmp_path / "ray", 1)
    assert 0 < len(pergrad.open_scores(tmp_path / "ray")) < 50
    assert on_workers(job(data), tmp_path / "ray", 1).table().equals(expected)


# --- Ray as it was -------------------------------------------------------------------------------

ALONE = """
import dataclasses, os, signal, sys
from pathlib import Path
import pergrad, pytest, ray
from killing import Examples, job
from pergrad.scans.runners import ray_workers

ray_workers.PATIENCE = 3600.0
def losses(model, x):  # of the script itself
    return model(x).square().sum(1)
scored = dataclasses.replace(job(Examples(6)), losses=losses)
address, out = sys.argv[1:]
def state():
    return signal.getsignal(signal.SIGTERM), {k: v for k, v in os.environ.items()}
before = state()
for name, more in {"cluster": {"address": address}, "own": {}}.items():
    scores = pergrad.scan(scored, Path(out, name), engine="ray", workers=1,
                          batch_size=4, progress=False, **more)
    assert scores.complete
    assert not ray.is_initialized()
    assert state() == before
with pytest.raises(pergrad.UsageError, match="No Ray cluster(.|\\n)*ray start --head"):
    pergrad.scan(scored, Path(out, "none"), engine="ray", address="127.0.0.1:1")
"""


def test_ray_is_joined_or_started_and_left(cluster: str, tmp_path: Path) -> None:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parents[1] / "src")])
    subprocess.run(
        [sys.executable, "-W", "error", "-c", ALONE, cluster, str(tmp_path)],
        check=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )
    assert (
        pergrad.open_scores(tmp_path / "own")
        .table()
        .equals(pergrad.open_scores(tmp_path / "cluster").table())
    )


BLOCKED = """
import sys, time
from pathlib import Path
import pergrad
from killing import Examples, job

class Blocking(Examples):
    def __getitem__(self, i):
        if i == 9:
            (self.deaths / "begun").touch()
            time.sleep(3600)
        return self.x[i]

place = Path(sys.argv[1])
task = job(Blocking(12, deaths=place))
pergrad.scan(task, place / "s", engine="ray", workers=1, batch_size=4, progress=False)
"""


def _marked(mark: Path) -> list[str]:
    """Processes that have a mark in their environment, as their children have."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            pass  # it has ended
    return found


def test_no_process_is_left_of_a_driver_that_was_killed(tmp_path: Path) -> None:
    """Also not the worker, in the middle of the user's code."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parents[1] / "src")])
    driver = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "MARK": str(tmp_path)},
    )
    try:
        while not (tmp_path / "begun").exists():
            assert driver.poll() is None
            time.sleep(0.05)
        assert len(_marked(tmp_path)) > 2  # the driver, Ray's own, the worker
    finally:
        driver.kill()
        driver.wait()
    # Ray's agent tells its control process first that the driver is gone, and where that has ended
    # before it, tries so for a minute (gcs_rpc_server_reconnect_timeout_s).
    for _ in range(3000):
        if not _marked(tmp_path):
            break
        time.sleep(0.1)
    assert not _marked(tmp_path)


def test_workers_that_find_no_room_are_waited_for(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hog:
        def there(self) -> bool:
            return True

    hog = ray.remote(Hog).options(num_cpus=2).remote()
    assert ray.get(hog.there.remote())
    said = []

    def say(self: object, message: str) -> None:
        said.append(message)
        ray.kill(hog)

    monkeypatch.setattr(ray_workers, "PATIENCE", 0.1)
    monkeypatch.setattr(ray_workers.Workers, "_say", say)
    assert on_workers(job(Examples(5)), tmp_path, 1).complete
    assert len(said) == 1
    assert "No worker of Ray has started" in said[0]
    assert "ask for fewer workers" in said[0]


# --- refusals ------------------------------------------------------------------------------------


class Holding(Examples):
    def __init__(self) -> None:
        super().__init__(5)
        self.cache = {"guard": threading.Lock()}


def test_a_job_that_cannot_travel_is_refused_by_name(tmp_path: Path) -> None:
    match = r"`job\.data\.cache\['guard'\]` \(_thread\.lock\)(.|\n)*__getstate__(.|\n)*\"local\""
    with pytest.raises(pergrad.UsageError, match=match):
        on_workers(job(Holding()), tmp_path / "data")
    guard = threading.Lock()
    held = pergrad.Job(nn.Linear(4, 1), Examples(5), lambda model, x: guard and losses(model, x))
    with pytest.raises(pergrad.UsageError, match=r"`job\.losses -> guard` \(_thread\.lock\)"):
        on_workers(held, tmp_path / "losses")


def test_another_torch_is_refused(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "1.0")
    with pytest.raises(pergrad.UsageError, match=r"torch 2.*1\.0(.|\n)*same torch on both"):
        on_workers(job(Examples(5)), tmp_path, 1)


def test_arguments_that_make_no_sense_on_ray(cluster: str, tmp_path: Path) -> None:
    with pytest.raises(pergrad.UsageError, match=r"already initialised(.|\n)*Leave address out"):
        on_workers(job(Examples(5)), tmp_path / "a", address="10.0.0.1:6379")
    with pytest.raises(pergrad.UsageError, match=r"workers is 0(.|\n)*at least 1"):
        on_workers(job(Examples(5)), tmp_path / "b", 0)
    with pytest.raises(pergrad.UsageError, match=r"no GPU(.|\n)*Leave device out"):
        ray_workers.plan(ray, 1, "cuda")


class Nodes:
    """A cluster of some nodes, as far as Ray tells of it."""

    def __init__(self, *resources: dict[str, float]) -> None:
        self._nodes = [{"Alive": True, "Resources": each} for each in resources]

    def nodes(self) -> list[dict]:
        return [*self._nodes, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]


def test_a_worker_for_each_gpu_or_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    two = Nodes({"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0})
    crew = ray_workers.plan(two, None, None)
    assert (crew.workers, crew.gpus, crew.device) == (2, 1, "cuda")
    assert ray_workers.plan(two, 1, "cuda:1").device == "cuda"  # the only one that a worker sees
    crew = ray_workers.plan(two, None, "cpu")
    assert (crew.workers, crew.gpus, crew.cpus, crew.threads) == (12, 0, 1, 1)
    assert ray_workers.plan(two, 3, "cpu").threads == 4
    assert ray_workers.plan(Nodes({"CPU": 2.0}, {"CPU": 2.0}), 1, None).threads == 2  # one node's
    assert ray_workers.plan(Nodes({"CPU": 32.0}), 2, None).threads == 6  # as here
    assert ray_workers.plan(Nodes({"CPU": 1.0}), 5, None).threads == 1


def test_absent_ray_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pergrad.extras.find_spec", lambda name: None if name == "ray" else name)
    with pytest.raises(pergrad.MissingExtraError, match=r"pip install 'pergrad\[ray\]'"):
        on_workers(job(Examples(5)), tmp_path)


def test_a_worker_without_pergrad_is_told_what_to_install() -> None:
    error = ray_workers.not_there("No module named 'pergrad'")
    assert "No module named 'pergrad'. Install what is missing" in str(error)
    assert "runtime_env" in str(error)
