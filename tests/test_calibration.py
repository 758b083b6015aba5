"""What a machine is good at: the fit to measured times, and the file that keeps it."""

import json
import os
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

CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache" / "costs.json"
    monkeypatch.setenv("PERGRAD_COSTS", str(path))
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
        seconds = {"gram": gram, "direct": float(costs.direct_norm_cost(T, p, d))}
        return Case("", seconds, lambda by: costs.outer_norm_method(T, p, d, by=by))

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
    assert changed <= {"gram_overhead", "gram_elementwise"}


def test_constants_that_are_right_stay():
    assert fit(machine_on_which_grams_take(DEFAULT.gram_overhead), DEFAULT) == DEFAULT


def test_a_method_that_was_not_timed_counts_as_slow():
    case = Case("", {"a": 1.0, "b": 1.5}, lambda by: "c" if by is DEFAULT else "b")
    assert case.loss(DEFAULT) == 9.0
    assert case.loss(replace(DEFAULT, shift_calls=1.0)) == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_measured_holds_here_and_in_later_processes(file, small, dtype):
    found = pergrad.calibrate(dtype=dtype)
    assert found.file == file
    assert found.loss <= found.loss_before
    assert {tuple(sorted(case.seconds)) for case in found.cases} == {
        ("direct", "gram"), ("gram", "tiles"), ("join", "tables"),
        *([("convolution", "patches", "shift"), ("convolution", "patches")]
          if dtype == torch.float32 else [("patches", "shift"), ("patches",)]),
    }  # fmt: skip
    assert all(t > 0 for case in found.cases for t in case.seconds.values())
    here = constants.constants(CPU, dtype)
    assert found.constants == {name: getattr(here, name) for name in here.__slots__}
    constants.forget()  # as a new process would begin
    assert constants.constants(CPU, dtype) == here
    other = torch.float64 if dtype == torch.float32 else torch.float32
    assert constants.constants(CPU, other) == DEFAULT
    assert str(file) in repr(found)


def test_half_precision_is_measured_as_float32(file, small):
    assert pergrad.calibrate(dtype=torch.bfloat16).dtype == torch.float32


def test_other_machines_in_one_file_are_left_alone(file):
    constants.keep(CPU, FLOAT, replace(DEFAULT, gram_overhead=2.0))
    text = json.loads(file.read_text())
    (mine,) = text["constants"]
    assert f"{torch.get_num_threads()} threads" in mine
    assert "float32" in mine
    text["constants"]["another machine"] = text["constants"].pop(mine)
    file.write_text(json.dumps(text))
    constants.forget()
    assert constants.constants(CPU, FLOAT) == DEFAULT
    constants.keep(CPU, FLOAT, replace(DEFAULT, gram_overhead=3.0))
    assert len(json.loads(file.read_text())["constants"]) == 2


def test_the_constants_decide(file):
    """Every choice that is made by cost is made by the constants of the device and dtype."""
    f = Outer(torch.randn(3, 16, 32), torch.randn(3, 16, 32))
    c = Correlation(torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6), kernel=(3, 3),
                    stride=(1, 1), padding=(1, 1), dilation=(1, 1))  # fmt: skip
    explained = []
    for overhead in (1e-3, 1e3):
        found = replace(
            DEFAULT, gram_overhead=overhead, shift_overhead=overhead, shift_calls=1.0,
            patch_overhead=1e4, call_overhead=1e9,
        )  # fmt: skip
        constants.keep(CPU, FLOAT, found)
        model = torch.nn.Linear(32, 32)
        losses = model(torch.randn(3, 16, 32)).square().sum((1, 2))
        row = pergrad.explain(losses, model).rows[0]
        explained.append((row.method, c.norm_method))
        assert torch.allclose(f.sq_norms(), f.dense().square().sum((1, 2)))
    assert explained == [("gram", "shift"), ("direct", "direct")]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 1}', '{"format": 1, "constants": {"x": {"gram_overhead": 1}}}'],
)
def test_a_damaged_file_is_named_and_changes_nothing(file, text):
    file.parent.mkdir()
    file.write_text(text)
    with pytest.warns(UserWarning, match=r"costs\.json cannot be read .* Delete the file"):
        assert constants.constants(CPU, FLOAT) == DEFAULT


def test_numbers_that_cannot_be_costs_are_refused(file):
    constants.keep(CPU, FLOAT, replace(DEFAULT, gram_overhead=2.0))
    file.write_text(file.read_text().replace("2.0", "-2.0"))
    constants.forget()
    with pytest.warns(UserWarning, match="not the numbers of a cost model"):
        assert constants.constants(CPU, FLOAT) == DEFAULT


def test_a_file_of_another_format_is_passed_over(file):
    file.parent.mkdir()
    file.write_text('{"format": 99}')
    assert constants.constants(CPU, FLOAT) == DEFAULT


def test_a_file_that_cannot_be_written_costs_nothing_but_a_warning(tmp_path, monkeypatch):
    (tmp_path / "folder").write_text("a file where a folder should be")
    monkeypatch.setenv("PERGRAD_COSTS", str(tmp_path / "folder" / "costs.json"))
    constants.forget()
    found = replace(DEFAULT, gram_overhead=2.0)
    with pytest.warns(UserWarning, match="cannot be kept in .* PERGRAD_COSTS"):
        assert constants.keep(CPU, FLOAT, found) is None
    assert constants.constants(CPU, FLOAT) == found


def test_where_the_file_is(monkeypatch):
    monkeypatch.setenv("PERGRAD_COSTS", "")
    assert constants.file() is None
    monkeypatch.delenv("PERGRAD_COSTS")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert constants.file() == Path("/cache/pergrad/costs.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert constants.file() == Path(os.path.expanduser("~/.cache/pergrad/costs.json"))


def test_bad_devices_and_dtypes():
    with pytest.raises(UsageError, match=r"no device 'warp' .* Pass one"):
        pergrad.calibrate("warp")
    with pytest.raises(UsageError, match=r"torch.int64 .* pass torch.float32 or torch.float64"):
        pergrad.calibrate(dtype=torch.int64)
