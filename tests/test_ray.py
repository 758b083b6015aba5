"""The engine on Ray: the store and the numbers of the local one, whatever happens to workers."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from killing import Examples, job, losses
from torch import nn

import pergrad
from pergrad.scores import on_ray
from pergrad.scores.packing import Numerics, packed, unpacked

ray = pytest.importorskip("ray", reason="Ray has no wheel for this Python")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Ray, initialised by the caller; every test leaves it running."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray.get_runtime_context().gcs_address
    assert ray.is_initialized()
    ray.shutdown()


def on_two(job: pergrad.Job, out: Path, **more: object) -> pergrad.Scores:
    return pergrad.scan(job, out, engine="ray", workers=2, batch_size=4, progress=False, **more)


def locally(job: pergrad.Job, out: Path, **more: object) -> pergrad.Scores:
    return pergrad.scan(job, out, batch_size=4, progress=False, **more)


@pytest.mark.usefixtures("cluster")
class TestNumbers:
    def test_are_those_of_the_local_engine(self, tmp_path: Path) -> None:
        data = Examples(50)
        scored = job(data, key=lambda i: f"example {i}")
        direction = [torch.ones_like(p) for p in scored.model.parameters()]
        gradients = pergrad.gradients(losses(scored.model, data.x[:3]), scored.model)
        more = {"groups": "layer", "against": {"ones": direction, "three": gradients}}
        expected = locally(scored, tmp_path / "local", **more).table()
        assert on_two(scored, tmp_path / "ray", **more).table().equals(expected)

    def test_of_a_job_from_a_file_that_no_worker_can_import(self, tmp_path: Path) -> None:
        file = tmp_path / "far_away.py"
        file.write_text((Path(__file__).parent / "killing.py").read_text())
        spec = importlib.util.spec_from_file_location("only_loaded_here", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules["only_loaded_here"] = module
        try:
            spec.loader.exec_module(module)
            scored = module.job(module.Examples(10))
            expected = locally(scored, tmp_path / "local").table()
            assert on_two(scored, tmp_path / "ray").table().equals(expected)
        finally:
            del sys.modules["only_loaded_here"]

    def test_follow_the_settings_of_torch_here(self, tmp_path: Path) -> None:
        class Fresh(Examples):
            def __getitem__(self, i: int) -> torch.Tensor:
                return torch.tensor(self.x[i].tolist())  # of the default dtype

        torch.set_default_dtype(torch.float64)
        try:
            table = on_two(job(Fresh(6)), tmp_path).table()
        finally:
            torch.set_default_dtype(torch.float32)
        assert str(table["norm"].type) == "double"


@pytest.mark.usefixtures("cluster")
class TestDeath:
    def test_of_a_worker_costs_its_block(self, tmp_path: Path) -> None:
        expected = locally(job(Examples(50)), tmp_path / "local").table()
        deaths = tmp_path / "deaths"
        deaths.mkdir()
        with pytest.warns(pergrad.WorkerWarning, match=r"examples .*20 to 23.* handed out again"):
            scores = on_two(job(Examples(50, at=21, times=1, deaths=deaths)), tmp_path / "ray")
        assert len(os.listdir(deaths)) == 1
        assert scores.table().equals(expected)

    def test_again_and_again_sets_the_block_aside(self, tmp_path: Path) -> None:
        expected = locally(job(Examples(50)), tmp_path / "local").table()
        deaths = tmp_path / "deaths"
        deaths.mkdir()
        scored = job(Examples(50, at=21, times=3, deaths=deaths))
        with (
            pytest.warns(pergrad.WorkerWarning, match=r"examples 20 to 23, which are set aside"),
            pytest.raises(pergrad.WorkerError, match=r"examples 20 to 23\.(.|\n)*engine='local'"),
        ):
            on_two(scored, tmp_path / "ray")
        missing = set(range(50)) - set(
            pergrad.open_scores(tmp_path / "ray").table()["index"].to_pylist()
        )
        assert missing == {20, 21, 22, 23}
        assert locally(scored, tmp_path / "ray").table().equals(expected)
