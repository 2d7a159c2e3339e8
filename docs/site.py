"""What mkdocs.yml needs to read docs/ as a forge shows it: links out of the folder, and Sphinx roles in docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turns links to files outside of docs/, which the site has not, into their text and path."""
    here = Path(page.file.abs_src_path).parent

    def replaced(match: re.Match[str]) -> str:
        target = (here / match[2]).resolve()
        if target.is_relative_to(ROOT / "docs") or not target.exists():
            return match[0]  # mkdocs follows the first, and says that the second is broken
        path = str(target.relative_to(ROOT))
        return match[1] if path in match[1] else f"{match[1]} (`{path}`)"

    return LINK.sub(replaced, markdown)


class Roles(Extension):
    """Shows Sphinx's :class:`Name` as the code `Name`, and its "Example::" as a word of its own."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r":\w+:`~?(?:eopd_kernels\.)?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"^( *)Example::$", r"\1**Example**", text, flags=re.MULTILINE)
