"""Small runs of trainers of others, plain or watched, and all that a watch must not touch."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from helpers import random_states
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pergrad


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


def language_model(tied: bool = True) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2,
                   bos_token_id=1, eos_token_id=1, pad_token_id=0, tie_word_embeddings=tied)
    )  # fmt: skip


def shard_over_ranks(trainer: Any) -> None:
    """Let a trainer of transformers shard its model over ranks of gloo, by FSDP2.

    accelerate shards on accelerators only. All that it asks for is the kind of the machine, so
    it is told of one: from there on the way is its own.
    """
    from accelerate import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"], cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator = trainer.accelerator
    accelerator.state.distributed_type = DistributedType.FSDP
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    trainer.is_fsdp_enabled = True


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """All that a watch must not touch, whole where it is sharded."""
    weights = {n: whole(p) for n, p in model.named_parameters()}
    state = optimizer.state_dict()
    assert state["state"]
    values = {i: {n: whole(v) for n, v in one.items()} for i, one in state["state"].items()}
    return {"weights": weights, "optimizer": {**state, "state": values}, "random": random_states()}


def whole(value: Any) -> Any:
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return value.detach().clone() if isinstance(value, Tensor) else value


def fit(folder: Path, how: str | None, **more: Any) -> tuple[dict[str, Any], Any, Any]:
    from transformers import Trainer, TrainingArguments

    lora, shard = more.pop("lora", False), more.pop("shard", False)
    model = language_model(tied=not shard)
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
    if shard:
        shard_over_ranks(trainer)
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


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """For trl's SFT: by ops of torch, from the scores."""
    flat = outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    count = (flat[1] != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return F.cross_entropy(*flat, reduction="sum") / count


def fit_sft(folder: Path, watched: bool, **more: Any) -> tuple[dict[str, Any], Any, Any]:
    """Three steps of trl's SFT, whose loss is its own."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    settings = {"bf16": False, "gradient_checkpointing": False} | more
    lora, shard = settings.pop("lora", False), settings.pop("shard", False)
    loss = settings.pop("loss", None)
    args = SFTConfig(
        output_dir=str(folder / "out"), max_steps=3, per_device_train_batch_size=4,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, max_length=16,
        pad_token="<pad>", **settings,
    )  # fmt: skip
    data = Dataset.from_list([{"input_ids": r["input_ids"]} for r in rows()])
    model = language_model(tied=not shard)
    config = LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1) if lora else None
    torch.manual_seed(1)
    trainer = SFTTrainer(
        model, args, train_dataset=data, processing_class=tokenizer(), peft_config=config,
        compute_loss_func=loss,
    )  # fmt: skip
    watch = pergrad.Watch(folder / "run", every=1)
    if watched:
        watch.attach(trainer)
    if shard:
        shard_over_ranks(trainer)
    trainer.train()
    state = state_of(trainer.model, trainer.optimizer)
    watch.close()
    return state, watch, trainer


def fit_dpo(folder: Path, watched: bool) -> tuple[dict[str, Any], Any, Any]:
    """Three steps of trl's DPO: an example is a pair, whose texts are two rows."""
    from datasets import Dataset
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from trl import DPOConfig, DPOTrainer

    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    generator = torch.Generator().manual_seed(0)

    def text(n: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(2, 60, (n,), generator=generator).tolist())

    pairs = [
        {"prompt": text(3), "chosen": " " + text(2 + i % 3), "rejected": " " + text(3)}
        for i in range(24)
    ]
    args = DPOConfig(
        output_dir=str(folder / "out"), max_steps=3, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, bf16=False, max_length=16,
        gradient_checkpointing=False,
    )  # fmt: skip
    torch.manual_seed(1)
    trainer = DPOTrainer(
        language_model(), ref_model=language_model(), args=args, processing_class=words,
        train_dataset=Dataset.from_list(pairs),
    )  # fmt: skip
    watch = pergrad.Watch(folder / "run", every=1)
    if watched:
        watch.attach(trainer, examples=lambda inputs: len(inputs["input_ids"]) // 2)
    trainer.train()
    state = state_of(trainer.model, trainer.optimizer)
    watch.close()
    return state, watch, trainer


LIGHTNING: list[dict[str, Any]] = [
    {},
    {"accumulate": 2},
    {"by_hand": True},
    {"precision": "bf16-mixed"},
    {"recompute": True},
    {"lora": True},
    {"accumulate": 2, "precision": "bf16-mixed", "recompute": True, "lora": True},
]


class Classifier(nn.Module):
    """A perceptron whose first block may be computed again, and trained by LoRA alone."""

    def __init__(self, lora: bool, recompute: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        block: nn.Module = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.1), nn.ReLU())
        self.head = nn.Linear(8, 3)
        if lora:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=2, target_modules=["0"], lora_dropout=0.1)
            block = get_peft_model(block, config)
            self.head.requires_grad_(False)
        self.block, self.recompute = block, recompute

    def forward(self, x: Tensor) -> Tensor:
        inner = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        return self.head(inner)


def fit_lightning(
    folder: Path, watched: bool, *, by_hand: bool = False, accumulate: int = 1,
    precision: str = "32-true", recompute: bool = False, lora: bool = False, shard: bool = False,
    **more: Any,
) -> tuple[dict[str, Any], Any, Any]:  # fmt: skip
    """An epoch of ten batches in a lightning.Trainer."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Classifier(lora, recompute)
            self.automatic_optimization = not by_hand

        def configure_model(self) -> None:
            if shard:
                from torch.distributed.fsdp import fully_shard

                fully_shard(self.net.block, mesh=self.device_mesh["data_parallel"])
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            if by_hand:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    lightning.seed_everything(0)
    x, y = torch.randn(40, 5), torch.randint(3, (40,))
    data = torch.utils.data.TensorDataset(x, y)
    watch = pergrad.Watch(folder / "run", every=2)
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[watch.lightning()] if watched else [],
        gradient_clip_val=None if by_hand else 0.1, accumulate_grad_batches=accumulate,
        precision=precision, default_root_dir=folder, **more,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    state = state_of(module, trainer.optimizers[0])
    watch.close()
    return state, watch, trainer
