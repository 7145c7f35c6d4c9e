"""A hook of mkdocs: README, CONTRIBUTING and CHANGELOG become pages, and links lead to them.

In the repository these files lie above docs/, where GitHub shows them. On the site they are pages
among the others, so their links lose `docs/`, and links to them lose `../`.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
ABOVE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"\]\((?:\.\./|docs/)?(?P<path>[^)#:]+)(?P<anchor>#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie above docs/."""
    for name, page in ABOVE.items():
        content = (ROOT / name).read_text("utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Make links as they are in the repository into links of the site."""

    def of_the_site(link: re.Match[str]) -> str:
        path = ABOVE.get(link["path"], link["path"])
        return f"]({path}{link['anchor'] or ''})"

    return _LINK.sub(of_the_site, markdown)
