"""Watching inside trainers of others on two ranks of gloo: all is the same to the bit.

Every trainer with its model on both ranks (DDP), and with its model sharded over them (FSDP2), in
each way to train. `make integrations` installs the trainers and runs these.
"""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fits import ALL, CHECKPOINTING, LIGHTNING, fit, fit_lightning, fit_sft, mean_loss
from helpers import assert_same
from tests.ranks import free_port, on_ranks

import pergrad

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore"),  # theirs
]

SETTINGS: list[dict[str, Any]] = [
    {},
    {"gradient_accumulation_steps": 2},
    {"bf16": True},
    CHECKPOINTING,
    {"lora": True},
    ALL,
]


def by_callback(folder: Path, watched: bool, **more: Any) -> Any:
    return fit(folder, "hf" if watched else None, ddp_backend="gloo", **more)


def attached(folder: Path, watched: bool, **more: Any) -> Any:
    return fit(folder, "attach" if watched else None, ddp_backend="gloo", **more)


def by_sft(folder: Path, watched: bool, **more: Any) -> Any:
    return fit_sft(folder, watched, ddp_backend="gloo", **more)


def in_lightning(folder: Path, watched: bool, **more: Any) -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    strategy = DDPStrategy(process_group_backend="gloo")
    return fit_lightning(folder, watched, strategy=strategy, devices=2, **more)


def sharded(folder: Path, watched: bool, **more: Any) -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
    )
    return fit_lightning(folder, watched, shard=True, strategy=strategy, devices=2, **more)


def by_callback_sharded(folder: Path, watched: bool, **more: Any) -> Any:
    return by_callback(folder, watched, shard=True, **more)


def attached_sharded(folder: Path, watched: bool, **more: Any) -> Any:
    return attached(folder, watched, shard=True, **more)


def by_sft_sharded(folder: Path, watched: bool, **more: Any) -> Any:
    return by_sft(folder, watched, shard=True, loss=mean_loss, **more)


def by_sft_fused(folder: Path, watched: bool, **more: Any) -> Any:
    """Its own loss, a Function that hides its rows."""
    return by_sft(folder, watched, shard=True, **more)


SHARDED = (sharded, by_callback_sharded, attached_sharded, by_sft_sharded, by_sft_fused)
TRAINERS: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "transformers": (by_callback, SETTINGS),
    "transformers, attached": (attached, SETTINGS),
    "trl": (by_sft, SETTINGS),
    "transformers, sharded": (by_callback_sharded, SETTINGS),
    "transformers, attached, sharded": (attached_sharded, SETTINGS),
    "trl, sharded": (by_sft_sharded, SETTINGS),
    "trl, sharded, its own loss": (by_sft_fused, [{}]),
    "lightning": (in_lightning, LIGHTNING),
    "lightning, sharded": (sharded, LIGHTNING),
}


def _rank(rank: int, folder: str, port: int, name: str) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ["MASTER_ADDR"] = "localhost"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    train, settings = TRAINERS[name]
    for k, more in enumerate(settings):
        try:
            out = Path(folder) / str(k)
            plain, _, _ = train(out / f"plain{rank}", False, **more)
            watched, watch, trainer = train(out, True, **more)
            assert any(hasattr(p, "full_tensor") for p in trainer.model.parameters()) == (
                train in SHARDED
            )
            assert_same(plain, watched)
            if train is by_sft_fused:
                assert "`compute_loss_func=`" in watch.failures[0]
                continue
            assert watch.failures == [], watch.failures
            dist.barrier()
        except BaseException:
            traceback.print_exc()
            sys.stderr.write(f"rank {rank}, {name}, {more}\n")
            os._exit(1)
    # gloo's threads sometimes abort a process that takes them down in order, with or without us
    os._exit(0)


@pytest.mark.parametrize("name", TRAINERS)
def test_two_ranks(tmp_path: Path, name: str) -> None:
    on_ranks(_rank, str(tmp_path), free_port(), name)
    for k, more in enumerate(TRAINERS[name][1]):
        micro = more.get("gradient_accumulation_steps", more.get("accumulate", 1))
        found = pergrad.open_watch(tmp_path / str(k) / "run").steps().to_pylist()
        steps = sorted({row["step"] for row in found})
        assert len(steps) > 1
        if TRAINERS[name][0] is by_sft_fused:
            assert all(row["note"] for row in found)
            continue
        assert sorted((row["step"], row["rank"]) for row in found) == [
            (step, rank) for step in steps for rank in (0, 1)
        ]
        # the last step of an epoch may have fewer batches
        assert {row["examples"] for row in found} <= {4, 4 * micro}
        assert all(row["examples"] == 4 * micro for row in found if row["step"] == 0)
        assert all(row["p50"] > 0 for row in found)
