"""For mkdocs: pages and files of the checkout that lie outside docs/ become part of the site.

README.md, CHANGELOG.md and the like are pages as they stand, and other files to which a page links
(examples, sources) are put beside them, so that there is one text of each.
"""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"]
# who searches has a task, a message, or a word
SOUGHT = {"start.md": 2, "guides": 3, "errors.md": 3, "glossary.md": 3}
LINK = re.compile(r"(\]\()([^)#\s]+)")


def _links(path: Path) -> list[str]:
    """Files of the checkout, from its root, to which a page links."""
    found = []
    for _, target in LINK.findall(path.read_text()):
        if "://" not in target:
            file = (path.parent / target).resolve()
            if file.is_file():
                found.append(file.relative_to(ROOT).as_posix())
    return found


def _in_site(path: str) -> str:
    """Where a file of the checkout is in the site; sources as text, which a browser shows."""
    path = path.removeprefix("docs/")
    return f"{path}.txt" if Path(path).suffix in (".py", ".sh", "") else path


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside docs/."""
    pages = [ROOT / name for name in OUTSIDE]
    here = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    wanted = dict.fromkeys(OUTSIDE)
    for page in [*pages, *here]:
        wanted.update(dict.fromkeys(n for n in _links(page) if not n.startswith("docs/")))
    for name in wanted:
        uri = _in_site(name)
        content = (ROOT / name).read_bytes()
        if name.endswith(".md"):
            files.append(File.generated(config, uri, content=content.decode()))
        else:
            files.append(File.generated(config, uri, content=content))
    for page in (ROOT / "docs" / file.src_uri for file in list(files.documentation_pages())):
        text = _notebooks().text_of(page.read_text()) if page.is_file() else ""
        if text:
            uri = page.relative_to(ROOT / "docs").with_suffix(".ipynb").as_posix()
            files.append(File.generated(config, uri, content=text))
    return files


def _notebooks() -> Any:
    """docs/notebooks.py; mkdocs takes this folder off the path once it has loaded this file."""
    sys.path.insert(0, str(ROOT / "docs"))
    import notebooks

    return notebooks


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the checkout, to where things are in the site."""
    uri = page.file.src_uri
    own = uri if uri in OUTSIDE else f"docs/{uri}"

    def moved(match: re.Match[str]) -> str:
        head, target = match.groups()
        file = (ROOT / own).parent.joinpath(target).resolve()
        if "://" in target or not file.is_file():
            return match.group(0)
        to = _in_site(file.relative_to(ROOT).as_posix())
        return head + posixpath.relpath(to, posixpath.dirname(uri) or ".")

    if uri == "errors.md":
        markdown = _with_messages(markdown)
    page.meta.setdefault("search", {})["boost"] = SOUGHT.get(uri.split("/")[0], 1)
    if own.startswith("docs/") and _notebooks().text_of(markdown):
        name = posixpath.basename(uri).replace(".md", ".ipynb")
        link = f"\n[This page as a notebook]({name}){{: download .notebook }}\n"
        markdown = re.sub(r"^(# .*\n)", lambda m: m.group(1) + link, markdown, count=1)
    return LINK.sub(moved, markdown)


def _with_messages(markdown: str) -> str:
    """At the end of each section about errors, the messages that lead to it."""
    sys.path.insert(0, str(ROOT / "docs"))
    from messages import listed

    parts = re.split(r"^(?=#{2,3} )", markdown, flags=re.MULTILINE)
    found = listed()
    for i, part in enumerate(parts):
        section = re.sub(r"\W+", "-", part.splitlines()[0].removeprefix("### ").lower())
        texts = found.get(section, []) if part.startswith("### ") else []
        if texts:
            lines = "".join(f"    - {_plain(text)}\n" for text in texts)
            noun = "message" if len(texts) == 1 else "messages"
            parts[i] = f'{part}\n??? quote "{len(texts)} {noun}"\n\n{lines}\n'
    return "".join(parts)


def _plain(text: str) -> str:
    """A message as it stands, whatever of it Markdown or HTML would read."""
    parts = text.split("`")  # each second one is code, which stands as it is
    escaped = [p if k % 2 else re.sub(r"([\\*_\[\]<>#])", r"\\\1", p) for k, p in enumerate(parts)]
    return "`".join(escaped)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The one script that the theme would fetch from elsewhere is the site's own."""
    own = posixpath.relpath("javascripts/iframe-worker.js", posixpath.dirname(page.file.url) or ".")
    return output.replace("https://unpkg.com/iframe-worker/shim", own)
