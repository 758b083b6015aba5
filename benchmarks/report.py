"""Claim: a report of 1,797 examples is under 8 MB, and open in 2 s; of a million, under 15 MB.

python benchmarks/report.py            # needs Chromium: `make browser`

"Opens" is the time from the start of the navigation until all figures are drawn, in a Chromium that
has just been started and has nothing cached.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

import harness
from pergrad.scans.report import write
from pergrad.scans.report.preview import Preview

CLAIM_BYTES, CLAIM_BYTES_LARGE = 8_000_000, 15_000_000
CLAIM_SECONDS = 2.0
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --window-size=1280,1000"
)


def scores(n: int) -> tuple[pa.Table, dict[int, Preview]]:
    """Scores with norms of ten layers and two references, and pictures as large as the digits'."""
    rng = np.random.default_rng(0)
    losses = np.exp(2 * rng.normal(size=n))
    norms = losses**0.7 * np.exp(0.5 * rng.normal(size=n))
    columns = {"index": pa.array(range(n)), "loss": losses, "norm": norms}
    columns |= {f"norm:layer.{k}": norms * rng.random(n) for k in range(10)}
    columns |= {f"cosine:{name}": rng.uniform(-1, 1, n) for name in ("validation", "test")}
    shown = range(n) if n <= 5_000 else np.argsort(-norms)[:1_000].tolist()
    previews = {
        i: Preview.of({"image": rng.integers(0, 256, (8, 8), np.uint8), "label": str(i % 10)})
        for i in shown
    }
    return pa.table({**columns, "error": pa.nulls(n, pa.string())}), previews


def open_page(path: Path) -> float:
    """Seconds until a fresh browser has drawn the page."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS.split():
        options.add_argument(flag)
    with tempfile.TemporaryDirectory() as profile:
        options.add_argument(f"--user-data-dir={profile}")
        driver = shutil.which("chromedriver")
        browser = webdriver.Chrome(options=options, service=Service(driver))
        try:
            browser.get(path.as_uri())
            script = "return performance.getEntriesByName('pergrad-ready').map((e) => e.startTime)"
            while not (found := browser.execute_script(script)):
                time.sleep(0.05)
            return found[0] / 1000
        finally:
            browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--large", type=int, default=1_000_000, help="examples of the second")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON")
    args = parser.parse_args()
    record = {
        "claims": {"seconds": CLAIM_SECONDS},
        "environment": harness.environment(),
        "pages": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for n, claim in ((1_797, CLAIM_BYTES), (args.large, CLAIM_BYTES_LARGE)):
            table, previews = scores(n)
            start = time.perf_counter()
            path = write(table, {}, previews, Path(folder) / f"{n}.html")
            page = {
                "examples": n,
                "claim_bytes": claim,
                "bytes": path.stat().st_size,
                "writing_seconds": round(time.perf_counter() - start, 2),
            }
            seconds = harness.Spread.of([open_page(path) for _ in range(args.repeats)])
            record["pages"].append({**page, "opening_seconds": seconds.record(3)})
            print(
                f"{n:,} examples: {page['bytes'] / 1e6:.2f} MB (claim: {claim / 1e6:.0f}), written "
                f"in {page['writing_seconds']:.1f} s, open after {seconds.median:.2f} s"
            )
    print(f"saved {harness.save('report', record, args.out)}")


if __name__ == "__main__":
    main()
