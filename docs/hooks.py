"""What the site takes from outside `docs/`: tutorials, measured figures, and texts that live elsewhere.

A line ``<!-- show: CONTRIBUTING.md -->`` in a page stands for that file of the repository, so that no
text exists twice. Its links lead to the pages of the site; what is no page is named without a link.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority, get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
SHOW = re.compile(r"^<!-- show: (\S+) -->$", flags=re.MULTILINE)
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", flags=re.DOTALL)
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#|mailto:)([^)\s]+)\)")

# Files of the repository that are a page of the site under another name.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "sinkscope/bundled/weights/README.md": "bundled-model.md",
    "sinkscope/example/README.md": "example-model.md",
}
log = get_plugin_logger("sinkscope")


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    figures = (ROOT / "benchmarks" / "results").glob("*.png")
    for path in sorted([*(ROOT / "tutorials").glob("*.ipynb"), *figures]):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File(uri, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return SHOW.sub(lambda match: _shown(match[1], page), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings introduce drawings by a line with two colons, which Markdown would show."""
    return html.replace("<p>::</p>", "")


def _shown(source: str, page: Page) -> str:
    """The text of a file of the repository, as it reads on the site."""
    path = ROOT / source
    if not path.exists():
        log.warning(f"{page.file.src_uri} shows {source}, which does not exist.")
        return ""
    if path.suffix == ".yaml":
        return f"```yaml\n{path.read_text(encoding='utf-8')}```"
    text = FRONT_MATTER.sub("", path.read_text(encoding="utf-8"))
    folder = posixpath.dirname(source)
    return LINK.sub(lambda link: _on_site(link[1], link[2], folder), text)


def _on_site(text: str, target: str, folder: str) -> str:
    """A link of a file in `folder` of the repository, as a link between pages of the site."""
    path, hash_mark, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(folder, path))
    if path in PAGES:
        return f"[{text}]({PAGES[path]}{hash_mark}{anchor})"
    if path.startswith("docs/"):
        return f"[{text}]({path.removeprefix('docs/')}{hash_mark}{anchor})"
    return text
