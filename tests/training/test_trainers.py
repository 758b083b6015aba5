"""Watching inside trainers of others: all is the same to the bit, numbers are those of the loop.

What is compared: weights, the optimizer's state, and every random state.

`make integrations` installs the trainers and runs these.
"""

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import assert_same, random_states
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pergrad

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore"),  # theirs
]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def rows() -> list[dict[str, list[int]]]:
    """Texts of unequal lengths; one is corrupted."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(24):
        ids = torch.randint(5, 60, (4 + i % 5,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": list(ids), "attention_mask": [1] * len(ids)})
    return found


def collate(items: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    most = max(len(item["input_ids"]) for item in items)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.tensor([i[name] + [pad] * (most - len(i[name])) for i in items])
        for name, pad in fill.items()
    }


def language_model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2,
                   bos_token_id=1, eos_token_id=1, pad_token_id=0)
    )  # fmt: skip


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """All that a watch must not touch."""
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert optimizer.state_dict()["state"]
    return {"weights": weights, "optimizer": optimizer.state_dict(), "random": random_states()}


def fit(folder: Path, how: str | None, **more: Any) -> tuple[dict[str, Any], Any, Any]:
    from transformers import Trainer, TrainingArguments

    lora = more.pop("lora", False)
    model = language_model()
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1))
    args = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=5, per_device_train_batch_size=4, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
        **more,
    )  # fmt: skip
    watch = None
    if how is not None:
        watch = pergrad.Watch(folder / "run", every=2, groups="layer")
    trainer = Trainer(
        model, args, train_dataset=rows(), data_collator=collate,
        callbacks=[watch.hf()] if how == "hf" else None,
    )  # fmt: skip
    if how == "attach":
        watch.attach(trainer)
    trainer.train()
    state = state_of(model, trainer.optimizer)
    if watch is not None:
        watch.close()
    return state, watch, trainer


CHECKPOINTING = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}
ALL = {"gradient_accumulation_steps": 2, "bf16": True, "lora": True, **CHECKPOINTING}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"gradient_accumulation_steps": 2},
    {"bf16": True},
    CHECKPOINTING,
    {"lora": True},
    {"label_smoothing_factor": 0.1},
    ALL,
]


@pytest.mark.parametrize("how", ["hf", "attach"])
@pytest.mark.parametrize("more", SETTINGS, ids=lambda m: "+".join(m) or "plain")
def test_transformers(tmp_path: Path, how: str, more: dict[str, Any]) -> None:
    plain, _, _ = fit(tmp_path / "plain", None, **more)
    watched, watch, trainer = fit(tmp_path / "watched", how, **more)
    assert_same(plain, watched)
    hooks = [h for m in trainer.model.modules() for h in m._forward_hooks.values()]
    assert not any(h.__module__.startswith("pergrad") for h in hooks)
    if how == "hf" and "label_smoothing_factor" in more:
        assert watch.failures
        assert "watch.attach(trainer)" in watch.failures[0]
        return
    assert watch.failures == []
    run = pergrad.open_watch(tmp_path / "watched" / "run")
    steps = run.steps().to_pylist()
    assert [row["step"] for row in steps] == [0, 2, 4]
    micro = more.get("gradient_accumulation_steps", 1)
    assert all(row["examples"] == 4 * micro for row in steps)
    assert all(row["noise_scale"] is not None for row in steps)
    table = run.examples().to_pylist()
    assert all(row["norm"] > 0 and len(row["key"]) == 16 for row in table)
    for step in (0, 2, 4):
        # the trainer divides by the number of labels before each text's first is shifted out
        here = [r for r in table if r["step"] == step]
        tokens = sum(r["tokens"] for r in here)
        share = sum(r["weight"] for r in here)
        rest = 1 - more.get("label_smoothing_factor", 0.0)
        assert share == pytest.approx(rest * tokens / (tokens + len(here)), rel=1e-3)
    # the gradient's norm before clipping is what the trainer says it is
    said = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [row["grad_norm"] for row in steps] == pytest.approx(said[::2], rel=1e-3)
    logged = [entry for entry in trainer.state.log_history if "pergrad/norm/p50" in entry]
    assert len(logged) == 3


def test_numbers_are_those_of_the_loop(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model, data = language_model().eval(), rows()[:4]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = collate(data)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    tokens = (batch["labels"][:, 1:] != -100).sum(1)
    losses = each.sum(1) / tokens
    norms = naive.norms(naive.loop_grads(losses, model))
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    seen: list[str] = []

    class Decoder:
        """Stands where a tokenizer would."""

        model_input_names = ("input_ids",)

        def decode(self, ids: list[int]) -> str:
            seen.append(str(ids))
            return str(ids)

        def save_pretrained(self, *_: Any) -> None:
            pass

    with pergrad.Watch(tmp_path / "run") as watch:
        trainer = Trainer(
            model, args, train_dataset=data, data_collator=collate, callbacks=[watch.hf()],
            processing_class=Decoder(),
        )  # fmt: skip
        trainer.train()
    table = pergrad.open_watch(tmp_path / "run").examples().to_pylist()
    assert sorted(r["norm"] for r in table) == pytest.approx(sorted(norms.tolist()), rel=1e-5)
    assert sorted(r["loss"] for r in table) == pytest.approx(sorted(losses.tolist()), rel=1e-5)
    assert sorted(r["tokens"] for r in table) == sorted(tokens.tolist())


def test_attach_needs_a_trainer(tmp_path: Path) -> None:
    with pytest.raises(pergrad.UsageError, match=r"compute_loss(.|\n)*with watch\(loss, model\)"):
        pergrad.Watch(tmp_path).attach(object())


def _rank(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ["MASTER_ADDR"] = "localhost"
    warnings.simplefilter("ignore")
    for more in ({}, {"gradient_accumulation_steps": 2, "bf16": True}):
        out = Path(folder) / str(len(more))
        plain, _, _ = fit(out / f"plain{rank}", None, ddp_backend="gloo", **more)
        watched, watch, trainer = fit(out, "hf", ddp_backend="gloo", **more)
        assert trainer.args.world_size == 2
        assert_same(plain, watched)
        assert watch.failures == []
        dist.barrier()
    # gloo's threads sometimes abort a process that takes them down in order, with or without us
    os._exit(0)


def test_transformers_on_two_ranks(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (str(tmp_path), port), nprocs=2)
    for name, micro in (("0", 1), ("2", 2)):
        found = pergrad.open_watch(tmp_path / name / "run").steps().to_pylist()
        assert sorted((row["step"], row["rank"]) for row in found) == [
            (step, rank) for step in (0, 2, 4) for rank in (0, 1)
        ]
        assert all(row["examples"] == 4 * micro and row["p50"] > 0 for row in found)


@pytest.mark.parametrize(
    "more", [s for s in SETTINGS if "label_smoothing_factor" not in s],
    ids=lambda m: "+".join(m) or "plain",
)  # fmt: skip
def test_trl(tmp_path: Path, more: dict[str, Any]) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    settings = {"bf16": False, "gradient_checkpointing": False} | more
    lora = settings.pop("lora", False)
    found = []
    for how in (None, "attach"):
        folder = tmp_path / str(how)
        args = SFTConfig(
            output_dir=str(folder / "out"), max_steps=3, per_device_train_batch_size=4,
            report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, max_length=16,
            pad_token="<pad>", **settings,
        )  # fmt: skip
        data = Dataset.from_list([{"input_ids": r["input_ids"]} for r in rows()])
        model = language_model()
        config = LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1) if lora else None
        torch.manual_seed(1)
        trainer = SFTTrainer(
            model, args, train_dataset=data, processing_class=tokenizer(), peft_config=config
        )
        watch = pergrad.Watch(folder / "run", every=1)
        if how:
            watch.attach(trainer)
        trainer.train()
        found.append(state_of(trainer.model, trainer.optimizer))
        watch.close()
        assert watch.failures == []
    assert_same(*found)
    steps = pergrad.open_watch(tmp_path / "attach" / "run").steps()
    micro = more.get("gradient_accumulation_steps", 1)
    assert steps["examples"].to_pylist() == [4 * micro] * 3


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 64)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )


LIGHTNING: list[dict[str, Any]] = [
    {},
    {"accumulate": 2},
    {"by_hand": True},
    {"precision": "bf16-mixed"},
    {"recompute": True},
    {"accumulate": 2, "precision": "bf16-mixed", "recompute": True},
]


@pytest.mark.parametrize("more", LIGHTNING, ids=lambda m: "+".join(m) or "plain")
def test_lightning(tmp_path: Path, more: dict[str, Any]) -> None:
    import lightning

    by_hand, recompute = more.get("by_hand", False), more.get("recompute", False)
    accumulate = more.get("accumulate", 1)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 3))
            self.automatic_optimization = not by_hand

        def training_step(self, batch: Any, _: int) -> Tensor:
            x = batch[0]
            out = checkpoint(self.net, x, use_reentrant=False) if recompute else self.net(x)
            loss = F.cross_entropy(out, batch[1])
            if by_hand:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    found = []
    for watched in (False, True):
        lightning.seed_everything(0)
        x, y = torch.randn(40, 5), torch.randint(3, (40,))
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
        watch = pergrad.Watch(tmp_path / str(watched), every=2)
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[watch.lightning()] if watched else [],
            gradient_clip_val=None if by_hand else 0.1, accumulate_grad_batches=accumulate,
            precision=more.get("precision", "32-true"), default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, loader)
        found.append(state_of(module, trainer.optimizers[0]))
        watch.close()
        assert watch.failures == []
    assert_same(*found)
    rows_ = pergrad.open_watch(tmp_path / "True").steps().to_pylist()
    assert [row["step"] for row in rows_] == list(range(0, 10 // accumulate, 2))
    assert all(row["examples"] == 4 * accumulate for row in rows_)
    assert all(row["noise_scale"] is not None for row in rows_)
