"""Hooks of mkdocs: pages that lie in the root of the repository become pages of the site."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"\]\(((?:\.\./)+|docs/)([\w./-]+)")


def on_files(files, config):
    """Adds the pages of the root to the files of the site."""
    from mkdocs.structure.files import File

    for name in ROOT_PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown, page, **_):
    """Points links between docs/ and the root to where the pages are on the site."""
    depth = page.file.src_uri.count("/")

    def moved(match):
        prefix, target = match[1], match[2]
        if prefix == "docs/" and page.file.src_uri in ROOT_PAGES:
            return f"]({target}"
        if target in ROOT_PAGES and prefix == "../" * (depth + 1):
            return f"]({'../' * depth}{target}"
        return match[0]

    return LINK.sub(moved, markdown)
