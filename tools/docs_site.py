"""A hook of mkdocs: the files beside docs/ become pages of the site, and links between all of them hold there, too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

# Files of the repository, and the pages that they become.
PAGES: Final = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/results.md": "benchmarks.md",
}
SOURCES: Final = {page: source for source, page in PAGES.items()}
# Of a link or a picture: what is in the parentheses, without a title.
TARGET: Final = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE: Final = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, and what they show."""
    root = Path(config.config_file_path).parent
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(root / source).read_text("utf-8")))
    for file in ("LICENSE", "benchmarks/README.md"):
        # Shown as they are.
        files.append(File.generated(config, f"files/{file.replace('.md', '.txt')}", abs_src_path=str(root / file)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turns links to files of the repository into links to their pages."""
    source = Path(SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else linked(part, source) for part in parts)


def linked(text: str, source: Path) -> str:
    """`text`: of the file `source`, a path from the repository's root. The links are those of the site."""

    def target(match: re.Match[str]) -> str:
        path = _normal(source.parent / match[1])
        if path in PAGES:
            place = PAGES[path]
        elif path in ("LICENSE", "benchmarks/README.md"):
            place = f"files/{path.replace('.md', '.txt')}"
        else:
            place = path.removeprefix("docs/")
        return place + (match[2] or "")

    return TARGET.sub(target, text)


def _normal(path: Path) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            del parts[-1:]
        else:
            parts.append(part)
    return "/".join(parts)
