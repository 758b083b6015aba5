"""The page of influences: what it says, that nothing in it is markup, that it opens in peace."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attributing import job
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

import pergrad
from pergrad.attribution import ranking, shown
from pergrad.attribution.report import page
from pergrad.command import main
from pergrad.errors import StoreError, UsageError

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>{{7*7}}"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --window-size=1280,1000"
)


def picture(i: int) -> Any:
    return {"image": Image.new("L", (8, 8), 20 * i), "label": f"{HOSTILE} {i}", "shape": "square"}


def asked(path: Path, **more: Any) -> pergrad.Influence:
    task = replace(job("perceptron"), show=picture, key=lambda i: f"train/{i}")
    queries = job("perceptron", count=14).data[11:]
    return pergrad.influence(
        task, queries, path, **{"show": lambda q: f"text of {q} {HOSTILE}", **more}
    )


def data(text: str) -> dict[str, Any]:
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]


def words(text: str) -> str:
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text)).replace("&#39;", "'")


@pytest.mark.parametrize("top", [None, 4])
def test_the_page_has_the_strongest_of_every_query(top: int | None, tmp_path: Path) -> None:
    found = asked(tmp_path / "found", top=top)
    text = pergrad.Influence(tmp_path / "found").report(tmp_path / "page.html").read_text()
    drawn = data(text)
    most = top or 11
    for q, query in enumerate(drawn["queries"]):
        assert query["name"] == f"#{q}"
        for end, table in (("high", found.top(q, most)), ("low", found.bottom(q, most))):
            rows = table.to_pylist()
            assert query[end] == [[row["index"], row["score"]] for row in rows]
    assert drawn["names"]["3"] == "train/3"
    assert drawn["asked"]["1"]["text"].startswith("text of 1")
    strongest = drawn["queries"][0]["high"][0][0]
    assert drawn["scored"][str(strongest)]["image"].startswith("data:image/png;base64,")
    assert drawn["scored"][str(strongest)]["more"] == [["shape", "square"]]
    assert "<img src=x" not in text
    said = words(text)
    assert "Which of 11 training examples drive these 3 predictions?" in said
    assert "that the example helps: it lowers the query's loss. Unit: inner product" in said
    assert "take no account of curvature" in said
    assert "give the job a show" not in said


@pytest.mark.parametrize(("limit", "value"), [("ROWS_PER_FILE", 3), ("BYTES_PER_FILE", 3 * 8)])
def test_ends_are_those_of_the_matrix_over_files_and_blocks(
    limit: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, limit, value)
    monkeypatch.setattr("pergrad.attribution.queries.MOST_QUERY_BYTES", 1)
    found = asked(tmp_path / "found", batch_size=3)
    assert len(found.manifest["blocks"]) == 3
    assert len(list((tmp_path / "found").glob("pairs1-*"))) == 4
    scores = found.scores.numpy()
    for row, (high, low) in zip(scores, found.ends(4), strict=True):
        order = np.argsort(-row, kind="stable")
        assert high[0].tolist() == order[:4].tolist()
        assert low[0].tolist() == np.argsort(row, kind="stable")[:4].tolist()
        assert high[1].tolist() == row[order[:4]].tolist()


def test_a_measurement_says_what_is_raised(tmp_path: Path) -> None:
    task = job("perceptron")
    measured = replace(task, losses=lambda m, b: m(b[0])[:, 0], data=task.data[:2], show=picture)
    found = pergrad.influence(task, measured, tmp_path / "found")
    text = found.report(tmp_path / "page.html", title="A margin").read_text()
    assert 'data-high="Raises it most" data-low="Lowers it most"' in text
    assert "<title>A margin</title>" in text
    assert "that the example raises the measurement" in words(text)
    assert "give the job a show" in words(text)
    assert data(text)["asked"]["0"]["more"] == [["shape", "square"]]
    with pytest.raises(UsageError, match=r"these are a Job: pass it there, as Job\(show=\.\.\.\)"):
        pergrad.influence(task, measured, tmp_path / "other", show=picture)


def test_residuals_and_hubs_are_told(tmp_path: Path) -> None:
    task = job("perceptron")
    fit = pergrad.curvature(task, tmp_path / "fit")
    found = pergrad.influence(
        task, task.data[:4], tmp_path / "found", curvature=fit, refine=1, damping=0.01
    )
    said = words(found.report(tmp_path / "page.html").read_text())
    assert "After 1 refining steps the worst residual is" in said
    assert "more steps would change scores. Take four times as many" in said
    assert "refine=4), in another folder" in said
    assert "ekfac curvature" in said
    one = (np.array([7, 1]), np.array([2.0, 1.0]))
    told = page.findings(found.manifest, [(one, one)] * 5, None)
    assert told[-1].startswith("#7 is among the 10 highest of 5 of the 5 queries")
    assert len(page.findings(found.manifest, [(one, one)] * 2, None)) == len(told) - 1


def test_a_show_that_raises_costs_its_preview(tmp_path: Path) -> None:
    def show(i: int) -> str:
        if i == 2:
            raise KeyError("no file 2")
        return f"example {i}"

    task = replace(job("perceptron"), show=show)
    found = pergrad.influence(task, task.data[:2], tmp_path / "found")
    drawn = data(found.report(tmp_path / "page.html").read_text())
    assert drawn["scored"]["2"]["error"] == "KeyError: 'no file 2'"
    assert drawn["scored"]["3"]["text"] == "example 3"
    task = replace(task, show=lambda i: f"now {i}")  # the same call again collects anew
    found = pergrad.influence(task, task.data[:2], tmp_path / "found")
    drawn = data(found.report(tmp_path / "page.html").read_text())
    assert drawn["scored"]["2"]["text"] == "now 2"
    assert len(list((tmp_path / "found").glob("shown-*"))) == 1


def test_a_page_has_room_for_so_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(tmp_path / "found")
    monkeypatch.setattr(page, "PREVIEW_BYTES", 1000)
    text = found.report(tmp_path / "page.html").read_text()
    kept = data(text)
    assert 0 < len(kept["asked"]) + len(kept["scored"]) < 14
    assert re.search(r"\d+ pictures or texts are left out", words(text))
    monkeypatch.setattr("pergrad.attribution.found.QUERIES", 2)
    text = found.report(tmp_path / "page.html").read_text()
    assert "The first 2 of 3 are in this page." in words(text)


def test_a_damaged_preview_is_told(tmp_path: Path) -> None:
    found = asked(tmp_path / "found")
    path = next((tmp_path / "found").glob("shown-*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"its checksum differs. Remove this file and make"):
        found.report(tmp_path / "page.html")
    path.unlink()
    asked(tmp_path / "found")
    found.report(tmp_path / "page.html")


def test_the_command_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked(tmp_path / "found")
    monkeypatch.setattr("sys.argv", ["pergrad", "report", str(tmp_path / "found"), "--json"])
    capsys.readouterr()
    assert main() == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "found/report.html")}
    assert asked(tmp_path / "found").shape == (3, 11)  # a page in the folder is in nobody's way


def test_few_are_shown_of_many_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "MOST", 6)
    asked(tmp_path / "found")
    folder = pergrad.Influence(tmp_path / "found")._folder
    assert 1 <= len(shown.recall(folder, "shown")) <= 6
    assert len(shown.recall(folder, "askedshown")) == 3


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = shutil.which("chromium") or ""
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def test_in_a_browser(browser: webdriver.Chrome, tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = asked(tmp_path / "found", show=lambda q: f"{'even' if q % 2 == 0 else 'odd'} {HOSTILE}")
    browser.get(found.report(tmp_path / "page.html").as_uri())
    deadline = time.monotonic() + 30
    script = "return document.documentElement.dataset.ready === 'yes'"
    while not browser.execute_script(script) and time.monotonic() < deadline:
        time.sleep(0.05)

    def count(selector: str) -> int:
        return len(browser.find_elements("css selector", selector))

    assert count(".query") == 3
    assert count(".query .card") == 3 * 3 * 10  # highest, lowest, nearest
    assert count(".query .more") == 3 * 2  # an eleventh
    assert count("img[src=x]") == 0
    browser.find_element("css selector", ".query .more").click()
    assert count(".query .card") == 3 * 3 * 10 + 1
    first = browser.find_element("css selector", ".query .card")
    first.click()
    said = browser.find_element("css selector", "#full-content").text
    best = found.top(0, 1)
    assert best["key"][0].as_py() in said
    assert "square" in said
    browser.find_element("css selector", ".close").click()
    browser.find_element("id", "search").send_keys("ODD")
    assert count(".query") == 1
    assert browser.find_element("id", "found").text == "1 of 3 queries"
    assert not [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]


def test_the_baselines_neighbours_stand_beside(tmp_path: Path) -> None:
    """What goes into the last layer, less its mean, by hand; and kept in the folder."""
    task = replace(job("perceptron"), show=picture)
    found = asked(tmp_path / "found")
    text = pergrad.Influence(tmp_path / "found").report(tmp_path / "page.html").read_text()
    drawn = data(text)
    queries = job("perceptron", count=14).data[11:]
    known, own = (
        task.model[:2](torch.stack([x for x, _ in items])).detach()
        for items in (task.data, queries)
    )
    mean = known.mean(0)
    cosines = torch.nn.functional.cosine_similarity(
        (own - mean)[:, None], (known - mean)[None], dim=2
    )
    for q, query in enumerate(drawn["queries"]):
        values, order = cosines[q].topk(10)
        assert [i for i, _ in query["near"]] == order.tolist()
        assert [c for _, c in query["near"]] == pytest.approx(values.tolist())
        assert all(str(i) in drawn["scored"] for i in order.tolist())
    same = (
        sum(
            len({i for i, _ in query["near"]} & {i for i, _ in query["high"][:10]})
            for query in drawn["queries"]
        )
        / 3
    )
    assert f"the last layer, {same:.1f} are among the 10 highest" in words(text)
    again = asked(tmp_path / "found")  # which computes nothing
    assert again.manifest == found.manifest


def test_without_neighbours(tmp_path: Path) -> None:
    """A model whose last layer sees no example in its first dimension has none, nor says so."""

    def turned(net: torch.nn.Module, batch: Any) -> torch.Tensor:
        return (batch[0] @ (net.weight @ net.inner.weight).T)[:, 0]

    net = torch.nn.Linear(6, 1, bias=False)
    net.inner = torch.nn.Linear(6, 6, bias=False)  # type: ignore[assignment]
    task = pergrad.Job(
        net, job("perceptron", torch.float32).data, turned, show=lambda i: f"text {i}"
    )
    found = pergrad.influence(task, task.data[:2], tmp_path / "found")
    text = found.report(tmp_path / "page.html").read_text()
    assert all(query["near"] == [] for query in data(text)["queries"])
    assert "without gradients names" not in words(text)
