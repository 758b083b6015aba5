"""Watching inside trainers of others: all is the same to the bit, numbers are those of the loop.

What is compared: weights, the optimizer's state, and every random state.

`make integrations` installs the trainers and runs these.
"""

import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from fits import (
    LIGHTNING,
    SETTINGS,
    collate,
    fit,
    fit_dpo,
    fit_lightning,
    fit_sft,
    language_model,
    rows,
)
from helpers import assert_same
from torch import nn

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


@pytest.mark.parametrize(
    "more", [s for s in SETTINGS if "label_smoothing_factor" not in s],
    ids=lambda m: "+".join(m) or "plain",
)  # fmt: skip
def test_trl(tmp_path: Path, more: dict[str, Any]) -> None:
    plain, _, _ = fit_sft(tmp_path / "plain", False, **more)
    watched, watch, _ = fit_sft(tmp_path / "watched", True, **more)
    assert_same(plain, watched)
    assert watch.failures == []
    steps = pergrad.open_watch(tmp_path / "watched" / "run").steps()
    micro = more.get("gradient_accumulation_steps", 1)
    assert steps["examples"].to_pylist() == [4 * micro] * 3


def test_dpo(tmp_path: Path) -> None:
    plain, _, _ = fit_dpo(tmp_path / "plain", False)
    watched, watch, _ = fit_dpo(tmp_path / "watched", True)
    assert_same(plain, watched)
    assert watch.failures == []
    run = pergrad.open_watch(tmp_path / "watched" / "run")
    assert run.steps()["examples"].to_pylist() == [4, 4, 4]  # pairs
    assert all(norm > 0 for norm in run.examples()["norm"].to_pylist())


@pytest.mark.parametrize("more", LIGHTNING, ids=lambda m: "+".join(m) or "plain")
def test_lightning(tmp_path: Path, more: dict[str, Any]) -> None:
    plain, _, _ = fit_lightning(tmp_path / "plain", False, **more)
    watched, watch, _ = fit_lightning(tmp_path / "watched", True, **more)
    assert_same(plain, watched)
    assert watch.failures == []
    accumulate = more.get("accumulate", 1)
    steps = pergrad.open_watch(tmp_path / "watched" / "run").steps().to_pylist()
    assert [row["step"] for row in steps] == list(range(0, 10 // accumulate, 2))
    assert all(row["examples"] == 4 * accumulate for row in steps)
    assert all(row["noise_scale"] is not None for row in steps)


@pytest.mark.parametrize("block", [False, True])
def test_lightning_and_a_pass_that_it_does_not_see(tmp_path: Path, block: bool) -> None:
    """The callback says so; a block in the module reads it."""
    import lightning

    class Clipped(lightning.LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(5, 1)

        def training_step(self, batch: Any, _: int) -> None:
            losses = self.net(batch[0]).square().squeeze(1)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            clip = pergrad.clip(1.0, mean=True)
            if block:
                with watch(losses, self, keys=watch.keys_of(batch), step=self.global_step):
                    pergrad.backward(losses, self, weights=clip)
            else:
                pergrad.backward(losses, self, weights=clip)
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    watch = pergrad.Watch(tmp_path / "run", every=2)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 5)), 8)
    lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, callbacks=[] if block else [watch.lightning()],
    ).fit(Clipped(), data)  # fmt: skip
    watch.close()
    if block:
        assert watch.failures == []
        assert pergrad.open_watch(tmp_path / "run").steps()["step"].to_pylist() == [0, 2]
    else:
        (said,) = watch.failures
        assert re.search(r"has read nothing(.|\n)*with watch\(losses, self", said)


def test_callbacks_of_the_other_trainer(tmp_path: Path) -> None:
    watch = pergrad.Watch(tmp_path)
    with pytest.raises(AttributeError, match=r"pass `watch\.lightning\(\)` to a lightning"):
        watch.hf().on_exception  # noqa: B018
    with pytest.raises(AttributeError, match=r"pass `watch\.hf\(\)` to transformers'"):
        watch.lightning().on_init_end  # noqa: B018
    import transformers

    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    for wrong in (watch, watch.hf, watch.lightning()):
        with pytest.raises(AttributeError, match=r"`watch\.hf\(\)`"):
            transformers.Trainer(nn.Linear(1, 1), arguments, callbacks=[wrong])


class Normed(nn.Module):
    """Pictures to classes through batch norm, which makes every loss depend on all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
        )

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        return {"loss": F.cross_entropy(self.net(pixel_values), labels)}


@pytest.mark.parametrize("how", ["hf", "attach", "lightning"])
def test_batch_norm_is_read_for_who_pays(tmp_path: Path, how: str) -> None:
    torch.manual_seed(0)
    model, x, y = Normed(), torch.randn(4, 1, 8, 8), torch.arange(4) % 3
    losses = F.cross_entropy(model.net(x), y, reduction="none")
    norms = naive.norms(naive.loop_grads(losses, model))
    watch = pergrad.Watch(tmp_path / "run")
    train = _fit_lightning if how == "lightning" else _fit_transformers
    train(tmp_path, watch, how, model, x, y)
    watch.close()
    assert watch.failures == []
    table = pergrad.open_watch(tmp_path / "run").examples().to_pylist()
    assert sorted(r["norm"] for r in table) == pytest.approx(sorted(norms.tolist()), rel=1e-4)


def _fit_transformers(
    folder: Path, watch: pergrad.Watch, how: str, model: Normed, x: torch.Tensor, y: torch.Tensor
) -> None:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=1, per_device_train_batch_size=4,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"pixel_values": a, "labels": int(b)} for a, b in zip(x, y, strict=True)]
    own = [watch.hf(on_mixing="exact")] if how == "hf" else []
    trainer = Trainer(model, args, train_dataset=data, callbacks=own)
    if how == "attach":
        watch.attach(trainer, on_mixing="exact")
    trainer.train()


def _fit_lightning(
    folder: Path, watch: pergrad.Watch, how: str, model: Normed, x: torch.Tensor, y: torch.Tensor
) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> Any:
            return self.model(*batch)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4)
    lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, callbacks=[watch.lightning(on_mixing="exact")],
    ).fit(Module(), data)  # fmt: skip


def test_options_of_callbacks_are_checked_when_they_are_made(tmp_path: Path) -> None:
    import transformers

    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = transformers.Trainer(nn.Linear(1, 1), args)
    watch = pergrad.Watch(tmp_path / "run")
    for make in (watch.hf, watch.lightning, lambda **given: watch.attach(trainer, **given)):
        with pytest.raises(pergrad.UsageError, match=r"no option mixing(.|\n)*on_mixing"):
            make(mixing="exact")
        with pytest.raises(pergrad.UsageError, match=r'on_mixing is "raise" or "exact"'):
            make(on_mixing="yes")
    assert trainer.compute_loss.__func__ is transformers.Trainer.compute_loss
