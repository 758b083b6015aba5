"""Watching a run: its numbers are the loop's, and the run is the same to the bit."""

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
from torch import Tensor, nn

import pergrad
from pergrad.graph import nodes
from pergrad.training import recorder
from pergrad.training.other_run import difference
from pergrad.training.run_folder import RunFolder
from pergrad.training.step_numbers import Piece


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.ERROR, "pergrad.watch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        yield


def model_of(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)
    return nn.Sequential(*layers).to(dtype)


def batch(step: int, size: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (size,), generator=generator)


def train(watch: Any, steps: Any, model: nn.Module, micro: int = 1, **more: Any) -> list[Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in steps:
        for k in range(micro):
            x, y = batch(micro * step + k, dtype=next(model.parameters()).dtype)
            loss = F.cross_entropy(model(x), y) / micro
            if watch is None:
                loss.backward()
                continue
            keys = [f"{step}/{k}/{i}" for i in range(len(x))]
            with watch(loss, model, len(x), keys=keys, step=step, **more):
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("micro", [1, 3])
def test_weights_are_the_same_to_the_bit(tmp_path: Path, micro: int, dtype: torch.dtype) -> None:
    plain = train(None, range(7), model_of(dtype), micro)
    state = torch.get_rng_state()
    with pergrad.Watch(tmp_path, every=2, groups="layer", clip=1.0) as watch:
        watched = train(watch, range(7), model_of(dtype), micro)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert watch.failures == []
    run = pergrad.open_watch(tmp_path)
    assert run.steps()["step"].to_pylist() == [0, 2, 4, 6]
    assert len(run.examples()) == 4 * 6 * micro


@pytest.mark.parametrize("micro", [1, 2])
def test_numbers_are_those_of_the_loop(tmp_path: Path, micro: int) -> None:
    model = model_of().eval()
    with pergrad.Watch(tmp_path, every=1, groups="layer", clip=0.5) as watch:
        train(watch, [0], model, micro)
    model = model_of().eval()
    losses = torch.cat(
        [F.cross_entropy(model(x), y, reduction="none") for x, y in map(batch, range(micro))]
    )
    rows = naive.loop_grads(losses, model)
    norms = naive.norms(rows)
    losses.mean().backward()
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    table = pergrad.open_watch(tmp_path).examples()
    n = len(norms)
    assert torch.allclose(
        torch.tensor(table["norm"].to_pylist(), dtype=torch.float64), norms, rtol=1e-9
    )
    assert torch.allclose(
        torch.tensor(table["loss"].to_pylist(), dtype=torch.float64), losses, rtol=1e-9
    )
    assert table["weight"].to_pylist() == pytest.approx([1 / n] * n, rel=1e-12)
    assert table["key"].to_pylist() == [f"0/{k}/{i}" for k in range(micro) for i in range(6)]
    (row,) = pergrad.open_watch(tmp_path).steps().to_pylist()
    assert row["loss"] == pytest.approx(float(losses.detach().mean()), rel=1e-9)
    assert row["grad_norm"] == pytest.approx(float(total), rel=1e-9)
    assert row["max"] == pytest.approx(float(norms.max()), rel=1e-9)
    assert row["p50"] == pytest.approx(float(norms.quantile(0.5)), rel=1e-9)
    assert row["clipped"] == pytest.approx(float((norms > 0.5).double().mean()))
    assert row["cosine"] == pytest.approx(float(total / norms.mean()), rel=1e-9)
    reference = pergrad.NoiseScale()
    reference.add(norms, total)
    assert row["noise_scale"] == pytest.approx(reference.value, rel=1e-9)
    head = torch.cat([rows[n].flatten(1) for n in ("3.weight", "3.bias")], 1).norm(dim=1)
    assert row["norm:3"] == pytest.approx(float(head.median()), rel=1e-9)


def test_lengths(tmp_path: Path) -> None:
    """Norms are of an example's own mean loss; scores are those of its sum by the root of n."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7)).double()
    ids, labels = torch.randint(7, (3, 8)), torch.randint(7, (3, 8))
    labels[0, 2:] = labels[2] = -100
    with pergrad.Watch(tmp_path) as watch:
        loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        with watch(loss, model, 3):
            loss.backward()
    each = F.cross_entropy(model(ids).transpose(1, 2), labels, reduction="none")
    tokens = torch.tensor([2.0, 8.0, 0.0], dtype=torch.float64)
    norms = naive.norms(naive.loop_grads(each.sum(1) / tokens.clamp(min=1), model))
    table = pergrad.open_watch(tmp_path).examples()
    assert table["tokens"].to_pylist() == [2, 8, 0]
    assert table["norm"].to_pylist() == pytest.approx(norms.tolist(), rel=1e-9)
    scores = norms * (tokens / (10 / 3)).sqrt()
    assert table["score"].to_pylist() == pytest.approx(scores.tolist(), rel=1e-9)
    assert table["weight"].to_pylist() == pytest.approx([0.2, 0.8, 0.0])


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    model = model_of()
    with pergrad.Watch(tmp_path, every=2) as watch:
        train(watch, range(6), model)
    before = pergrad.open_watch(tmp_path).examples()
    with pergrad.Watch(tmp_path, every=2) as watch:  # from a checkpoint of step 3
        train(watch, range(3, 9), model)
    run = pergrad.open_watch(tmp_path)
    assert run.steps()["step"].to_pylist() == [0, 2, 4, 6, 8]
    assert run.examples().slice(0, len(before)).equals(before)
    with pergrad.Watch(tmp_path, every=2) as watch:  # counted by itself: after the last
        for _ in range(4):
            loss = model(batch(0)[0]).square().sum(1).mean()
            with watch(loss, model, 6):
                loss.backward()
            model.zero_grad()
    assert run.steps()["step"].to_pylist() == [0, 2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("steps", [[10, 20], [0]])
def test_the_folder_of_another_run(tmp_path: Path, steps: list[int]) -> None:
    """Also where its steps are there already."""
    with pergrad.Watch(tmp_path) as watch:
        train(watch, [0], model_of())
    other = nn.Linear(4, 3).double()
    plain = train(None, [0, 10], nn.Linear(4, 3).double())
    assert plain
    with pergrad.Watch(tmp_path) as watch:
        train(watch, steps, other)
    assert len(watch.failures) == 1
    assert "another run" in watch.failures[0]
    assert "a folder of its own" in watch.failures[0]
    assert pergrad.open_watch(tmp_path).steps()["step"].to_pylist() == [0]


def test_steps_that_are_stored_are_said_once(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.WARNING, "pergrad.watch")
    for _ in range(2):
        with pergrad.Watch(tmp_path, every=1) as watch:
            train(watch, range(3), model_of())
    (said,) = [r.getMessage() for r in caplog.records]
    assert re.search(r"has step 0(.|\n)*not read again(.|\n)*a folder of its own", said)
    assert watch.failures == [said]
    page = watch.report(tmp_path / "report.html").read_text()
    assert "Said at 2" in page
    assert "has step 0 of this run already" in page
    caplog.clear()
    with pergrad.Watch(tmp_path, every=1) as watch:  # of a checkpoint: it is the same run
        train(watch, range(1, 5), model_of())
    assert watch.failures == []
    (said,) = [r.getMessage() for r in caplog.records]
    assert "has step 1" in said


def other_keys(watch: pergrad.Watch) -> None:
    """The losses and norms that were there, of examples with other names."""
    model = model_of()
    x, y = batch(0)
    loss = F.cross_entropy(model(x), y)
    with watch(loss, model, 6, keys=range(6), step=0):
        loss.backward()


def other_size(watch: pergrad.Watch) -> None:
    model = model_of()
    loss = F.cross_entropy(model(batch(0, 5)[0]), batch(0, 5)[1])
    with watch(loss, model, 5, step=0):
        loss.backward()


def other_model(watch: pergrad.Watch) -> None:
    torch.manual_seed(1)
    layers = nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)
    train(watch, range(5), nn.Sequential(*layers).double())


@pytest.mark.parametrize(
    ("begin", "match"),
    [(other_keys, r"its row 0 was the example 0/0/0 and is 0\."),
     (other_size, r"it had 6 examples and has 5"),
     (other_model, r"the loss of its row \d, the example 0/0/\d, was \d\.\d+ and is \d\.\d+")],
)  # fmt: skip
def test_another_run_of_the_same_model(tmp_path: Path, begin: Any, match: str) -> None:
    """Also where it would go on behind the steps that are there."""
    with pergrad.Watch(tmp_path / "run", every=1) as watch:
        train(watch, range(3), model_of())
    before = pergrad.open_watch(tmp_path / "run").examples()
    with pergrad.Watch(tmp_path / "run", every=1) as watch:
        begin(watch)
        train(watch, range(1, 9), model_of())
    assert pergrad.open_watch(tmp_path / "run").examples().equals(before)
    (said,) = watch.failures
    assert re.search(match, said)
    assert f"its own, such as {tmp_path / 'run-2'}, or delete the old one" in " ".join(said.split())
    with pytest.raises(pergrad.StoreError, match=match):
        watch.report(tmp_path / "run.html")
    assert not (tmp_path / "run.html").exists()


def test_norms_tell_another_run_where_losses_do_not() -> None:
    """As those of a head that is 0."""
    ones = torch.ones(3, dtype=torch.float64)
    rows = {"key": [None] * 3, "loss": [1.0] * 3, "norm": [1.0, 2.0, float("nan")]}

    def now(*norms: float) -> Piece:
        return Piece(ones, ones, ones, torch.tensor(norms, dtype=torch.float64), None)

    assert difference(rows, now(1.001, 1.999, 7.0)) is None  # by rounding
    assert difference(rows, now(1.0, 2.5, 7.0)) == "the norm of its row 1 was 2 and is 2.5"
    assert difference({**rows, "norm": [float("nan")] * 3}, now(1.0, 2.5, 7.0)) is None


def test_another_run_leaves_the_step_alone(tmp_path: Path) -> None:
    with pergrad.Watch(tmp_path, every=1) as watch:
        train(watch, range(2), model_of())
    plain, watched = (nn.Linear(4, 3).double() for _ in range(2))
    watched.load_state_dict(plain.state_dict())
    with pergrad.Watch(tmp_path / "other", every=1) as watch:
        train(watch, range(2), nn.Linear(4, 3).double())
    with pergrad.Watch(tmp_path / "other", every=1) as watch:
        after = train(watch, range(4), watched, micro=2)
    assert len(watch.failures) == 1
    assert "it had 6 examples and has 12" in watch.failures[0]
    assert all(
        torch.equal(a, b) for a, b in zip(train(None, range(4), plain, 2), after, strict=True)
    )


def test_a_run_that_must_be_new(tmp_path: Path) -> None:
    with pergrad.Watch(tmp_path / "run", every=1, resume=False) as watch:
        train(watch, range(2), model_of())
    (tmp_path / "run-2").mkdir()
    with pytest.raises(pergrad.StoreError, match=r"already, and resume is False(.|\n)*run-3, or"):
        pergrad.Watch(tmp_path / "run", resume=False)


def test_steps_counted_on_are_said(tmp_path: Path) -> None:
    for _ in range(2):
        with pergrad.Watch(tmp_path, every=1) as watch:
            for _ in range(3):
                model = model_of()
                loss = model(batch(0)[0]).square().sum(1).mean()
                with watch(loss, model, 6):
                    loss.backward()
    (said,) = watch.failures
    assert "has 3 watched steps already, so these are counted on from 3" in said
    assert "resume=False" in said
    assert len(pergrad.open_watch(tmp_path).steps()) == 6


def test_folders_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(pergrad.StoreError, match=r"thesis\.tex(.|\n)*a folder of its own"):
        pergrad.Watch(tmp_path)
    file = tmp_path / "thesis.tex"
    with pytest.raises(pergrad.StoreError, match=r"is a file(.|\n)*folder of its own"):
        pergrad.Watch(file)
    with pytest.raises(pergrad.StoreError, match=r"no watched run(.|\n)*Check the path"):
        pergrad.open_watch(tmp_path / "nothing")
    for text, match in [
        ('{"format": "pergrad scores"}', r"scores of a data set(.|\n)*folder of its own"),
        ("no json", r"something else(.|\n)*folder of its own"),
        ('{"format": "pergrad run", "version": 99}', r"version 99(.|\n)*Read it with"),
        ('{"format": "pergrad run", "version": 1}', r"no model of(.|\n)*Bring the file back"),
    ]:
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(pergrad.StoreError, match=match):
            pergrad.open_watch(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(pergrad.StoreError, match=r"Cannot read(.|\n)*permissions"):
        pergrad.open_watch(tmp_path)


def test_damage_is_seen(tmp_path: Path) -> None:
    with pergrad.Watch(tmp_path) as watch:
        train(watch, [0], model_of())
    (part,) = (tmp_path / "steps").iterdir()
    content = part.read_bytes()
    (tmp_path / "steps" / part.name.replace("-1-", "-2-")).write_bytes(content)
    with pytest.raises(pergrad.StoreError, match=r"Step 0 is in(.|\n)*Take them out"):
        pergrad.open_watch(tmp_path).steps()
    part.write_bytes(content[:-1] + b"?")
    with pytest.raises(pergrad.StoreError, match=r"not what was written(.|\n)*read without it"):
        pergrad.open_watch(tmp_path).steps()
    with pergrad.Watch(tmp_path) as watch:  # training goes on
        train(watch, [10], model_of())
    assert "not what was written" in watch.failures[0]


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("no room")])
@pytest.mark.parametrize("at", ["begin", "pass", "numbers"])
def test_a_failure_of_ours(tmp_path: Path, monkeypatch, at: str, error: Exception) -> None:
    from pergrad.engine.pass_ import Pass
    from pergrad.training import reader

    def fails(*_: Any, **__: Any) -> None:
        raise error

    plain = train(None, range(4), model_of())
    with monkeypatch.context() as patched:
        if at == "begin":
            patched.setattr(reader, "walk", fails)
        elif at == "pass":
            patched.setattr(Pass, "serve", fails)
        else:
            patched.setattr(recorder, "step_numbers", fails)
        with pergrad.Watch(tmp_path, every=1) as watch:
            watched = train(watch, range(4), model_of())
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert len(watch.failures) == 1
    assert "no room" in watch.failures[0]


def test_a_disk_that_takes_nothing(tmp_path: Path, monkeypatch, caplog) -> None:
    from pergrad import folders

    caplog.set_level(logging.WARNING, "pergrad.watch")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recorder, "SECONDS_PER_PART", 0.0)
    monkeypatch.setattr(recorder, "SHARE_PER_PART", 0.0)
    plain = train(None, range(4), model_of())
    with pergrad.Watch(tmp_path, every=1) as watch:
        with monkeypatch.context() as patched:
            patched.setattr(folders, "write", full)
            watched = train(watch, range(4), model_of())
            watch.flush()
        said = [r.getMessage() for r in caplog.records]
        assert len(said) == 1
        assert "No space left" in said[0]
        assert "Make room" in said[0]
        assert not (tmp_path / "manifest.json").exists()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    # what waited is there once the disk takes it
    assert pergrad.open_watch(tmp_path).steps()["step"].to_pylist() == [0, 1, 2, 3]


def test_rows_that_wait_are_bounded(tmp_path: Path, monkeypatch) -> None:
    from pergrad import folders

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "write", full)
    monkeypatch.setattr(recorder, "MOST_ROWS", 10)
    monkeypatch.setattr(recorder, "SECONDS_PER_PART", 0.0)
    monkeypatch.setattr(recorder, "SHARE_PER_PART", 0.0)
    watch = pergrad.Watch(tmp_path, every=1)
    train(watch, range(4), model_of())
    assert any("wait for the disk" in words for words in watch.failures)
    assert len(watch._recorder._examples) == 12


def test_a_second_writer(tmp_path: Path) -> None:
    """Of another process; one of this process takes over."""
    first = pergrad.Watch(tmp_path, every=1)
    train(first, [0], model_of())
    second = pergrad.Watch(tmp_path, every=1)
    train(second, [1], model_of())
    second.flush()
    assert first.failures == second.failures == []
    other = recorder.Recorder(RunFolder(tmp_path), None, 0, None)
    with pytest.raises(pergrad.StoreError, match=r"Another run is writing(.|\n)*another folder"):
        other.folder.take(0)
    second.close()
    assert pergrad.open_watch(tmp_path).steps()["step"].to_pylist() == [0, 1]


def test_rows_are_written_when_the_watch_is_forgotten(tmp_path: Path) -> None:
    watch = pergrad.Watch(tmp_path, every=1)
    train(watch, [0, 1, 2], model_of())
    del watch
    assert pergrad.open_watch(tmp_path).steps()["step"].to_pylist() == [0, 1, 2]


def test_mixed_examples_are_noted(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with pergrad.Watch(tmp_path, every=1) as watch:
        train(watch, range(3), model)
    assert len(watch.failures) == 1
    assert "batch_norm" in watch.failures[0]
    rows = pergrad.open_watch(tmp_path).steps().to_pylist()
    assert [row["examples"] for row in rows] == [0, 0, 0]
    assert all("batch_norm" in row["note"] for row in rows)


@pytest.mark.parametrize(
    ("more", "match"),
    [({"keys": ["a"]}, r"`keys` has 1 entries, for 6"), ({"step": -1}, r"`step` is -1"),
     ({"step": 1.5}, r"`step` is 1\.5"), ({"examples": 4}, r"4 examples do not divide"),
     ({"colour": 1}, r"no option colour"),
     ({"example": 6}, r"no option example(.|\n)*Did you mean `examples`\?(.|\n)*keys and step"),
     ({"model": None}, r"NoneType")],
)  # fmt: skip
def test_bad_input_stays_out_of_the_step(tmp_path: Path, more: dict, match: str) -> None:
    model = model_of()
    x, y = batch(0)
    loss = F.cross_entropy(model(x), y)
    given = {"loss": loss, "model": model, "examples": 6, "keys": None} | more
    with pergrad.Watch(tmp_path) as watch:
        with watch(**given):
            loss.backward()
        with watch(F.cross_entropy(model(x), y), model, 6, step=10) as read:
            pass
        assert read is not None
    assert model[0].weight.grad is not None
    import re

    assert re.search(match, watch.failures[0])
    assert "No backward pass came by" in watch.failures[1]


def test_the_users_exception_passes(tmp_path: Path) -> None:
    model = model_of()
    loss = F.cross_entropy(model(batch(0)[0]), batch(0)[1])
    with pergrad.Watch(tmp_path) as watch:
        with pytest.raises(KeyError, match="theirs"), watch(loss, model, 6):
            raise KeyError("theirs")
        assert "KeyError" in watch.failures[0]
    assert not nodes.hooks_of_node(loss.grad_fn)


@pytest.mark.parametrize(
    ("more", "match"),
    [({"every": 0}, "every"), ({"every": True}, "every"), ({"keep": -1}, "keep"),
     ({"groups": "all"}, "layer"), ({"clip": 0}, "clip"), ({"show": 3}, "show"),
     ({"log": "x"}, "log")],
)  # fmt: skip
def test_arguments(tmp_path: Path, more: dict, match: str) -> None:
    with pytest.raises(pergrad.UsageError, match=match):
        pergrad.Watch(tmp_path, **more)
    assert not list(tmp_path.iterdir())


def test_gradients_left_from_before(tmp_path: Path) -> None:
    """Without a step's number micro-batches cannot be told from steps: no noise scale, and said."""
    model = model_of()
    with pergrad.Watch(tmp_path, every=1) as watch:
        for k in range(3):
            x, y = batch(k)
            loss = F.cross_entropy(model(x), y)
            with watch(loss, model, 6):
                loss.backward()
    assert "pass their step's number" in watch.failures[0]
    noise = pergrad.open_watch(tmp_path).steps()["noise_scale"].to_pylist()
    assert noise[0] is not None
    assert noise[1:] == [None, None]


@pytest.mark.parametrize("size", [0, 1])
def test_few_examples(tmp_path: Path, size: int) -> None:
    model = model_of()
    x, _ = batch(0, size)
    with pergrad.Watch(tmp_path) as watch:
        losses = model(x).square().sum(1)
        with watch(losses, model):
            losses.sum().backward()
    assert watch.failures == []
    (row,) = pergrad.open_watch(tmp_path).steps().to_pylist()
    assert row["examples"] == size
    assert row["noise_scale"] is None


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    model = model_of()
    logged: list[dict[str, float]] = []
    with pergrad.Watch(tmp_path, every=1, log=lambda numbers, _: logged.append(numbers)) as watch:
        for factor in (1.0, float("nan"), 1.0):
            x, y = batch(0)
            loss = F.cross_entropy(model(x), y) * factor
            with watch(loss, model, 6):
                loss.backward()
            model.zero_grad()
    assert watch.failures == []
    assert watch.noise.steps == 2
    assert "pergrad/norm/p50" not in logged[1]
    assert logged[0]["pergrad/norm/p50"] > 0
    table = pergrad.open_watch(tmp_path).examples()
    assert table["outlier"].to_pylist()[6:12] == [True] * 6


def test_a_spike_names_its_examples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    logged: list[tuple[int, dict[str, float]]] = []
    pictures: list[str] = []

    def show(key: int) -> str:
        pictures.append(key)
        return f"text of {key}"

    with pergrad.Watch(
        tmp_path, every=1, show=show, clip=1.0, groups="layer",
        log=lambda numbers, step: logged.append((step, numbers)),
    ) as watch:  # fmt: skip
        for step in range(12):
            x = torch.randn(8, 4, dtype=torch.float64)
            if step == 9:
                x[5] *= 100
            loss = F.mse_loss(model(x).squeeze(1), torch.ones(8, dtype=torch.float64))
            with watch(loss, model, 8, keys=torch.arange(8 * step, 8 * step + 8)):
                loss.backward()
            model.zero_grad()
    run = pergrad.open_watch(tmp_path)
    (spike,) = run.spikes()
    assert spike["step"] == 9
    assert "most of it from 77 (100 %)" in spike["spike"]
    assert watch.spikes == [f"step 9: {spike['spike']}"]
    first = run.top(3).to_pylist()[0]
    assert first["key"] == "77"
    assert first["times"] == 1
    assert first["step"] == 9
    assert 77 in pictures
    assert RunFolder(tmp_path).shown()["77"] == ("text", None, b"text of 77")
    assert [step for step, _ in logged] == list(range(12))
    names = {
        *(f"pergrad/norm/{n}" for n in ("p1", "p10", "p50", "p90", "p99", "max", "weight", "bias")),
        *(f"pergrad/{n}" for n in ("zero", "clipped", "top_share", "cosine", "outliers")),
        "pergrad/noise_scale/low",
    }
    assert names <= set(logged[-1][1])
    assert set(logged[-1][1]) - names <= {"pergrad/noise_scale", "pergrad/noise_scale/high"}


def epochs(folder: Path, rows: int, scale: float = 1.0) -> pergrad.Watch:
    """30 epochs in batches of 64, as a DataLoader makes them; one full batch scaled."""
    torch.manual_seed(0)
    model, step = nn.Linear(10, 3).double(), 0
    x, y = torch.randn(rows, 10, dtype=torch.float64), torch.randint(3, (rows,))
    with pergrad.Watch(folder, every=1) as watch:
        for epoch in range(30):
            for some in torch.randperm(rows).split(64):
                factor = scale if epoch == 20 and len(some) == 64 else 1.0
                losses = F.cross_entropy(model(factor * x[some]), y[some], reduction="none")
                with watch(losses, model, keys=some, step=step):
                    losses.mean().backward()
                with torch.no_grad():
                    for p in model.parameters():
                        p -= 0.5 * p.grad
                model.zero_grad()
                step += 1
    return watch


def test_clipped_while_watched(tmp_path: Path) -> None:
    """`pergrad.backward` in the block: the step is the same, and it is read."""

    def trained(watch: pergrad.Watch | None) -> list[Tensor]:
        model = model_of()
        for step in range(4):
            x, y = batch(step)
            losses = F.cross_entropy(model(x), y, reduction="none")
            clipped = pergrad.clip(0.5, mean=True)
            if watch is None:
                pergrad.backward(losses, model, weights=clipped)
            else:
                with watch(losses, model, keys=range(6), step=step):
                    pergrad.backward(losses, model, weights=clipped)
            with torch.no_grad():
                for p in model.parameters():
                    p -= p.grad
            model.zero_grad()
        return list(model.parameters())

    with pergrad.Watch(tmp_path, every=1, groups="layer") as watch:
        watched = trained(watch)
    assert watch.failures == []
    assert all(torch.equal(a, b) for a, b in zip(trained(None), watched, strict=True))
    run = pergrad.open_watch(tmp_path)
    model = model_of()
    x, y = batch(0)
    losses = F.cross_entropy(model(x), y, reduction="none")
    norms = naive.norms(naive.loop_grads(losses, model))
    table = run.examples().slice(0, 6)
    assert table["norm"].to_pylist() == pytest.approx(norms.tolist(), rel=1e-9)
    weights = (0.5 / norms).clamp(max=1) / 6
    assert table["weight"].to_pylist() == pytest.approx(weights.tolist(), rel=1e-9)
    (first, *_) = run.steps().to_pylist()
    assert first["norm:3"] > 0
    assert first["noise_scale"] is not None


def test_a_short_last_batch_is_no_spike(tmp_path: Path) -> None:
    """Its gradient is larger, because fewer examples average out less."""
    watch = epochs(tmp_path / "run", 69)
    rows = pergrad.open_watch(tmp_path / "run").steps().to_pylist()
    whole, short = ([r["grad_norm"] for r in rows if r["examples"] == n] for n in (64, 5))
    assert max(short) > 3 * sorted(whole)[15]  # so it would have been one
    assert watch.spikes == []
    (spike,) = epochs(tmp_path / "other", 69, scale=30.0).spikes[:1]
    assert spike.startswith("step 40:")


def test_outliers_that_come_again(tmp_path: Path) -> None:
    """Ranked by how often they stood out; against the running median, not one step's."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    x = F.normalize(torch.randn(8, 4, dtype=torch.float64), dim=1)
    with pergrad.Watch(tmp_path, every=1, keep=1) as watch:
        for step in range(10):
            y = x.clone()
            y[3] *= 12  # a wrong label, each time
            if step == 5:
                y[1] *= 1000
            losses = model(y).squeeze(1).sub(1).square()
            with watch(losses, model, keys=list("abcdefgh")):
                losses.mean().backward()
            model.zero_grad()
    table = pergrad.open_watch(tmp_path).top(2)
    assert table["key"].to_pylist() == ["d", "b"]
    head, first, _ = str(table).splitlines()
    assert head.split()[:3] == ["key", "times", "seen"]
    assert first.split()[:3] == ["d", "10", "10"]
    assert table.schema.names[0] == "key"
    assert table["times"].to_pylist()[0] == 10
    assert pergrad.open_watch(tmp_path).top(1, by="ratio")["key"].to_pylist() == ["b"]
    with pytest.raises(pergrad.UsageError, match=r"Rank by"):
        pergrad.open_watch(tmp_path).top(1, by="colour")
    with pytest.raises(pergrad.UsageError, match=r"at least one"):
        pergrad.open_watch(tmp_path).top(0)


def test_a_log_and_a_show_that_fail(tmp_path: Path) -> None:
    model = nn.Linear(4, 1).double()

    def fails(*_: Any) -> None:
        raise ValueError("theirs")

    with pergrad.Watch(tmp_path, every=1, log=fails, show=fails) as watch:
        for _ in range(3):
            x = torch.randn(8, 4, dtype=torch.float64)
            x[2] *= 1000
            losses = model(x).squeeze(1).square()
            with watch(losses, model, keys=range(8)):
                losses.mean().backward()
            model.zero_grad()
    assert watch.failures == ["`log` raised ValueError: theirs"]
    assert RunFolder(tmp_path).shown()["2"][0] == "error"


def test_a_penalty_beside_the_examples(tmp_path: Path) -> None:
    """What belongs to no example is left out on request, and so is the noise scale."""
    model = model_of().eval()
    with pergrad.Watch(tmp_path) as watch:
        x, y = batch(0)
        loss = F.cross_entropy(model(x), y) + 0.1 * model[0].weight.square().sum().sqrt()
        with watch(loss, model, 6, rest=True):
            loss.backward()
    assert watch.failures == []
    (row,) = pergrad.open_watch(tmp_path).steps().to_pylist()
    assert row["p50"] > 0
    assert row["noise_scale"] is None


@pytest.mark.parametrize("in_place", [False, True])
def test_a_loss_scaled_up(tmp_path: Path, in_place: bool) -> None:
    """As by a GradScaler, or in place by transformers' Trainer: the noise scale is the same."""
    found = []
    for scale in (1.0, 2.0**16):
        model = model_of().eval()
        with pergrad.Watch(tmp_path / str(scale)) as watch:
            x, y = batch(0)
            loss = F.cross_entropy(model(x), y)
            with watch(loss, model, 6):
                if in_place:
                    loss *= scale
                (loss if in_place else scale * loss).backward()
        assert watch.failures == []
        (row,) = pergrad.open_watch(tmp_path / str(scale)).steps().to_pylist()
        found.append((row["noise_scale"], row["p50"], row["loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_a_watch_in_the_place_of_a_callback(tmp_path: Path) -> None:
    watch = pergrad.Watch(tmp_path)
    for asked in ("on_init_end", "on_exception", "setup"):
        with pytest.raises(AttributeError, match=r"pass `watch\.hf\(\)` to transformers' Trainer"):
            getattr(watch, asked)
    with pytest.raises(
        AttributeError, match=r"`watch\.hf` is not a callback(.|\n)*`watch\.hf\(\)`"
    ):
        watch.hf.on_init_end  # noqa: B018
    with pytest.raises(AttributeError, match=r"pass what it returns, `watch\.lightning\(\)`"):
        watch.lightning.on_exception  # noqa: B018
    with pytest.raises(AttributeError, match=r"^A Watch has no attribute 'colour'\.$"):
        watch.colour  # noqa: B018
    assert not hasattr(watch, "on_init_end")
    assert "Trainer(model" in (watch.hf.__doc__ or "")


def test_repr(tmp_path: Path) -> None:
    with pergrad.Watch(tmp_path) as watch:
        train(watch, [0], model_of())
    assert "every=10" in repr(watch)
    run = pergrad.open_watch(tmp_path)
    assert "Run of Sequential" in repr(run)
    assert run.folder == tmp_path


def test_keys_of_rows_do_not_depend_on_padding() -> None:
    """So a key of a run's table is found among all rows of a data set."""
    texts = [[5, 6, 7], [5, 6], [5, 6, 7, 8]]

    def padded(width: int) -> dict[str, Tensor]:
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        mask = (ids != 0).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(ids == 0, -1)}

    keys = pergrad.Watch.keys_of(padded(4))
    assert len(set(keys)) == 3
    assert pergrad.Watch.keys_of(padded(9)) == keys
    first = {name: rows[1:2, :2] for name, rows in padded(9).items()}
    assert pergrad.Watch.keys_of(first) == [keys[1]]
    assert pergrad.Watch.keys_of({}) == []
