"""What a machine is good at: the fit to measured times, and the file that keeps it."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pergrad
from pergrad import calibration
from pergrad.calibration import Case, fit
from pergrad.errors import UsageError
from pergrad.factors import Correlation, Outer, constants, costs
from pergrad.factors.constants import DEFAULT
from pergrad.factors.methods import choice
from pergrad.factors.outer.norms import METHODS, Sizes
from pergrad.kernels import fused

CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "costs"
    monkeypatch.setenv("PERGRAD_COSTS", str(path))
    constants.forget()
    return path


@pytest.fixture
def file(folder: Path) -> Path:
    """The file of this machine, written."""
    path = constants.keep(CPU, FLOAT, replace(DEFAULT, gram_overhead=2.0))
    assert path is not None
    assert path.parent == folder
    constants.forget()
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small case of each kind."""
    monkeypatch.setattr(calibration, "_NORMS", [(2, 8, 4, 4)])
    monkeypatch.setattr(calibration, "_DOTS", [(2, 8, 4, 4)])
    monkeypatch.setattr(calibration, "_GRAMS", [(2, 8, 4, 4)])
    monkeypatch.setattr(calibration, "_ROWS", [(2, 8, 5, 4)])
    monkeypatch.setattr(
        calibration, "_CONVOLUTIONS", [(2, 4, 4, 6, 3, 1, 1), (2, 4, 4, 6, 3, 2, 2)]
    )


def machine_on_which_grams_take(overhead: float) -> tuple[Case, ...]:
    """Times that follow the cost model with another constant."""
    sizes = [(T, n, n) for T in (16, 64, 128, 256, 512) for n in (64, 128, 256, 512, 1024)]

    def case(T: int, p: int, d: int) -> Case:
        gram = overhead * (costs.gram_norm_cost(T, p, d) + 32 * T * T)
        seconds = {"gram": gram, "direct": float((T + DEFAULT.direct_elementwise) * p * d)}
        return Case("", seconds, lambda by: choice.cheapest(METHODS, Sizes(T, p, d), by).name)

    return tuple(case(*s) for s in sizes)


@pytest.mark.parametrize("overhead", [0.1, 0.5, 3.0, 20.0])
def test_the_fit_finds_what_makes_the_choices_right(overhead):
    cases = machine_on_which_grams_take(overhead)
    before = sum(case.loss(DEFAULT) for case in cases) / len(cases)
    found = fit(cases, DEFAULT)
    after = sum(case.loss(found) for case in cases) / len(cases)
    assert before > 0.02
    assert after < 0.01
    # what no case tells anything about stays as it was
    changed = {n for n in DEFAULT.__slots__ if getattr(found, n) != getattr(DEFAULT, n)}
    assert changed <= {"gram_overhead", "gram_elementwise", "direct_elementwise"}


def test_constants_that_are_right_stay():
    assert fit(machine_on_which_grams_take(DEFAULT.gram_overhead), DEFAULT) == DEFAULT


def test_a_method_that_was_not_timed_counts_as_slow():
    case = Case("", {"a": 1.0, "b": 1.5}, lambda by: "c" if by is DEFAULT else "b")
    assert case.loss(DEFAULT) == 9.0
    assert case.loss(replace(DEFAULT, shift_calls=1.0)) == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_measured_holds_here_and_in_later_processes(folder, small, dtype):
    found = pergrad.calibrate(dtype=dtype)
    assert found.file is not None
    assert found.file.parent == folder
    assert found.loss <= found.loss_before
    kernel = fused(CPU, dtype) is not None
    assert {frozenset(case.seconds) for case in found.cases} == {
        frozenset({"direct", "gram"}), frozenset({"gram", "tiles"}), frozenset({"join", "tables"}),
        frozenset({"direct", "gram"} | ({"fused"} if kernel else set())),
        *(frozenset({"patches"} | ({"convolution"} if dtype == torch.float32 else set()) | shifts)
          for shifts in ({"shift", *(["fused shift"] if kernel else [])}, set())),
    }  # fmt: skip
    assert all(t > 0 for case in found.cases for t in case.seconds.values())
    here = constants.constants(CPU, dtype)
    assert found.constants == {name: getattr(here, name) for name in here.__slots__}
    constants.forget()  # as a new process would begin
    assert constants.constants(CPU, dtype) == here
    other = torch.float64 if dtype == torch.float32 else torch.float32
    assert constants.constants(CPU, other) == DEFAULT
    assert str(found.file) in repr(found)


def test_half_precision_is_measured_as_float32(folder, small):
    assert pergrad.calibrate(dtype=torch.bfloat16).dtype == torch.float32


def test_random_numbers_of_the_user_are_left_alone(folder, small):
    before = torch.get_rng_state()
    pergrad.calibrate()
    assert torch.equal(torch.get_rng_state(), before)


def test_each_kind_of_machine_has_a_file(file):
    """A home folder may be shared; the number of threads is part of the kind."""
    assert constants.constants(CPU, FLOAT).gram_overhead == 2.0
    assert constants.constants(CPU, torch.float64) == DEFAULT
    torch.set_num_threads(2)
    assert constants.constants(CPU, FLOAT) == DEFAULT
    other = constants.keep(CPU, FLOAT, replace(DEFAULT, gram_overhead=3.0))
    torch.set_num_threads(1)
    assert constants.constants(CPU, FLOAT).gram_overhead == 2.0
    assert sorted(file.parent.iterdir()) == sorted([file, other])
    text = json.loads(file.read_text())
    file.write_text(json.dumps({**text, "measured on": "a machine of the same file name"}))
    constants.forget()
    assert constants.constants(CPU, FLOAT) == DEFAULT


def test_many_may_write_at_once(folder):
    def write(n: int) -> None:
        for k in range(20):
            constants.keep(CPU, FLOAT, replace(DEFAULT, gram_overhead=float(1 + n * 20 + k)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, range(4)))
        constants.forget()
        assert constants.constants(CPU, FLOAT).gram_overhead in {20.0, 40.0, 60.0, 80.0}
    assert len(list(folder.iterdir())) == 1  # nothing half-written is left


def test_the_constants_decide(folder):
    """Every choice that is made by cost is made by the constants of the device and dtype."""
    f = Outer(torch.randn(3, 16, 32), torch.randn(3, 16, 32))
    c = Correlation(torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6), kernel=(3, 3),
                    stride=(1, 1), padding=(1, 1), dilation=(1, 1))  # fmt: skip
    explained = []
    for overhead in (1e-3, 1e5):
        found = replace(
            DEFAULT, gram_overhead=overhead, shift_overhead=1e3 * overhead, shift_calls=1.0,
            patch_overhead=1e4, call_overhead=1e9, fused_overhead=overhead, fused_reading=1e-3,
            fused_shift_elementwise=1e-3,
        )  # fmt: skip
        constants.keep(CPU, FLOAT, found)
        model = torch.nn.Linear(32, 32)
        losses = model(torch.randn(3, 16, 32)).square().sum((1, 2))
        row = pergrad.explain(losses, model).rows[0]
        explained.append((row.method, c.norm_method))
        assert torch.allclose(f.sq_norms(), f.dense().square().sum((1, 2)))
    chosen = ("fused", "fused shift") if fused(CPU, FLOAT) is not None else ("gram", "shift")
    assert explained == [chosen, ("direct", "direct")]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{", ""),
        ("}", ""),
        ('"constants": {', '"constants": {"more": 1, '),
        ('"constants"', '"constant"'),
        ("2.0", "-2.0"),
        ("2.0", "1e999"),
        ("2.0", "1" + 400 * "0"),
        ("2.0", "null"),
        ("2.0", '"two"'),
    ],
)
def test_a_damaged_file_is_named_and_changes_nothing(file, old, new):
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.warns(UserWarning, match=r"\.json cannot be read .* Delete the file") as caught:
        assert constants.constants(CPU, FLOAT) == DEFAULT
    assert caught[0].filename == __file__


def test_a_file_of_another_format_is_passed_over(file):
    file.write_text('{"format": 99}')
    assert constants.constants(CPU, FLOAT) == DEFAULT


def test_a_folder_that_cannot_be_written_costs_nothing_but_a_warning(tmp_path, monkeypatch):
    (tmp_path / "folder").write_text("a file where a folder should be")
    monkeypatch.setenv("PERGRAD_COSTS", str(tmp_path / "folder"))
    constants.forget()
    found = replace(DEFAULT, gram_overhead=2.0)
    with pytest.warns(UserWarning, match="cannot be kept in .* PERGRAD_COSTS"):
        assert constants.keep(CPU, FLOAT, found) is None
    assert constants.constants(CPU, FLOAT) == found


def test_where_the_files_are(monkeypatch):
    monkeypatch.setenv("PERGRAD_COSTS", "")
    assert constants.folder() is None
    monkeypatch.setenv("PERGRAD_COSTS", "~/costs")
    assert constants.folder() == Path.home() / "costs"
    monkeypatch.delenv("PERGRAD_COSTS")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert constants.folder() == Path("/cache/pergrad/costs")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert constants.folder() == Path.home() / ".cache/pergrad/costs"


def test_bad_devices_and_dtypes():
    for device in ("warp", 3.5, None):
        with pytest.raises(UsageError, match=r"no device .* Pass one"):
            pergrad.calibrate(device)
    with pytest.raises(UsageError, match=r'timed on \'meta\' so far: pass "cpu"'):
        pergrad.calibrate("meta")
    for dtype in (torch.int64, "float32"):
        with pytest.raises(UsageError, match=r"are not measured; pass torch.float32"):
            pergrad.calibrate(dtype=dtype)
