"""The command: `python -m tests.screenshots`: docs/images/report.png, digits.py's report now.

Needs Chromium, which `make browser` installs. With a folder as its argument it also looks at the
pages of a site in it (`make docs`), at desktop and phone width, light and dark, writes what it sees
to build/screenshots, and fails if a page is wider than its screen.
"""

import io
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from pergrad.command import jobs

ROOT = Path(__file__).resolve().parent.parent
SEEN = ROOT / "build" / "screenshots"
PAGES = ["README", "start", "how-it-works", "errors", "guides/influential", "api", "comparison"]
SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(flag)
    driver = shutil.which("chromedriver")
    assert driver, "no Chromium here: say `make browser`, which installs it"
    opened = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield opened
    finally:
        opened.quit()


def seen(
    opened: webdriver.Chrome, page: Path, width: int, height: int, scheme: str = "light"
) -> tuple[Image.Image, int]:
    """What a screen shows of a page, and how wide the page is."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1.25, "mobile": width < 500}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    opened.get(page.as_uri())
    opened.execute_script("localStorage.clear()")  # the site keeps the scheme that it began with
    opened.refresh()
    time.sleep(1.5)  # figures are drawn after the page is there
    picture = Image.open(io.BytesIO(opened.get_screenshot_as_png())).convert("RGB")
    return picture, int(opened.execute_script("return document.documentElement.scrollWidth"))


def site(opened: webdriver.Chrome, folder: Path) -> list[str]:
    """Pages that are wider than the screen; pictures of all go to build/screenshots."""
    SEEN.mkdir(parents=True, exist_ok=True)
    wide = []
    for page in PAGES:
        for screen, (width, height) in SCREENS.items():
            for scheme in ("light", "dark"):
                picture, needed = seen(opened, folder / f"{page}.html", width, height, scheme)
                picture.save(SEEN / f"{page.replace('/', '-')}-{screen}-{scheme}.png")
                if needed > width:
                    wide.append(f"{page} on a {screen}: {needed} > {width}")
    return wide


def main() -> None:
    with browser() as opened:
        if len(sys.argv) > 1:
            folder = Path(sys.argv[1]).resolve()
            home = folder / "README.html"
            if not home.exists():  # mkdocs makes the README the first page
                shutil.copy(folder / "index.html", home)
            sys.exit("; ".join(site(opened, folder)) or 0)
        with tempfile.TemporaryDirectory() as name:
            found = jobs.function(f"{ROOT / 'examples' / 'digits.py'}:main")(Path(name))
            picture, _ = seen(opened, Path(found["report"]), 1280, 1900)
        small = picture.quantize(256)
        small.save(ROOT / "docs" / "images" / "report.png", optimize=True)


if __name__ == "__main__":
    main()
