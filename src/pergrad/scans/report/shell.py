"""What every page is made of: a template, a style, scripts that the page names by their hashes.

Owns: reading the files that lie beside this one, Bokeh's script, and writing a page to the disk.
Does not know: what a page says.
"""

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from bokeh.resources import Resources

from pergrad import folders
from pergrad.errors import UsageError
from pergrad.scans.text import printable

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but the tabulator and line feed


def template(text: str) -> jinja2.Template:
    """A page's template, which may extend base.html; what it prints is escaped unless it says
    otherwise.
    """
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"base.html": own("base.html")}),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        finalize=_without_controls,
    )  # fmt: skip
    # sorted keys would put Bokeh's references before what they refer to
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    return environment.from_string(text)


def _without_controls(value: Any) -> Any:
    """A text with its control characters written out: a page is also read in terminals."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), value)
    return value


def own(name: str, package: str = "pergrad.scans.report") -> str:
    """A file that lies in a package."""
    return (files(package) / name).read_text(encoding="utf-8")


def bokeh() -> str:
    """Bokeh's script, made safe to stand between script tags."""
    # one file; what else js_raw holds sets a log level, and logs that it did
    script = Resources(mode="inline", components=["bokeh"]).js_raw[0]
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def hashes(scripts: Sequence[str]) -> str:
    """What a content security policy names scripts by."""
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def _is_page(path: Path) -> bool:
    """Whether a file is a page, or empty."""
    with open(path, "rb") as file:
        return file.read(9).lower() in (b"", b"<!doctype")


def save(text: str, target: Path) -> Path:
    """Write a page, whole or not at all.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        if os.path.lexists(target) and not (target.is_file() and not target.is_symlink()):
            raise UsageError(
                f"{printable(target)} is there and is not an ordinary file, so it is not replaced. "
                "Pass the path of a file, such as report.html."
            )
        if os.path.lexists(target) and not _is_page(target):
            raise UsageError(
                f"{printable(target)} is there and is no page of a report, so it is not replaced. "
                "Pass another path, or remove that file if you do not need it."
            )
        # what UTF-8 lacks is written out, as a data set may say anything
        folders.write(target, text.encode("utf-8", "backslashreplace"), mode=0o666, make=False)
    except OSError as error:
        raise UsageError(
            f"Cannot write the report to {printable(target)}: {error.strerror or error}. Pass the "
            "path of a file in a folder that exists and can be written to."
        ) from error
    return target
