"""Scoring a whole data set: the numbers, what stays as it was, and what goes wrong on the way."""

import inspect
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import naive
import numpy as np
import pytest
import torch
from helpers import assert_agrees, direction
from scanning import Listed, data, job, losses, model, numbers, reference, scan
from torch import Tensor, nn

import pergrad
from pergrad import extras
from pergrad.scans import scorer
from pergrad.scans.options import ScanOptions

# --- the numbers ----------------------------------------------------------------------------------


def test_every_number_is_that_of_the_loop(tmp_path: Path) -> None:
    task, validation = job(), data(11, seed=5)
    net, params = task.model, dict(task.model.named_parameters())
    rows = pergrad.gradients(losses(net.eval(), torch.utils.data.default_collate(validation)), net)
    net.train()
    v = direction(params)
    against = {"rows": rows[:2], "row": rows[3], "v": v, "mean": pergrad.MeanGradient(validation)}
    found = scan(task, tmp_path / "s", batch_size=16, groups="layer", against=against).table()
    want, other = reference(net, task.data), reference(net, validation)
    norms = naive.norms(want)

    assert found["index"].to_pylist() == list(range(40))
    assert found["error"].null_count == 40
    assert_agrees(numbers(found, "norm"), norms, norms)
    alone = [losses(net.eval(), (x[None], torch.tensor([y]))).item() for x, y in task.data]
    assert_agrees(numbers(found, "loss"), torch.tensor(alone, dtype=torch.float64), 1.0)
    for layer in ("0", "3"):
        part = naive.norms({n: g for n, g in want.items() if n.startswith(layer)})
        assert_agrees(numbers(found, f"norm:{layer}"), part, norms)
    mean = {n: g.mean(0, keepdim=True) for n, g in other.items()}
    references = {
        "rows:0": naive.take(other, slice(0, 1)),
        "rows:1": naive.take(other, slice(1, 2)),
        "row": naive.take(other, slice(3, 4)),
        "v": {n: t[None] for n, t in v.items()},
        "mean": mean,
    }
    for name, grads in references.items():
        scale = norms * naive.norms(grads)
        assert_agrees(numbers(found, f"dot:{name}"), naive.gram(want, grads)[:, 0], scale)
        assert_agrees(numbers(found, f"cosine:{name}"), naive.cosines(want, grads)[:, 0], 1.0)


@pytest.mark.parametrize("size", [1, 7, 40, 1000])
def test_batch_size_changes_no_score(size: int, tmp_path: Path) -> None:
    want = naive.norms(reference(job().model, job().data))
    assert_agrees(numbers(scan(job(), tmp_path, batch_size=size).table(), "norm"), want, want)


def test_groups_by_parameter_and_by_name(tmp_path: Path) -> None:
    task = job(10)
    want = reference(task.model, task.data)
    every = scan(task, tmp_path / "a", groups="parameter").table()
    for name, part in naive.norms_by_parameter(want).items():
        assert_agrees(numbers(every, f"norm:{name}"), part, naive.norms(want))
    some = scan(task, tmp_path / "b", groups={"biases": ["0.bias", "3.bias"]}).table()
    assert some.schema.names == ["index", "loss", "norm", "norm:biases", "error"]
    part = naive.norms({n: want[n] for n in ("0.bias", "3.bias")})
    assert_agrees(numbers(some, "norm:biases"), part, naive.norms(want))


def test_params_choose_what_counts(tmp_path: Path) -> None:
    net = model()
    want = naive.norms({n: g for n, g in reference(net, data(9)).items() if n.startswith("3")})
    for number, params in enumerate([net[3], dict(net[3].named_parameters()), net[3].parameters()]):
        found = scan(job(9, model=net, params=params), tmp_path / str(number)).table()
        assert_agrees(numbers(found, "norm"), want, want)


def test_an_example_without_gradient_has_cosine_zero(tmp_path: Path) -> None:
    net = nn.Linear(2, 1, bias=False).double()
    items = [torch.tensor([0.0, 0.0]).double(), torch.tensor([3.0, 4.0]).double()]
    task = pergrad.Job(net, items, lambda m, x: m(x).squeeze(1))
    found = scan(task, tmp_path, against={"v": [torch.tensor([[1.0, 0.0]]).double()]}).table()
    assert found["cosine:v"].to_pylist() == pytest.approx([0.0, 0.6])
    assert found["dot:v"].to_pylist() == pytest.approx([0.0, 3.0])


def test_half_precision_is_stored_in_float32(tmp_path: Path) -> None:
    task = job(5, dtype=torch.bfloat16)
    assert str(scan(task, tmp_path).table().schema.field("norm").type) == "float"


def test_keys_collate_and_items_of_any_form(tmp_path: Path) -> None:
    items = [{"x": x, "y": y} for x, y in data(20)]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {
            "x": torch.stack([r["x"] for r in rows]),
            "y": torch.tensor([r["y"] for r in rows]),
        }

    task = job(
        data=items, collate=collate, key=lambda i: f"digit-{i}",
        losses=lambda net, batch: losses(net, (batch["x"], batch["y"])),
    )  # fmt: skip
    found = scan(task, tmp_path, batch_size=8)
    assert found.table()["key"].to_pylist() == [f"digit-{i}" for i in range(20)]
    assert_agrees(
        numbers(found.table(), "norm"),
        naive.norms(reference(task.model, data(20))),
        1.0,
    )


def test_getitems_is_used_where_there_is_one(tmp_path: Path) -> None:
    class Batched(Listed):
        calls = 0

        def __getitems__(self, indices: list[int]) -> list[Any]:
            self.calls += 1
            return [self.items[i] for i in indices]

    source = Batched(data(20), {})
    scan(job(data=source), tmp_path, batch_size=8)
    assert source.calls == 3


class Noisy(Listed):
    """Random augmentation, by each of the generators that data sets use."""

    def __getitem__(self, i: int) -> Any:
        x, y = self.items[i]
        return x + torch.rand(5) * random.random() * np.random.rand(), y


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_that_fetch_ahead_change_nothing(workers: int, tmp_path: Path) -> None:
    at = {13: ValueError("no such file")}
    task = job(data=Noisy(data(40), at))
    alone = scan(task, tmp_path / "0", batch_size=8).table()
    ahead = scan(task, tmp_path / "n", batch_size=8, workers=workers).table()
    assert alone.equals(ahead)


def test_processes_that_are_not_forked_get_no_model(tmp_path: Path) -> None:
    from pergrad.scans import work
    from pergrad.scans.runners import local

    task = job(losses=lambda net, batch: losses(net, batch))  # cannot be pickled
    ahead = local._Ahead(work.Work(task, work.Settings(8)), [range(8)])
    there = pickle.loads(pickle.dumps(ahead))
    assert torch.equal(there[0][0], ahead[0][0])


def test_train_mode_is_the_same_whenever_a_block_is_scored(tmp_path: Path) -> None:
    first = scan(job(), tmp_path / "a", batch_size=8, mode="train")
    again = scan(job(), tmp_path / "b", batch_size=8, mode="train")
    other = scan(job(), tmp_path / "c", batch_size=8, mode="train", seed=1)
    plain = scan(job(), tmp_path / "d", batch_size=8)
    assert first.table().equals(again.table())
    assert not first.table().equals(other.table())
    assert not first.table().equals(plain.table())


# --- nothing changes on the model -----------------------------------------------------------------


def state_of(net: nn.Module) -> dict[str, Any]:
    return {
        "modes": [m.training for m in net.modules()],
        "grads": [p.grad for p in net.parameters()],
        "required": [p.requires_grad for p in net.parameters()],
        "values": [p.tolist() for p in net.state_dict().values()],
        "devices": [str(p.device) for p in net.parameters()],
        "hooks": [len(m._forward_hooks) for m in net.modules()],
        "torch": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "enabled": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("mode", ["eval", "train", "as is"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(mode: Any, fails: bool, tmp_path: Path) -> None:
    net = model()
    net[0].weight.requires_grad_(False)
    net[2].eval()  # a mixture of modes
    source = Noisy(data(40), {})
    if fails:
        source = Listed(data(40), {20: KeyboardInterrupt()})
    before = state_of(net)
    task = job(model=net, data=source)
    against = {"mean": pergrad.MeanGradient(data(4))}
    with torch.no_grad():  # a scan needs gradients all the same
        if fails:
            with pytest.raises(KeyboardInterrupt):
                scan(task, tmp_path, batch_size=8, mode=mode, against=against, device="cpu")
        else:
            scan(task, tmp_path, batch_size=8, mode=mode, against=against, device="cpu")
    assert state_of(net) == before


@pytest.mark.parametrize("device", [None, "cpu"])
def test_buffers_are_left_as_they_were(device: str | None, tmp_path: Path) -> None:
    class Counting(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            self.num_batches_tracked = self.num_batches_tracked + 1  # another tensor
            return super().forward(x)

    net = nn.Sequential(nn.Linear(5, 4), Counting(4), nn.Linear(4, 3)).double()
    held = dict(net.named_buffers())
    values = {name: buffer.clone() for name, buffer in held.items()}
    task = job(model=net)
    more: dict[str, Any] = {"mode": "train", "on_mixing": "exact", "batch_size": 8}
    first = scan(task, tmp_path, device=device, **more)
    for name, buffer in net.named_buffers():
        assert buffer is held[name]
        assert torch.equal(buffer, values[name])
    assert scan(task, tmp_path, device=device, **more).table().equals(first.table())


def test_inference_mode_outside_is_no_hindrance(tmp_path: Path) -> None:
    task = job(5)
    with torch.inference_mode():
        found = scan(task, tmp_path).table()
    want = naive.norms(reference(task.model, task.data))
    assert_agrees(numbers(found, "norm"), want, want)


def test_it_says_that_the_model_is_in_eval_mode(tmp_path: Path, capfd: Any) -> None:
    scan(job(10), tmp_path, progress=True)
    said = capfd.readouterr()
    assert said.out == ""
    assert "eval mode" in said.err
    assert "10/10" in said.err
    assert "examples/s" in said.err


def test_a_batch_goes_to_a_device_whatever_its_form() -> None:
    class Pair(NamedTuple):
        a: Tensor
        b: str

    class Own:
        def to(self, device: torch.device) -> str:
            return f"on {device}"

    class Named(dict):
        pass

    class Closed(dict):
        def __init__(self) -> None:
            super().__init__(t=torch.zeros(1))

    t, meta = torch.zeros(2), torch.device("meta")
    batch = {
        "list": [t, 1],
        "pair": Pair(t, "text"),
        "own": Own(),
        "named": Named(t=t),
        "c": Closed(),
    }
    moved = scorer.to_device(batch, meta)
    assert moved["list"][0].device == moved["pair"].a.device == meta
    assert moved["named"]["t"].device == moved["c"]["t"].device == meta
    assert (moved["list"][1], moved["pair"].b, moved["own"]) == (1, "text", "on meta")
    assert type(moved["pair"]) is Pair
    assert type(moved["named"]) is Named


# --- memory ---------------------------------------------------------------------------------------


class Greedy(nn.Module):
    """Runs out of memory on more than a few examples."""

    def __init__(self, most: int, error: BaseException, large: float | None = None) -> None:
        super().__init__()
        self.inner, self.most, self.error, self.large = model(), most, error, large
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        if len(x) > self.most or (self.large is not None and (x[:, 0] == self.large).any()):
            raise self.error
        return self.inner(x)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("workers", [0, 1])
def test_auto_halves_when_memory_runs_out(
    error: BaseException, workers: int, tmp_path: Path
) -> None:
    net = Greedy(5, error)
    found = scan(job(200, model=net), tmp_path, workers=workers)
    table = found.table()
    assert table["index"].to_pylist() == list(range(200))
    assert table["error"].null_count == 200
    want = naive.norms(reference(model(), data(200)))
    assert_agrees(numbers(table, "norm"), want, want)
    kept = found.manifest["settings"]["batch_size"]
    assert kept < 1024
    # at most one more failure for each halving of each block
    assert sum(seen > 5 for seen in net.seen) < 50


def test_a_batch_size_of_ones_own_is_kept(tmp_path: Path) -> None:
    task = job(model=Greedy(5, torch.OutOfMemoryError("out of memory")))
    with pytest.raises(pergrad.UsageError, match=r'batch of 16(.|\n)*smaller batch_size.*"auto"'):
        scan(task, tmp_path, batch_size=16)
    assert scan(task, tmp_path, batch_size=4).complete


def test_one_example_too_large_is_listed(tmp_path: Path) -> None:
    items = data(40)
    large = float(items[17][0][0])
    net = Greedy(1000, torch.OutOfMemoryError("out of memory"), large)
    found = scan(job(model=net), tmp_path)
    assert found.failures().to_pydict() == {
        "index": [17], "error": ["OutOfMemoryError: out of memory"]
    }  # fmt: skip
    assert found.table()["norm"].null_count == 1


def test_auto_takes_smaller_batches_of_larger_examples() -> None:
    class Wide(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            return (x[:, :1] * self.scale).tanh().sum(1)

    def size(width: int) -> int:
        task = pergrad.Job(Wide(width), data(4, torch.float32), lambda m, batch: m(batch[0]))
        return scorer.sensible_batch_size(task, 0)

    assert size(10) == scorer.MOST_EXAMPLES
    assert size(2**20) in (2**n for n in range(7))
    assert size(2**20) >= 8 * size(2**24)


def test_auto_does_not_stumble_over_a_first_example_that_raises(tmp_path: Path) -> None:
    found = scan(job(data=Listed(data(40), {0: ValueError("broken")})), tmp_path)
    assert found.manifest["settings"]["batch_size"] == scorer.FALLBACK_SIZE
    assert found.failures()["index"].to_pylist() == [0]


# --- examples that cannot be scored ---------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_that_raises_at_one_example(workers: int, tmp_path: Path) -> None:
    items = data(8000)
    task = job(data=Listed(items, {7341: OSError("cannot open image 7341.png")}))
    found = scan(task, tmp_path, batch_size=512, workers=workers)
    table = found.table()
    assert found.complete
    assert table["index"].to_pylist() == list(range(8000))
    assert found.failures().to_pydict() == {
        "index": [7341], "error": ["OSError: cannot open image 7341.png"]
    }  # fmt: skip
    assert table["loss"].null_count == table["norm"].null_count == 1
    counts = found.manifest["counts"]
    assert counts == {"examples": 8000, "scored": 7999, "failed": 1, "not finite": 0}
    assert "1 could not be scored" in repr(found)
    near = slice(7300, 7400)
    want = naive.norms(reference(task.model, items[near]))
    got = numbers(table.slice(7300, 100).filter(table.slice(7300, 100)["error"].is_null()), "norm")
    assert_agrees(got, torch.cat([want[:41], want[42:]]), 1.0)


def test_an_example_that_only_collate_or_model_refuses(tmp_path: Path) -> None:
    items = data(40)
    at = {3: (torch.zeros(4).double(), 0), 21: (items[21][0], 99)}  # too short; no such class
    found = scan(job(data=Listed(items, at)), tmp_path, batch_size=16)
    assert found.failures()["index"].to_pylist() == [3, 21]
    want = naive.norms(reference(model(), items))
    table = found.table()
    got = numbers(table.filter(table["error"].is_null()), "norm")
    kept = [i for i in range(40) if i not in at]
    assert_agrees(got, want[kept], want[kept])


def test_examples_of_different_sizes_are_scored_with_a_word(tmp_path: Path) -> None:
    items = [torch.ones(2 + i % 2).double() for i in range(12)]

    class Mean(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mean(1, keepdim=True)).squeeze(1)

    task = pergrad.Job(Mean(1, 1).double(), items, lambda net, x: net(x))
    with pytest.warns(UserWarning, match=r"not in one batch(.|\n)*`collate` that pads") as said:
        found = scan(task, tmp_path, batch_size=6)
    assert len(said) == 1
    assert found.table()["norm"].to_pylist() == pytest.approx([2**0.5] * 12)


class Product(torch.autograd.Function):
    """x @ w as an op of the user's own, which pergrad has no rule for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


class Unruled(nn.Module):
    """Served by the fallback: one input that is NaN makes its neighbours' gradients NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight)


@pytest.mark.parametrize("unruled", [False, True])
def test_a_bad_input_spoils_no_neighbour(unruled: bool, tmp_path: Path, quiet: None) -> None:
    items = data(24)
    net = Unruled() if unruled else model()
    bad = (torch.full((5,), torch.nan, dtype=torch.float64), 1)
    found = scan(job(model=net, data=Listed(items, {9: bad})), tmp_path, batch_size=8)
    table = found.table()
    assert found.manifest["counts"]["not finite"] == 1
    assert "1 have a loss or norm that is not finite" in repr(found)
    assert table["error"].null_count == 24  # it is not an error: the numbers are what they are
    got, want = numbers(table, "norm"), naive.norms(reference(net, items))
    assert got[9].isnan()
    kept = [i for i in range(24) if i != 9]
    assert_agrees(got[kept], want[kept], want[kept])
    assert 9 not in found.top(24)["index"].to_pylist()


def test_weights_that_are_not_finite_cost_no_second_look(tmp_path: Path) -> None:
    net = Greedy(1000, MemoryError())
    with torch.no_grad():
        net.inner[0].weight[0, 0] = torch.nan
    found = scan(job(model=net), tmp_path, batch_size=20)
    assert found.manifest["counts"]["not finite"] == 40
    assert net.seen == [20, 20]


def test_a_job_that_scores_no_example_is_an_error(tmp_path: Path) -> None:
    def wrong(net: nn.Module, batch: Any) -> Tensor:
        return losses(net, batch["images"])

    with pytest.raises(pergrad.UsageError, match=r"None of the first 40(.|\n)*job.losses\("):
        scan(job(losses=wrong), tmp_path)
    assert len(pergrad.open_scores(tmp_path)) == 0
    assert scan(job(), tmp_path).complete


def test_it_gives_up_early_if_nothing_works(tmp_path: Path) -> None:
    net = Greedy(0, ValueError("wrong shape"))
    with pytest.raises(pergrad.UsageError, match="wrong shape"):
        scan(job(10_000, model=net), tmp_path, batch_size=256)
    assert net.seen.count(1) == scorer.GIVE_UP_AFTER


def test_a_model_that_mixes_examples_is_no_example_s_fault(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with pytest.raises(pergrad.MixedExamplesError, match=r"batch_norm(.|\n)*eval"):
        scan(job(model=net), tmp_path / "a", mode="train")
    assert len(pergrad.open_scores(tmp_path / "a")) == 0
    found = scan(job(model=net), tmp_path / "b").table()
    want = naive.norms(reference(net, data(40)))
    assert_agrees(numbers(found, "norm"), want, want)
    exact = scan(job(model=net), tmp_path / "c", mode="train", batch_size=20, on_mixing="exact")
    assert exact.complete


def test_a_warning_that_is_an_error_is_no_example_s_fault(tmp_path: Path) -> None:
    with pytest.raises(pergrad.FallbackWarning, match="no rule"):
        scan(job(model=Unruled()), tmp_path)


def test_scalar_losses_are_named(tmp_path: Path) -> None:
    with pytest.raises(pergrad.UsageError, match='reduction="none"'):
        scan(job(losses=lambda net, batch: losses(net, batch).mean()), tmp_path / "a")
    with pytest.raises(
        pergrad.UsageError, match=r"returned 120 numbers(.|\n)*one loss per example"
    ):
        scan(job(losses=lambda net, batch: net(batch[0]).flatten()), tmp_path / "b")


def test_a_lost_device_is_no_example_s_fault(tmp_path: Path) -> None:
    lost = torch.AcceleratorError("CUDA error: device-side assert triggered")
    task = job(data=Listed(data(40), {20: lost}))
    with pytest.raises(torch.AcceleratorError):
        scan(task, tmp_path, batch_size=8)
    assert len(pergrad.open_scores(tmp_path)) == 16


# --- wrong arguments ------------------------------------------------------------------------------


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(data(3))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": losses}, r"not a torch.nn.Module(.|\n)*call the function in `losses`"),
        ({"data": iter([1])}, r"`data` is a list_iterator(.|\n)*map-style"),
        ({"data": Endless()}, r"`data` is a Endless(.|\n)*map-style"),
        ({"data": []}, r"empty. Pass at least one"),
        ({"losses": 3}, r"`losses` is a int. Pass a function"),
        ({"collate": 3}, r"`collate` is a int. Pass a function"),
        ({"key": "name"}, r"`key` is a str. Pass a function"),
        ({"show": 3}, r"`show` is a int. Pass a function"),
        ({"params": 3}, r"`params` is a int. Pass a module"),
    ],
)
def test_a_job_says_what_is_wrong_with_it(change: dict[str, Any], says: str) -> None:
    with pytest.raises(pergrad.UsageError, match=says):
        job(**change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 0}, r'batch_size is 0; pass a positive number, or "auto"'),
        ({"batch_size": "big"}, r"batch_size is 'big'; pass a positive number"),
        ({"mode": "test"}, r'mode is \'test\'; pass "eval"'),
        ({"rescore": "all"}, r'rescore is \'all\'; pass "damaged"'),
        ({"engine": "spark"}, r'no engine \'spark\'. Pass "local"'),
        ({"workers": -1}, r"workers is -1; pass a number"),
        ({"address": "auto"}, r'address is for engine="ray"'),
        ({"retain_graph": True}, r"no option retain_graph(.|\n)*on_mixing"),
        ({"on_mixing": "ignore"}, r"on_mixing"),
        ({"groups": "block"}, r"groups is 'block'. Pass \"layer\""),
        ({"groups": {"a": ["nose"]}}, r"no parameters called `nose`(.|\n)*`0.weight`"),
        ({"groups": {"a": "0.weight"}}, r"'a' has no list(.|\n)*`0.weight`"),
        ({"against": {"v": torch.ones(3)}}, r"against\['v'\](.|\n)*66 elements"),
        ({"against": {"v": torch.full((66,), torch.inf)}}, r"against\['v'\](.|\n)*not finite"),
    ],
)
def test_scan_says_what_is_wrong_with_its_arguments(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(pergrad.UsageError, match=says):
        scan(job(), tmp_path, **change)


def test_options_are_written_once(tmp_path: Path) -> None:
    """Python's signature, its documentation and the command line have those of the dataclass."""
    names = [option.name for option in fields(ScanOptions)]
    signature = inspect.signature(pergrad.scan)
    assert list(signature.parameters) == ["job", "out", *names]
    for option in fields(ScanOptions):
        assert signature.parameters[option.name].default == option.default
        assert re.search(rf"^        (\w+, )*{option.name}[:,]", pergrad.scan.__doc__, re.MULTILINE)
    with pytest.raises(pergrad.UsageError, match=r"name everything else, such as batch_size=8"):
        pergrad.scan(job(), tmp_path, 8)  # type: ignore[misc]


def test_as_is_has_two_spellings(tmp_path: Path) -> None:
    first = scan(job(), tmp_path, mode="as-is")
    assert first.manifest["settings"]["mode"] == "as is"
    assert scan(job(), tmp_path, mode="as is").complete


def test_scan_takes_a_job(tmp_path: Path) -> None:
    with pytest.raises(pergrad.UsageError, match=r"Pass a pergrad.Job"):
        scan(model(), tmp_path)  # type: ignore[arg-type]


def test_a_reference_about_other_parameters(tmp_path: Path) -> None:
    net = model()
    head = pergrad.gradients(losses(net, torch.utils.data.default_collate(data(3))), net[3])
    with pytest.raises(pergrad.UsageError, match=r"`0.weight`(.|\n)*same selection"):
        scan(job(), tmp_path, against={"head": head})


def test_a_mean_gradient_needs_all_its_examples(tmp_path: Path) -> None:
    broken = Listed(data(10), {6: ValueError("unreadable")})
    with pytest.raises(
        pergrad.UsageError, match=r"from 4 to 7 raised(.|\n)*unreadable(.|\n)*Take out"
    ):
        scan(job(), tmp_path, batch_size=4, against={"mean": pergrad.MeanGradient(broken)})
    with pytest.raises(pergrad.UsageError, match=r"empty data set(.|\n)*at least one"):
        pergrad.MeanGradient([])
    with pytest.raises(pergrad.UsageError, match=r"`MeanGradient.data`(.|\n)*map-style"):
        pergrad.MeanGradient(iter([1]))
    short = job(losses=lambda net, batch: losses(net, batch)[:1])
    with pytest.raises(pergrad.UsageError, match=r"returned 1 numbers for a batch of 4"):
        scan(short, tmp_path, batch_size=4, against={"mean": pergrad.MeanGradient(data(8))})
    scalar = job(losses=lambda net, batch: losses(net, batch).mean())
    with pytest.raises(pergrad.UsageError, match='reduction="none"'):
        scan(scalar, tmp_path, batch_size=4, against={"mean": pergrad.MeanGradient(data(8))})


def test_a_key_that_raises_is_named(tmp_path: Path) -> None:
    with pytest.raises(pergrad.UsageError, match=r"job.key\(3\)(.|\n)*of the number alone"):
        scan(job(key=lambda i: "abc"[i]), tmp_path)


# --- extras ---------------------------------------------------------------------------------------


def test_an_absent_package_names_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "pyarrow" else object())
    with pytest.raises(pergrad.MissingExtraError, match=r"pip install 'pergrad\[scan\]'"):
        scan(job(), tmp_path)
    with pytest.raises(ImportError, match=r"pip install 'pergrad\[scan\]'"):
        pergrad.open_scores(tmp_path)


def test_names_of_extras_are_there_but_not_imported() -> None:
    probe = (
        "import sys, pergrad\n"
        "assert {'Job', 'scan'} <= set(dir(pergrad)) and 'Job' in pergrad.__all__\n"
        "assert not {'pyarrow', 'rich', 'filelock'} & set(sys.modules)\n"
        "pergrad.Job, pergrad.MeanGradient, pergrad.scan, pergrad.Scores, pergrad.open_scores\n"
        "assert not {'pyarrow', 'rich', 'filelock'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)
    with pytest.raises(AttributeError, match="no attribute 'scann'"):
        _ = pergrad.scann


@pytest.mark.parametrize("block", [range(2, 5), range(4), [3, 0, 3], [5]])
def test_rows_of_tensors_are_what_collate_makes_of_items(block: Sequence[int]) -> None:
    """All in one piece, of their own memory, and attached if the data are."""
    from torch.utils.data import Subset, TensorDataset, default_collate

    from pergrad.scans.scorer import fetch

    x = torch.randn(3, 6).mT  # not contiguous
    leaf = torch.randn(6, 2, 2, requires_grad=True)
    data = TensorDataset(x, torch.arange(6), leaf, torch.ones(6, dtype=torch.bool))
    want = default_collate([data[i] for i in block])
    got = fetch(None, data, block, 0)
    assert type(got) is type(want) is list
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert a.requires_grad == b.requires_grad
        assert a.data_ptr() not in {t[k].data_ptr() for t in data.tensors for k in range(6)}
    whole = fetch(None, Subset(data, range(6)), block, 0)
    assert all(torch.equal(a, b) for a, b in zip(whole, want, strict=True))
    assert fetch(len, data, block, 0) == len(block)
