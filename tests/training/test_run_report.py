"""The page of a run: what it says, that nothing in it is markup, and that it opens in peace."""

import json
import logging
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from torch import nn

import pergrad
from pergrad.command import main, runs
from pergrad.scans.report.preview import Preview
from pergrad.training.report import numbers, page
from pergrad.training.trainers import Batch

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>{{7*7}}"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --window-size=1280,1000"
)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "pergrad.watch")


def watched(folder: Path, steps: int = 24, wrong: str = "wrong") -> pergrad.Watch:
    """A run in which one example has a gradient 400 times as large in the 20th step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    keys = [f"example {i}" for i in range(7)] + [wrong]
    watch = pergrad.Watch(folder, every=1, groups="layer", clip=1.0, show=lambda k: f"text of {k}")
    for step in range(steps):
        x = torch.randn(8, 3)
        losses = (model(x) - x.sum(1, keepdim=True)).square().squeeze(1)
        scale = torch.ones(8)
        scale[7] = 400.0 if step == 20 else 1.0
        losses = losses * scale
        with watch(losses, model, keys=keys, step=step):
            losses.mean().backward()
        model.zero_grad()
    watch.flush()
    return watch


def words(page: Path) -> str:
    text = re.sub(r"<script.*?</script>|<style.*?</style>", " ", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text)).replace("\u00a0", " ")


def test_the_page_names_what_stood_out(tmp_path: Path) -> None:
    watch = watched(tmp_path / "run")
    page = watch.report(tmp_path / "run.html", title="A run")
    said = words(page)
    assert re.search(r"One step stands out: step 20, .*most of it from wrong \(\d+ %\)", said)
    assert "text of wrong" in said
    assert "The gradient noise scale is" in said
    assert "of the latest norms were above 1." in said
    assert "src=" not in re.sub(r'src="data:', "", page.read_text().split('id="data"')[0])
    watch.close()


def test_the_headline_shows_whose_it_is() -> None:
    said: Any = SimpleNamespace(steps=9, examples=72, spikes=[])
    card: dict[str, Any] = {"key": "187cf92f77e043f0", "times": 5, "seen": 6}
    told = page.headline(said, [card])
    assert "examples do: 187cf92f77e043f0 stood out in 5 of the 6 steps" in told
    told = page.headline(said, [{**card, "label": "label 3", "text": "to be\nor " + "not " * 99}])
    assert "187cf92f77e043f0 (label 3, to be or not not" in told
    assert "not …) stood out" in told


CLASSES = torch.tensor([4, 2])


@pytest.mark.parametrize(
    ("inputs", "label"),
    [
        ([torch.rand(2, 1, 4, 4), CLASSES], "label 4"),
        ((torch.rand(2, 4, 4), CLASSES), "label 4"),
        ({"pixel_values": torch.rand(2, 3, 4, 4), "labels": CLASSES}, "label 4"),
        ({"x": torch.rand(2, 3), "y": CLASSES}, "label 4"),
        ([torch.rand(2, 3), CLASSES.double()], None),  # a regression
        ([torch.rand(2, 3), CLASSES, CLASSES], None),  # whose first class it is, nobody says
        ({"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(2, 3).long()}, None),
        (torch.rand(2, 3), None),
    ],
)
def test_a_batch_shows_its_labels(inputs: Any, label: str | None) -> None:
    """Without it nobody sees that a label is wrong."""
    seen = Batch(inputs).preview(0)
    shown = Preview.of(seen)
    assert shown.label == label
    assert (shown.image is not None) or (shown.text is not None)
    assert Preview.from_stored(*shown.stored()).label == label


def test_curves_are_those_of_the_rows(tmp_path: Path) -> None:
    watched(tmp_path / "run").close()
    run = pergrad.open_watch(tmp_path / "run")
    drawn = numbers.curves(run.by_step())
    rows = run.steps().to_pylist()
    assert drawn.step.tolist() == [row["step"] for row in rows]
    assert drawn.loss == pytest.approx([row["loss"] for row in rows])
    assert drawn.band["p90"] == pytest.approx([row["p90"] for row in rows])
    assert drawn.noise[-1] == pytest.approx(run.noise().value)
    assert drawn.layers["0"] == pytest.approx([row["norm:0"] for row in rows])
    few = drawn.thinned(5)
    assert len(few.step) == 5
    assert few.band["max"].max() == drawn.band["max"].max()  # a peak is not averaged away
    assert few.loss[0] == pytest.approx(drawn.loss[:4].mean())


def test_ranks_are_one_step() -> None:
    row = {
        "rank": 0, "ranks": 2, "examples": 3, "sharded": False, "note": None, "loss": 1.0,
        "grad_norm": 2.0, "weight_sum": 1.0, "sq_weight_sum": 0.5, "sq_norm_sum": 9.0,
        "zero": 0.0, "clipped": None, **dict.fromkeys(numbers.BAND, 1.0),
    }  # fmt: skip
    other = {**row, "rank": 1, "examples": 1, "loss": 3.0, "zero": 1.0, "max": 5.0, "p50": 2.0}
    drawn = numbers.curves([(0, [row, other])])
    assert drawn.batch.tolist() == [4]
    assert drawn.loss.tolist() == [2]  # each rank's mean has the same weight in the gradient
    assert drawn.zero.tolist() == [0.25]  # and each example in a share of examples
    assert drawn.band["max"].tolist() == [5]
    assert drawn.band["p50"].tolist() == [1.5]
    assert np.isnan(drawn.clipped).all()


def test_a_step_has_the_usual_number_of_examples(tmp_path: Path) -> None:
    """Not as many as the short last batch of an epoch."""
    model = nn.Linear(3, 1)
    with pergrad.Watch(tmp_path / "run", every=1) as watch:
        for _ in range(6):
            for size in (64, 64, 5):
                losses = model(torch.randn(size, 3)).square().squeeze(1)
                with watch(losses, model):
                    losses.mean().backward()
                model.zero_grad()
    run = pergrad.open_watch(tmp_path / "run")
    assert set(numbers.curves(run.by_step()).batch.tolist()) == {64}
    assert ", a step has 64: " in words(run.report(tmp_path / "run.html"))


def test_the_largest_scores_and_losses_where_few_stand_out(tmp_path: Path) -> None:
    """20 wrong labels: one is an outlier, the others are on the page all the same."""
    watch = watched(tmp_path / "run")
    page = watch.report(tmp_path / "run.html")
    watch.close()
    said = words(page)
    assert "which are below the threshold of an outlier" in said
    assert re.search(r"wrong 1 of 24 times", said)
    assert said.count("below the threshold ") == 7 + 1  # and once above the cards
    losses = said.split("Largest losses")[1]
    assert re.search(r"look here first\. Example Loss Norm Step Outlier wrong ", losses)
    assert len(set(re.findall(r"example \d", losses.split("Step by step")[0]))) == 7
    assert "Gradient norms of the examples, made comparable across lengths" in said
    assert "norm, comparable across lengths" in page.read_text()


def test_steps_that_could_not_be_read_are_said(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pergrad.Watch(tmp_path / "run", every=1) as watch:
        for _ in range(2):
            loss = model(torch.randn(8, 3)).square().mean()
            with watch(loss, model, 8):
                loss.backward()
    said = words(pergrad.open_watch(tmp_path / "run").report(tmp_path / "run.html"))
    assert "No step could be read." in said
    assert re.search(r"Steps could not be read, from step 0 on: .*mix", said)


def test_nothing_of_a_user_is_markup(tmp_path: Path) -> None:
    watch = watched(tmp_path / "run", wrong=HOSTILE)
    text = watch.report(tmp_path / "run.html", title=HOSTILE).read_text()
    watch.close()
    assert HOSTILE not in text
    assert "{{7*7}}" in text


def test_a_page_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    watched(tmp_path / "run", steps=2).close()
    with pytest.raises(pergrad.UsageError, match="in a folder that exists and can be written to"):
        pergrad.open_watch(tmp_path / "run").report(tmp_path / "none" / "run.html")


def test_the_page_is_rewritten_as_the_run_goes_on(tmp_path: Path) -> None:
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:  # nothing was there, and then a run
            watched(tmp_path / "run", steps=3).close()

    pages = runs.pages(tmp_path / "run", tmp_path / "run.html", 7, None, wait)
    page = next(pages)
    assert waits == [7, 7]
    assert '<meta http-equiv="refresh" content="7">' in page.read_text()
    assert re.search(r"\b3 steps read", words(page))

    def more(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 4:
            watched(tmp_path / "run", steps=5).close()

    pages.close()
    pages = runs.pages(tmp_path / "run", tmp_path / "run.html", 7, None, more)
    next(pages)
    page = next(pages)  # not before there is news
    assert waits == [7, 7, 7, 7]
    assert re.search(r"\b5 steps read", words(page))


def test_the_command_reads_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched(tmp_path / "run").close()

    def say(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["pergrad", *map(str, arguments)])
        code = main()
        said = capsys.readouterr()
        return code, said.out, said.err

    code, out, _ = say("report", tmp_path / "run")
    assert (code, out.strip()) == (0, str(tmp_path / "run" / "report.html"))
    code, out, _ = say("top", tmp_path / "run", "-n", 3, "--json")
    assert (code, json.loads(out)[0]["key"]) == (0, "wrong")
    code, _, err = say("top", tmp_path / "run", "--smallest")
    assert code == 1
    assert "Leave out --smallest" in err
    code, _, err = say("top", tmp_path / "run", "--by", "size")
    assert code == 1
    assert 'Rank by "outlier"' in err

    def stop(*_: Any) -> Iterator[Path]:
        yield tmp_path / "page.html"
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "pages", stop)
    code, out, _ = say("watch", tmp_path / "run")
    assert (code, out.strip()) == (0, str(tmp_path / "page.html"))


def test_the_page_opens_in_peace_on_a_desk_and_a_phone(tmp_path: Path) -> None:
    watch = watched(tmp_path / "run", wrong="x" * 200)
    page = watch.report(tmp_path / "run.html")
    watch.close()
    there = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    assert all(there.values()), "no Chromium here: say `make browser`, which installs it"
    options = webdriver.ChromeOptions()
    options.binary_location = there["chromium"] or ""
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path / 'chromium'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(there["chromedriver"]))
    try:
        for width in (1200, 360):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(page.as_uri())
            ready = "return document.documentElement.dataset.ready"
            for _ in range(300):
                if browser.execute_script(ready) == "yes":
                    break
                time.sleep(0.1)
            assert browser.execute_script(ready) == "yes"
            names = [e.get_attribute("id") for e in browser.find_elements("class name", "plot")]
            assert names == [f"figure-{n}" for n in ("band", "loss", "grad", "noise", "clipped",
                                                     "layers")]  # fmt: skip
            wide = "return document.documentElement.scrollWidth - window.innerWidth"
            assert browser.execute_script(wide) <= 0
            told = [m for m in browser.get_log("browser") if m["level"] in ("SEVERE", "WARNING")]
            assert told == []
    finally:
        browser.quit()


def test_who_is_on_the_page_has_a_picture(tmp_path: Path) -> None:
    """Outliers, those that grew when they were none any more, and the largest of the others."""
    asked: list[str] = []

    def show(key: str) -> str:
        asked.append(key)
        return f"text of {key}"

    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 1)
    x = torch.randn(60, 3, generator=generator)
    x[7] *= 40  # an outlier, once
    with pergrad.Watch(tmp_path / "run", every=1, keep=6, show=show) as watch:
        for step in range(12):
            rows = torch.randperm(60, generator=generator)[:20]
            size = 1 + (rows == 11) * step * (0.0 if step < 6 else 0.4)
            losses = (model(x[rows]) * size[:, None]).square().squeeze(1)
            with watch(losses, model, keys=rows):
                losses.mean().backward()
            model.zero_grad()
    run = pergrad.open_watch(tmp_path / "run")
    first = run.top(6)["key"].to_pylist()
    assert set(run.shown()) == set(first)
    times = run.top(6)["times"].to_pylist()
    assert max(times) > 0
    assert min(times) == 0  # the others are below the threshold
    assert len(asked) < 60  # not of every example at every step
    page = words(run.report(tmp_path / "run.html"))
    assert all(f"text of {key}" in page for key in first)
